"""DeepSpeed's ZeRO, stages 0 to 3, behind ``Engine``.

DeepSpeed averages over ranks, clips, and skips a step whose gradient is not finite before it changes anything. So the
loss is multiplied by the number of ranks, and a skipped step becomes ``NotFiniteError``. At stage 0 it does none of the
last two in float32, and the engine does them.
"""

import logging
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from workers.distill.config import DistillConfig, OptimizerConfig
from workers.distill.engines.deepspeed_config import deepspeed_config
from workers.distill.engines.engine import NotFiniteError, T, Tensors
from workers.distill.engines.optimizer import parameter_groups
from workers.distill.student_loss import StudentLoss
from workers.distill.terms import ScaledTerm
from workers.errors import InputError
from workers.lookup.batch import Batch
from workers.ranks import Ranks
from workers.standard_output import stdout_to_stderr
from workers.teacher.checkpoint import first_line

MOMENTS = ("exp_avg", "exp_avg_sq")

logger = logging.getLogger(__name__)


class DeepSpeedEngine:
    """Also of one rank; wraps the student, whose parameters it turns into partitions at stage 3.

    Args:
        student: float32, on a CPU: DeepSpeed moves it, in the dtype it keeps.
        ranks: with a process group, also of one.

    Raises:
        InputError: DeepSpeed is not installed; or the config's DeepSpeed file contradicts it.
    """

    def __init__(self, student: StudentLoss, config: DistillConfig, ranks: Ranks) -> None:
        deepspeed = _import_deepspeed(ranks.device)
        hidden_size = student.model.config.get_text_config().hidden_size
        settings = deepspeed_config(config, num_ranks=ranks.size, hidden_size=hidden_size)
        _require_known(settings["zero_optimization"], config.engine.deepspeed_config)
        self.student = student
        self._ranks = ranks
        self._max_grad_norm = config.optimizer.max_grad_norm
        self._stage: int = settings["zero_optimization"]["stage"]
        # Before partitions hide the names and sizes; of tied weights, the first name.
        self._trained = {name: weight for name, weight in student.named_parameters() if weight.requires_grad}
        # DeepSpeed makes its masters from weights it has rounded to bfloat16.
        exact = {name: weight.detach() for name, weight in self._trained.items()} if settings["bf16"]["enabled"] else {}
        head = list(student.model.get_output_embeddings().parameters())
        offloaded = settings["zero_optimization"].get("offload_optimizer", {}).get("device", "none") != "none"
        self._optimizer = _adamw(self._trained, config.optimizer, ranks.device, offloaded=offloaded)
        with stdout_to_stderr():
            deepspeed.init_distributed()
            try:
                self._engine, *_ = deepspeed.initialize(model=student, optimizer=self._optimizer, config=settings)
            except (deepspeed.DeepSpeedConfigError, ValidationError, AssertionError, ValueError) as error:
                file = config.engine.deepspeed_config
                raise InputError(
                    f"DeepSpeed does not take {file or 'this configuration'}: {_reason(error)}. Correct it, or "
                    f"leave the key out."
                ) from error
        if self._stage == 3:
            self._keep_whole(head)
        if exact:
            self._set_masters(exact)

    def backward(self, batch: Batch, terms: Sequence[ScaledTerm], *, last: bool) -> Tensor:
        with stdout_to_stderr():
            self._engine.set_gradient_accumulation_boundary(last)
            loss, shares = self._engine(lambda student: student.share(batch, terms))
            self._engine.backward(loss * self._ranks.size)
        detached: Tensor = shares.detach()
        return detached

    def step(self, lr: float) -> float:
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        with stdout_to_stderr():
            if self._stage == 0:
                return self._step_unpartitioned()
            self._engine.step()
        grad_norm = float(self._engine.get_global_grad_norm())
        if not self._engine.was_step_applied():
            raise NotFiniteError(grad_norm)
        return grad_norm

    def measure(self, job: Callable[[Any], T]) -> T:
        made: list[T] = []

        def run(student: StudentLoss) -> tuple[()]:
            made.append(job(student.model))
            # DeepSpeed looks for tensors in what a module returns, and fails on what it does not know.
            return ()

        self._engine.eval()
        try:
            with torch.no_grad(), stdout_to_stderr():
                self._engine(run)
        finally:
            self._engine.train()
        return made[0]

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, weight in self._trained.items():
            yield name, self._master(weight)

    def optimizer_state(self) -> Iterator[tuple[str, Tensors]]:
        step = next((state["step"] for state in self._optimizer.state.values() if "step" in state), None)
        if step is not None:
            self._find_moments()
        for name, weight in self._trained.items():
            if step is None:
                yield name, {}
            else:
                moments = {key: self._moment(weight, key) for key in MOMENTS}
                yield name, {"step": torch.tensor(float(step)), **moments}

    def restore(self, weights: Tensors, optimizer: Tensors) -> None:
        self._set_masters(weights)
        self._optimizer.state.clear()
        steps = [float(optimizer[key]) for name in self._trained if (key := f"{name}/step") in optimizer]
        if not steps:
            return
        self._make_moments(max(steps))
        for name, weight in self._trained.items():
            for key in MOMENTS:
                if f"{name}/{key}" in optimizer:
                    self._set(weight, optimizer[f"{name}/{key}"], key)

    def _step_unpartitioned(self) -> float:
        weights = [weight for weight in self._trained.values() if weight.grad is not None]
        grad_norm = float(nn.utils.clip_grad_norm_(weights, self._max_grad_norm))
        if not math.isfinite(grad_norm):
            self._engine.zero_grad()
            raise NotFiniteError(grad_norm)
        self._engine.step()
        return grad_norm

    def _keep_whole(self, weights: Sequence[nn.Parameter]) -> None:
        """Gather some weights once a step, after it, where others are gathered for each module's pass.

        The losses read the head's rows without calling it, in the forward and again in the backward.
        """
        partitioned = self._engine.optimizer
        known = {id(weight) for weight in partitioned.persistent_parameters}
        for weight in weights:
            if id(weight) not in known:
                weight.ds_persist = True  # type: ignore[attr-defined]
                partitioned.persistent_parameters.append(weight)
        partitioned._partition_all_parameters()
        partitioned.persistent_parameters[0].all_gather(partitioned.persistent_parameters)

    def _master(self, weight: nn.Parameter) -> Tensor:
        if self._stage == 0:
            return weight.detach()
        from deepspeed.utils import safe_get_full_fp32_param

        master: Tensor = safe_get_full_fp32_param(weight)
        return master.detach()

    def _moment(self, weight: nn.Parameter, key: str) -> Tensor:
        if self._stage == 0:
            moment: Tensor = self._optimizer.state[weight][key]
            return moment
        from deepspeed.utils import safe_get_full_optimizer_state

        moment = safe_get_full_optimizer_state(weight, key)
        return moment.detach()

    def _set_masters(self, weights: Tensors) -> None:
        """And the weights the student computes with."""
        for name, weight in self._trained.items():
            self._set(weight, weights[name])
        partitioned = self._engine.optimizer
        with torch.no_grad(), stdout_to_stderr():
            if self._stage in (1, 2):
                partitioned.update_lp_params()
            elif self._stage == 3:
                partitioned._partition_all_parameters()
                for group in range(len(partitioned.fp16_groups)):
                    partitioned._reassign_or_swap_out_partitioned_parameters(group)
                partitioned._post_step(set())

    @torch.no_grad()
    def _set(self, weight: nn.Parameter, value: Tensor, moment: str | None = None) -> None:
        """Put this rank's part of a whole tensor into the master weight or one of its moments."""
        if self._stage == 0:
            (weight if moment is None else self._optimizer.state[weight][moment]).copy_(value)
            return
        from deepspeed import utils

        if self._stage < 3:
            if moment is None:
                utils.safe_set_full_fp32_param(weight, value)
            else:
                utils.safe_set_full_optimizer_state(weight, value, moment)
            return
        part = _part(value, weight.partition_numel(), self._ranks.rank)  # type: ignore[attr-defined]
        if moment is None:
            utils.safe_set_local_fp32_param(weight, part)
        else:
            utils.safe_set_local_optimizer_state(weight, part, moment)

    def _make_moments(self, step: float) -> None:
        """Zero moments after so many steps, as AdamW itself makes them at its first."""
        partitioned = self._engine.optimizer
        if self._stage == 3:
            masters = partitioned.fp32_partitioned_groups_flat
        else:
            masters = [master for group in self._optimizer.param_groups for master in group["params"]]
        for master in masters:
            of_torch = isinstance(self._optimizer, torch.optim.AdamW)
            self._optimizer.state[master] = {
                "step": torch.tensor(step, device=master.device) if of_torch else int(step),
                **{key: torch.zeros_like(master) for key in MOMENTS},
            }
        self._find_moments()

    def _find_moments(self) -> None:
        """Tell DeepSpeed where they are: it looks once, when only the first parameter group has any."""
        if self._stage in (1, 2):
            self._engine.optimizer._hp_optimizer_states_linked = False
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()


