"""The student, and the module that maps a batch to its loss.

Shape suffixes: B = sequences, T = tokens, N = positions, C = positions of a chunk, D = hidden size, V = vocabulary,
K = the teacher's leading ids, M = all chosen ids.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from workers.distill.sparse_head import logits_at, row_loss, student_top_k
from workers.errors import InputError
from workers.lookup.batch import Batch, Part, TeacherPositions
from workers.lookup.ladder import Ladder
from workers.losses.catalogue import Loss, Params
from workers.losses.targets import Targets, TopK
from workers.teacher.checkpoint import body_of, load_model, require_finite
from workers.teacher.lm_head import head_of


@dataclass(frozen=True)
class Term:
    """One loss on one part of the positions."""

    part: Part
    loss: Loss
    params: Params


class StudentLoss(nn.Module):
    """A student with its loss as one module: what DDP or DeepSpeed would wrap, so no parameter is used behind it."""

    def __init__(
        self, model: Any, ladders: Sequence[Ladder], terms: Sequence[Term], *, vocab_size: int, autocast: bool
    ) -> None:
        super().__init__()
        self.model = model
        self._ladders = tuple(ladders)
        self._terms = tuple(terms)
        self._vocab_size = vocab_size
        self._autocast = autocast

    def forward(self, batch: Batch, counts: dict[Part, int]) -> tuple[Tensor, Tensor]:
        """The batch's share of the step's loss: each term's sum divided by its positions in the whole step.

        Args:
            counts: trained positions of each part over all micro-batches and ranks of the step.

        Returns:
            The differentiable loss (scalar) and the detached share of each term [num_terms].
        """
        with torch.autocast(batch.input_ids_BT.device.type, torch.bfloat16, enabled=self._autocast):
            # No attention mask: the padding is on the right, where a causal model cannot look.
            body = body_of(self.model)
            hidden_BTD = body(input_ids=batch.input_ids_BT, use_cache=False).last_hidden_state
        shares = []
        for term in self._terms:
            positions = batch.parts[term.part]
            hidden_ND = hidden_BTD[positions.sequence_of_N, positions.token_of_N]
            if self._autocast:
                # Autocast leaves the final norm's output in float32; the head's matmuls are a small model's largest.
                hidden_ND = hidden_ND.to(torch.bfloat16)
            weight = 1.0 / max(counts[term.part], 1)
            shares.append(self._term_share(term, positions, hidden_ND, weight, self._ladders[batch.cache]))
        return torch.stack(shares).sum(), torch.stack(shares).detach()

    def _term_share(
        self, term: Term, positions: TeacherPositions, hidden_ND: Tensor, weight: float, ladder: Ladder
    ) -> Tensor:
        if len(positions) == 0:
            return hidden_ND.sum() * 0.0
        head = head_of(self.model, self._vocab_size)
        if term.loss.student_row:
            return row_loss(head, hidden_ND, self._values_on_rows(term, positions, ladder), weight)[0]
        # The logits of both leaders' ids in one pass over the head; a half the loss does not use has no ids.
        k = int(term.params["k"])
        teacher_ids_NK = positions.token_ids_NK[:, : k if "top_k" in term.loss.needs else 0]
        student_ids_NK = positions.token_ids_NK[:, :0]
        if "lookups" in term.loss.needs:
            student_ids_NK = student_top_k(head, hidden_ND, k)
        chosen_NM = logits_at(head, hidden_ND, torch.cat([teacher_ids_NK, student_ids_NK], dim=1))
        at_teacher_NK, at_student_NK = chosen_NM.tensor_split([teacher_ids_NK.shape[1]], dim=1)

        def ahead(num_ids: int) -> Tensor:
            return student_top_k(head, hidden_ND, min(num_ids, self._vocab_size))

        targets = Targets(
            teacher_led=TopK(positions.logits_NK[:, : teacher_ids_NK.shape[1]], at_teacher_NK),
            student_led=TopK(ladder.logits_at(positions, student_ids_NK, ahead), at_student_NK),
        )
        return term.loss.values(targets, term.params).sum() * weight

    def _values_on_rows(self, term: Term, positions: TeacherPositions, ladder: Ladder) -> Any:
        def values_of(student_CV: Tensor, chunk: slice) -> Tensor:
            teacher_CV = ladder.rows(positions, chunk) if "full_row" in term.loss.needs else None
            labels_C = positions.labels_N[chunk]
            targets = Targets(student_row_NV=student_CV, teacher_row_NV=teacher_CV, labels_N=labels_C)
            return term.loss.values(targets, term.params)

        return values_of


def load_student(model: str, layers: Sequence[int] | None, *, gradient_checkpointing: bool) -> Any:
    """A student in float32, in training mode; of some of the model's layers if ``layers`` says so.

    Raises:
        InputError: the model does not load, holds NaN, or has no such layers.
    """
    student = load_model(model, torch.float32)
    require_finite(model, student)
    if layers is not None:
        keep_layers(student, layers)
    if gradient_checkpointing:
        student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return student.train()


def require_layers(layers: Sequence[int], depth: int) -> None:
    """Refuse indexes that are not ascending, each once, within a model of ``depth`` layers.

    Raises:
        InputError: says which there are.
    """
    if not layers or list(layers) != sorted(set(layers)) or layers[0] < 0 or layers[-1] >= depth:
        raise InputError(
            f"--student-layers {','.join(map(str, layers))}: give ascending indexes from 0 to {depth - 1}, each once "
            f"(the model has {depth} layers)."
        )


def keep_layers(model: Any, layers: Sequence[int]) -> None:
    """Cut a model down, in place, to some of its decoder layers; embeddings, final norm and head stay.

    Layer indexes are renumbered and the config's per-layer lists cut, so that the result saves and loads as a plain
    model of fewer layers.

    Raises:
        InputError: an index is outside the model, repeated, or out of order; or the config cannot say what is left.
    """
    config = model.config.get_text_config()
    depth = config.num_hidden_layers
    require_layers(layers, depth)
    body = body_of(model)
    stacks = [(name, child) for name, child in body.named_children() if _is_stack(child, depth)]
    if len(stacks) != 1:
        raise InputError(f"{type(model).__name__}: no single stack of {depth} layers found to take layers from.")
    name, stack = stacks[0]
    kept = nn.ModuleList(stack[index] for index in layers)
    module: Any
    for index, layer in enumerate(kept):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index
    setattr(body, name, kept)
    for key, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == depth and not key.endswith("token_id"):
            setattr(config, key, [value[index] for index in layers])
    config.num_hidden_layers = len(layers)
    _require_plain(model)


def _require_plain(model: Any) -> None:
    """Refuse a model that its own config would not build again, such as one that names layers by their index."""
    with torch.device("meta"):
        plain = type(model)(copy.deepcopy(model.config))
    shapes, wanted = ({name: tensor.shape for name, tensor in m.state_dict().items()} for m in (plain, model))
    if shapes != wanted:
        name = min(key for key in shapes.keys() | wanted.keys() if shapes.get(key) != wanted.get(key))
        raise InputError(
            f"{type(model).__name__}: with these --student-layers its config no longer describes its layers ({name} "
            f"differs). Keep other layers, or give a smaller --student."
        )


def _is_stack(module: nn.Module, depth: int) -> bool:
    return isinstance(module, nn.ModuleList) and len(module) == depth
