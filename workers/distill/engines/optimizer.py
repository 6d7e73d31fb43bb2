"""AdamW over a student's trained parameters, whole or sharded, and an average of the weights beside its moments."""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from workers.distill.config import OptimizerConfig
from workers.errors import InputError

EMA = "ema"
"""Key of the averaged weight in a parameter's optimizer state, so that it is kept and restored with the moments."""
_OF_BITSANDBYTES = {"adamw_8bit": "AdamW8bit", "paged_adamw": "PagedAdamW", "paged_adamw_8bit": "PagedAdamW8bit"}


def parameter_groups(parameters: Mapping[str, nn.Parameter], config: OptimizerConfig) -> list[dict[str, Any]]:
    """Matrices decay; norms and biases, which have one axis, do not."""
    matrices = [parameter for parameter in parameters.values() if parameter.ndim >= 2]
    others = [parameter for parameter in parameters.values() if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def make_optimizer(parameters: Mapping[str, nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    """Fused AdamW of torch, or one of bitsandbytes by ``optimizer.name``."""
    groups = parameter_groups(parameters, config)
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
    import bitsandbytes

    kind = getattr(bitsandbytes.optim, _OF_BITSANDBYTES[config.name])
    made: torch.optim.Optimizer = kind(groups, lr=config.lr, betas=config.betas, eps=config.eps)
    return made


def require_bitsandbytes(config: OptimizerConfig) -> None:
    """Refuse an optimizer whose package is not installed; imports nothing.

    Raises:
        InputError: gives the command that installs it.
    """
    if find_spec("bitsandbytes") is None:
        raise InputError(
            f"optimizer.name={config.name} is one of bitsandbytes: pip install 'logit-cache[bitsandbytes]', or choose "
            f"adamw."
        )


@torch.no_grad()
def update_ema(optimizer: torch.optim.Optimizer, decay: float) -> None:
    """After a step: ema = decay * ema + (1 - decay) * weight, which begins as the first step's weight."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if EMA not in state:
                state[EMA] = parameter.detach().clone()
            else:
                state[EMA].lerp_(parameter, 1.0 - decay)


def stored(value: Any) -> Tensor:
    """A value of an optimizer's state as a tensor; bitsandbytes counts steps in an int."""
    return value if isinstance(value, Tensor) else torch.tensor(value)


def restored(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, value: Tensor) -> Any:
    """What ``stored`` gave, as the optimizer keeps it beside the parameter."""
    if value.ndim == 0 and not value.is_floating_point():
        return int(value)
    allocate = getattr(optimizer, "get_state_buffer", None)  # of bitsandbytes: paged where the optimizer is
    if allocate is not None and value.shape == parameter.shape:
        return allocate(parameter, dtype=value.dtype).copy_(value)
    return value.to(parameter.device)
