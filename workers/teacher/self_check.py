"""Is what an engine gives the final-norm hidden states of its checkpoint? Are its own logits logits? Asked once, of the
first batch.

Shape suffixes: N = positions, V = vocabulary, D = hidden size, K = leading ids.
"""

import sys

import numpy as np
import numpy.typing as npt
import psutil
import torch
from torch import Tensor

from cache_schema.plan import Engine, TeacherIdentity
from cache_schema.sequence import TokenSequence
from workers.errors import InputError
from workers.teacher.head_files import FinalNorm
from workers.teacher.lm_head import LMHead
from workers.teacher.transformers_teacher import TransformersTeacher

REFERENCE_TOKENS = 64
"""The transformers engine reads so many tokens of the shortest sequence: what follows changes no causal state."""

_UNIT = 1e-2
_ROUNDING = 1e-3
"""Of a sum of probabilities made of float32 logarithms."""
_NORMALISED = 0.05
"""How far the root mean square before the norm's gain may be from 1: half precision rounds each channel by 2**-9, and
an epsilon takes a little from small states."""
_MEMORY_SHARE = 1 / 8
"""Of the free memory, for the reference's weights: a node may run a worker a GPU, and all check at once."""


def require_not_unit_length(hidden_ND: Tensor, what: str) -> None:
    """Refuse states scaled to length 1, which is what pooling runners return by default.

    Raises:
        InputError: they are.
    """
    lengths_N = torch.linalg.vector_norm(hidden_ND.float(), dim=1)
    if bool(((lengths_N - 1).abs() < _UNIT).all()):
        raise InputError(
            f"{what} gives hidden states of length 1, not those its final norm gives: its pooler normalises them. Use "
            f"another vllm release, or --engine transformers."
        )


def require_final_norm(hidden_ND: Tensor, norm: FinalNorm, what: str) -> None:
    """Refuse states that the checkpoint's final norm cannot have given.

    Raises:
        InputError: with the root mean square that should be 1.
    """
    squares_N = norm.normalised(hidden_ND).square().mean(1).sqrt()
    worst = float(squares_N[(squares_N - 1).abs().argmax()])
    if not abs(worst - 1) <= _NORMALISED:
        raise InputError(
            f"{what} gives hidden states that are not its final norm's output: without the norm's weight their root "
            f"mean square is {worst:.4g}, not 1. Use another vllm release, or --engine transformers; "
            f"--set engine.self_check=false leaves this check out."
        )


def is_quantised(engine: Engine, model_config: dict[str, object]) -> bool:
    """Whether the checkpoint's weights are, or vLLM makes them so while it loads them."""
    return bool(engine.quantization or model_config.get("quantization_config"))


def reason_against_reference(teacher: TeacherIdentity, engine: Engine, model_config: dict[str, object]) -> str | None:
    """Why the transformers engine should not be asked for the same, or None."""
    if is_quantised(engine, model_config):
        return "its weights are quantised"
    wanted = teacher.num_parameters * getattr(torch, teacher.dtype).itemsize
    free = psutil.virtual_memory().available
    if wanted > free * _MEMORY_SHARE:
        return (
            f"its weights take {wanted / 2**30:.1f} GiB, more than an eighth of the {free / 2**30:.0f} GiB of memory "
            f"that is free"
        )
    return None


def say_not_compared(what: str, reason: str) -> None:
    """Tell whoever started the dump which check it goes without."""
    sys.stderr.write(f"self-check: logits of {what} are not compared with the transformers engine: {reason}\n")


def reference_logits(
    model: str, identity: TeacherIdentity, engine: Engine, sequence: TokenSequence, vocab_size: int
) -> Tensor:
    """The transformers engine's whole rows, on the CPU, at the first rows of a sequence. float32 [N, V]

    Args:
        sequence: its first REFERENCE_TOKENS are read.

    Raises:
        InputError: that engine cannot load the model, or a hidden state is not finite.
    """
    beginning = TokenSequence(
        sequence.input_ids[:REFERENCE_TOKENS], sequence.loss_mask[:REFERENCE_TOKENS], sequence.source
    )
    reference = TransformersTeacher(model, identity, engine, vocab_size=vocab_size, device=torch.device("cpu"))
    with torch.inference_mode():
        return reference.lm_head.logits(reference.hidden_states([beginning], "all")[0])


def require_reference(
    model: str,
    identity: TeacherIdentity,
    engine: Engine,
    sequence: TokenSequence,
    hidden_ND: Tensor,
    head: LMHead,
    what: str,
) -> None:
    """Refuse states whose logits are not ``reference_logits``.

    Args:
        hidden_ND: the engine's states at the sequence's first rows, at least REFERENCE_TOKENS where it has as many.

    Raises:
        InputError: they differ by more than rounding explains.
    """
    expected_NV = reference_logits(model, identity, engine, sequence, head.vocab_size)
    with torch.inference_mode():
        given_NV = head.to(torch.device("cpu")).logits(hidden_ND[: len(expected_NV)].cpu())
    require_same_logits(given_NV, expected_NV, identity.dtype, what)


def require_raw_logits(logits_NK: npt.NDArray[np.float32], num_ids: int, what: str) -> None:
    """Refuse log-probabilities in the place of logits.

    The K highest of V probabilities sum to 1 at most and to K / V at least. Logits need not, and hardly will in every
    row.

    Args:
        logits_NK: the K highest of each row.
        num_ids: the engine's own V, padding rows of the head included.

    Raises:
        InputError: they may be log-probabilities.
    """
    masses_N = np.exp(logits_NK.astype(np.float64)).sum(axis=1)
    least = logits_NK.shape[1] / num_ids
    if ((masses_N >= least * (1 - _ROUNDING)) & (masses_N <= 1 + _ROUNDING)).all():
        raise InputError(
            f"{what} gives log-probabilities where raw logits are asked for: use another vllm release, or "
            f"engine.logits=head; --set engine.self_check=false leaves this check out."
        )


def require_same_logits(given_NV: Tensor, expected_NV: Tensor, dtype: str, what: str) -> None:
    """Refuse logits, of all ids or of the same ones, that are further from the reference than ``tolerance_of``.

    Raises:
        InputError: with the difference.
    """
    difference = float((given_NV - expected_NV).abs().max())
    tolerance = tolerance_of(expected_NV, dtype)
    if not difference <= tolerance:
        raise InputError(
            f"{what} gives other logits than the transformers engine: they differ by {difference:.3g}, rounding "
            f"explains {tolerance:.2g}. Use another vllm release, or --engine transformers; "
            f"--set engine.self_check=false leaves this check out."
        )


def tolerance_of(expected_NV: Tensor, dtype: str) -> float:
    """By how much two engines may differ in a logit.

    float32 sums differ by their order alone: 1e-3 at logits of 40, where SmolLM2's differ by 2e-4. In half precision
    each layer's output is rounded, and two engines are as far from each other as from float32: its logits of 43 differ
    by 1.3 in bfloat16, from float32 by 2.5, and may by 5.4.
    """
    largest = float(expected_NV.abs().max())
    if dtype == "float32":
        return 2.5e-5 * max(40.0, largest)
    return 2**-3 * max(1.0, largest)