def _part(value: Tensor, size: int, rank: int) -> Tensor:
    """A rank's part of a tensor that is cut into equal ones, the last filled up with zeros. [size]"""
    part = value.flatten()[rank * size : (rank + 1) * size]
    return nn.functional.pad(part, (0, size - len(part)))


def _adamw(
    parameters: Mapping[str, nn.Parameter], config: OptimizerConfig, device: torch.device, *, offloaded: bool
) -> torch.optim.Optimizer:
    """torch's; DeepSpeed's own for masters that lie in the memory of a GPU's host, where it can be compiled."""
    groups = parameter_groups(parameters, config)
    if offloaded and device.type == "cuda":
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        try:
            with stdout_to_stderr():
                made: torch.optim.Optimizer = DeepSpeedCPUAdam(
                    groups, lr=config.lr, betas=config.betas, eps=config.eps, adamw_mode=True
                )
                return made
        except RuntimeError as error:
            logger.warning("DeepSpeed's CPU optimizer does not build (%s); torch's takes its place.", error)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def _require_known(zero: Mapping[str, Any], file: str | None) -> None:
    """Refuse keys that DeepSpeed would leave aside without a word."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    known = {name for key, field in DeepSpeedZeroConfig.model_fields.items() for name in (key, field.alias)}
    for key in sorted(zero.keys() - known):
        raise InputError(f"{file}: zero_optimization.{key} is no key of DeepSpeed's: correct it, or leave it out.")


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        return "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
    return first_line(error)


def _import_deepspeed(device: torch.device) -> Any:
    """The package, told the device and to write nothing to standard output."""
    # What DeepSpeed guesses: a GPU wherever there is one, and no launcher without these.
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("LOCAL_RANK", "0")
    try:
        with stdout_to_stderr():
            import deepspeed
    except ImportError:
        raise InputError("DeepSpeed is not installed: pip install 'logit-cache[deepspeed]'") from None
    for call in ("all_gather_into_tensor", "reduce_scatter_tensor"):
        warnings.filterwarnings("ignore", f".torch.distributed.{call}. is deprecated", FutureWarning)
    log = deepspeed.utils.logger
    log.setLevel(logging.WARNING)
    for handler in log.handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(sys.stderr)
    # Gloo does without; DeepSpeed would compile it for a minute.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
