"""Is what an engine gives the final-norm hidden states of its checkpoint? Asked once, of the first batch.

Shape suffixes: N = positions, V = vocabulary, D = hidden size.
"""

import psutil
import torch
from torch import Tensor

from cache_schema.manifest import Engine, TeacherIdentity
from cache_schema.sequence import TokenSequence
from workers.errors import InputError
from workers.teacher.head_files import FinalNorm
from workers.teacher.lm_head import LMHead
from workers.teacher.transformers_teacher import TransformersTeacher

REFERENCE_TOKENS = 64
"""The transformers engine reads so many tokens of the shortest sequence: what follows changes no causal state."""

_UNIT = 1e-2
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


def reason_against_reference(teacher: TeacherIdentity, engine: Engine, model_config: dict[str, object]) -> str | None:
    """Why the transformers engine should not be asked for the same, or None."""
    if engine.quantization or model_config.get("quantization_config"):
        return "its weights are quantised"
    wanted = teacher.num_parameters * getattr(torch, teacher.dtype).itemsize
    free = psutil.virtual_memory().available
    if wanted > free * _MEMORY_SHARE:
        return (
            f"its weights take {wanted / 2**30:.1f} GiB, more than an eighth of the {free / 2**30:.0f} GiB of memory "
            f"that is free"
        )
    return None


def require_reference(
    model: str,
    identity: TeacherIdentity,
    engine: Engine,
    sequence: TokenSequence,
    hidden_ND: Tensor,
    head: LMHead,
    what: str,
) -> None:
    """Refuse states whose logits are not those of the transformers engine on the CPU.

    Args:
        sequence: its first REFERENCE_TOKENS are read.
        hidden_ND: the engine's states at its first rows, at least as many.

    Raises:
        InputError: they differ by more than rounding explains.
    """
    cpu = torch.device("cpu")
    beginning = TokenSequence(
        sequence.input_ids[:REFERENCE_TOKENS], sequence.loss_mask[:REFERENCE_TOKENS], sequence.source
    )
    reference = TransformersTeacher(model, identity, engine, vocab_size=head.vocab_size, device=cpu)
    with torch.inference_mode():
        expected_NV = reference.lm_head.logits(reference.hidden_states([beginning], "all")[0])
        given_NV = head.to(cpu).logits(hidden_ND[: len(expected_NV)].cpu())
    require_same_logits(given_NV, expected_NV, identity.dtype, what)


def require_same_logits(given_NV: Tensor, expected_NV: Tensor, dtype: str, what: str) -> None:
    """Refuse logits that are further from the reference than ``tolerance_of``.

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
