"""What the training loop asks of an engine: gradients as a plain sum, one guarded step, state by parameter name.

An engine wraps a ``StudentLoss`` and owns its optimizer. The loss reaches it already divided by the global weight of
the step, so it adds up and never averages: over micro-batches, and over ranks.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from torch import Tensor

from workers.distill.student_loss import StudentLoss
from workers.distill.terms import ScaledTerm
from workers.lookup.batch import Batch

T = TypeVar("T")
Tensors = Mapping[str, Tensor]


class NotFiniteError(ArithmeticError):
    """The gradient holds NaN or infinity; weights and optimizer are those before the step. Raised on every rank."""

    def __init__(self, grad_norm: float) -> None:
        super().__init__(f"the gradient norm is {grad_norm}")
        self.grad_norm = grad_norm


class Engine(Protocol):
    student: StudentLoss
    """Inside whatever wraps it."""

    def backward(self, batch: Batch, terms: Sequence[ScaledTerm], *, last: bool) -> Tensor:
        """Forward and backward of one micro-batch. Every rank calls it equally often in a step.

        Args:
            last: of the step. After it the gradients are the plain sum over all micro-batches and ranks.

        Returns:
            The share of each term, of this rank's batch alone; detached, float32. [S]
        """
        ...

    def step(self, lr: float) -> float:
        """Scale gradients down to ``max_grad_norm``, update the weights, forget the gradients.

        Args:
            lr: of every parameter group.

        Returns:
            The gradients' L2 norm over all ranks, before it was scaled down.

        Raises:
            NotFiniteError: before anything changed.
        """
        ...

    def measure(self, job: Callable[[Any], T]) -> T:
        """What ``job`` makes of the model, without gradients, in evaluation mode; every rank asks equally often.

        Inside, the parameters are as in training: whole, or gathered layer by layer as the model's modules are called.
        """
        ...

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every trained parameter, in one order on all ranks: its name within the student and its float32 weight.

        Whole, on any device, and as they are until the next step. Collective: all ranks run through it together.
        """
        ...

    def optimizer_state(self) -> Iterator[tuple[str, Tensors]]:
        """The same of what the optimizer keeps beside each: ``step``, ``exp_avg``, ...; nothing before the first step.

        Collective.
        """
        ...

    def restore(self, weights: Tensors, optimizer: Tensors) -> None:
        """Put back what these gave; optimizer state by ``name/key``. Mappings may read from disk when asked."""
        ...
