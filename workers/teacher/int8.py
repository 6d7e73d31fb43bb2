"""The channel scales of int8 hidden states, and what rounding to them does to the logits.

Both are measured on a pilot, a few sequences spread over the data set: a function of the data alone, so that every
worker finds the same. Half of the pilot sets the scales, the other half measures the error.

A channel's step costs a logit its own size times the head's weight, so a channel that the head weighs more should have
the finer steps; but 127 steps must reach the channel's largest value, or it sets the scale of every row it is large in.
Between scales as the values reach and scales as the inverse weight, the geometric mean ``reach**0.8 * weight**-0.2``
has the least error on SmolLM2, a fifth less than ``reach`` alone; any exponent from 0.7 to 0.9 is as good. The channels
of which reach times weight is largest have a residual, one in 64: 4% more bytes for half the error.

Shape suffixes: N = positions, V = vocabulary, D = hidden size.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from cache_schema.encoding import from_int8, to_int8
from cache_schema.plan import HiddenStates, Plan
from cache_schema.sequence import TokenSequence
from workers.teacher.lm_head import LMHead, chunks
from workers.teacher.teacher import Teacher

_PILOT_SEQUENCES = 16
_MEASURED_POSITIONS = 512
_CHANNELS_PER_RESIDUAL = 64
_REACH_EXPONENT = 0.8
# A residual counts 254ths of a step, so that its channel can have a far coarser scale and still the finer step.
_COARSER = 4.0


def num_residual_channels(size: int) -> int:
    return -(-size // _CHANNELS_PER_RESIDUAL)


def measure_int8(plan: Plan, sequences: Sequence[TokenSequence], teacher: Teacher) -> HiddenStates:
    """The plan's int8 hidden states with their scales, and the logit errors of storing the teacher's so.

    Args:
        sequences: the data set's, in order; prompts alone where the plan lets the teacher respond.

    Raises:
        InputError: a hidden state is not finite.
    """
    assert plan.hidden_states is not None
    set_by_ND, measured_ND = _pilot_states(plan, sequences, teacher)
    with torch.inference_mode():
        scales = _scales(plan.hidden_states, set_by_ND.float().cpu(), _weights(teacher.lm_head).cpu())
        sampled_ND = measured_ND[_spread(len(measured_ND), _MEASURED_POSITIONS)]
        mean, largest = _logit_errors(teacher.lm_head, sampled_ND, scales)
    return scales.model_copy(update={"mean_logit_error": _rounded(mean), "max_logit_error": _rounded(largest)})


def restored(states_ND: Tensor, hidden: HiddenStates) -> Tensor:
    """Hidden states after they have been int8, in their own dtype and on their device, as a reader has them. [N, D]"""
    stored = from_int8(to_int8(states_ND.float().cpu().numpy(), hidden), hidden)
    return torch.from_numpy(stored).to(states_ND.device, states_ND.dtype)


def _pilot_states(plan: Plan, sequences: Sequence[TokenSequence], teacher: Teacher) -> tuple[Tensor, Tensor]:
    """Hidden states that set the scales and others that measure the error. [N, D] each"""
    # Prompts have no trained position.
    positions = plan.positions if plan.responses is None else "all"
    pilot = _spread(len(sequences), _PILOT_SEQUENCES)
    states = [teacher.hidden_states([sequences[index]], positions)[0] for index in pilot]
    if len(states) > 1:
        return torch.cat(states[::2]), torch.cat(states[1::2])
    middle = -(-len(states[0]) // 2)
    # A data set of one position has no other to measure on.
    return states[0][:middle], states[0][middle:] if len(states[0]) > 1 else states[0]


def _scales(hidden: HiddenStates, states_ND: Tensor, weight_D: Tensor) -> HiddenStates:
    """``hidden`` with channel scales and residual channels, its errors still 0."""
    # A row's scale follows its own size, so only the shares of a row count.
    shares_ND = states_ND.abs() / torch.linalg.vector_norm(states_ND, dim=1, keepdim=True).clamp_min(1e-30)
    reach_D, weight_D = _lifted(shares_ND.amax(0)), _lifted(weight_D)
    scale_D = reach_D**_REACH_EXPONENT * weight_D ** (_REACH_EXPONENT - 1)
    residual = torch.argsort(reach_D * weight_D, descending=True, stable=True)[: num_residual_channels(hidden.size)]
    scale_D[residual] *= _COARSER
    scale_D /= scale_D.median()  # so that a row's scale is its typical step
    return HiddenStates(
        dtype="int8",
        size=hidden.size,
        channel_scale=tuple(_rounded(scale) for scale in scale_D.tolist()),
        residual_channels=tuple(sorted(residual.tolist())),
        mean_logit_error=0.0,
        max_logit_error=0.0,
    )


def _weights(head: LMHead) -> Tensor:
    """Norm of each column of the head: what a unit step of that channel does to the logits. [D]"""
    rows = chunks(head.vocab_size, 4 * head.weight_VD.shape[1], head.weight_VD.device)
    squares = [head.weight_VD[part].float().square().sum(0) for part in rows]
    return torch.stack(squares).sum(0).sqrt()


def _lifted(values_D: Tensor) -> Tensor:
    """Values at least a quarter of the median one: a channel that the pilot happened not to use can be used later."""
    above = values_D[values_D > 0]
    return values_D.clamp_min(float(above.median()) / 4) if len(above) else torch.ones_like(values_D)


def _logit_errors(head: LMHead, states_ND: Tensor, hidden: HiddenStates) -> tuple[float, float]:
    """Mean and maximum of |logit of the restored states - logit| over whole rows, in nats."""
    found_ND = restored(states_ND, hidden)
    total, largest = 0.0, 0.0
    for rows in chunks(len(states_ND), 8 * head.vocab_size, states_ND.device):
        difference_CV = (head.logits(found_ND[rows]) - head.logits(states_ND[rows])).abs()
        total += float(difference_CV.double().sum())
        largest = max(largest, float(difference_CV.max()))
    return total / (len(states_ND) * head.vocab_size), largest


def _spread(count: int, wanted: int) -> list[int]:
    """Up to ``wanted`` indexes, evenly spread over ``count``, ascending."""
    indexes: list[int] = np.unique(np.linspace(0, count - 1, min(wanted, count), dtype=int)).tolist()
    return indexes


def _rounded(number: float) -> float:
    """Six digits: enough for a scale, and short in the plan."""
    return float(f"{number:.6g}")
