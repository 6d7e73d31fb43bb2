"""The engine of plain torch: one process, or several with DistributedDataParallel; parameters whole on every rank."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from workers.distill.config import DistillConfig
from workers.distill.engines.engine import NotFiniteError, T, Tensors
from workers.distill.engines.optimizer import make_optimizer, restored, stored, update_ema
from workers.distill.student_loss import StudentLoss
from workers.distill.terms import ScaledTerm
from workers.lookup.batch import Batch
from workers.ranks import Ranks


class TorchEngine:
    """See ``workers.distill.engines.engine.Engine``."""

    def __init__(self, student: StudentLoss, config: DistillConfig, ranks: Ranks) -> None:
        self.student = student
        self._ranks = ranks
        self._dtype = config.dtype
        self._config = config.optimizer
        self._wrapped = self._wrap(student)
        self._parameters = {name: p for name, p in student.named_parameters() if p.requires_grad}
        self._optimizer = make_optimizer(self._parameters, self._config)

    def _wrap(self, student: StudentLoss) -> nn.Module:
        student.to(self._ranks.device)
        if self._ranks.size == 1:
            return student
        wrapped = DistributedDataParallel(student, forward_sync_buffers=False, gradient_as_bucket_view=True)
        wrapped.register_comm_hook(None, _added_up)
        return wrapped

    def backward(self, batch: Batch, terms: Sequence[ScaledTerm], *, last: bool) -> Tensor:
        with self._round(last):
            loss, shares = self._wrapped(lambda student: student.share(batch, terms))
            loss.backward()
        detached: Tensor = shares
        return detached

    def _round(self, last: bool) -> AbstractContextManager[Any]:
        """What a micro-batch runs in: gradients travel with the last one of a step."""
        if last or not isinstance(self._wrapped, DistributedDataParallel):
            return nullcontext()
        return self._wrapped.no_sync()

    def step(self, lr: float) -> float:
        gradients = [_own_part(p.grad) for p in self._parameters.values() if p.grad is not None]
        grad_norm = math.sqrt(self._over_ranks(_squared_norm(gradients)))
        if not math.isfinite(grad_norm):
            self._optimizer.zero_grad(set_to_none=True)
            raise NotFiniteError(grad_norm)
        if grad_norm > self._config.max_grad_norm:
            torch._foreach_mul_(gradients, self._config.max_grad_norm / grad_norm)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        if self._config.ema_decay is not None:
            update_ema(self._optimizer, self._config.ema_decay)
        return grad_norm

    def _over_ranks(self, squared_norm: float) -> float:
        """Of the gradients on all ranks; here each has all of them."""
        return squared_norm

    def measure(self, job: Callable[[Any], T]) -> T:
        self.student.eval()
        with torch.no_grad():
            result: T = self.student(lambda student: job(student.model))
        self.student.train()
        return result

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self._parameters.items():
            yield name, _whole(parameter.detach())

    def optimizer_state(self) -> Iterator[tuple[str, Tensors]]:
        for name, parameter in self._parameters.items():
            state = self._optimizer.state.get(parameter, {})
            yield name, {key: _whole(stored(value)) for key, value in state.items()}

    def restore(self, weights: Tensors, optimizer: Tensors) -> None:
        keys_of: dict[str, list[str]] = {}
        for place in optimizer:
            name, _, key = place.rpartition("/")
            keys_of.setdefault(name, []).append(key)
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(_as_held(parameter, weights[name]))
                if keys := keys_of.get(name):  # a parameter that never had a gradient has no state
                    self._optimizer.state[parameter] = {
                        key: restored(self._optimizer, parameter, _as_held(parameter, optimizer[f"{name}/{key}"]))
                        for key in keys
                    }


def _squared_norm(gradients: Sequence[Tensor]) -> float:
    """Row by row: on a CPU torch adds up a norm in one float32, which over millions of numbers comes out too low."""
    norms = [torch.linalg.vector_norm(torch.linalg.vector_norm(gradient, dim=-1)) for gradient in gradients]
    return float(torch.stack(norms).double().square().sum()) if norms else 0.0


def _own_part(tensor: Tensor) -> Tensor:
    """What of it lies on this rank, to read and to write."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _whole(tensor: Tensor) -> Tensor:
    """Put together from all ranks, where each holds a shard."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _as_held(parameter: nn.Parameter, whole: Tensor) -> Tensor:
    """This rank's shard, where the parameter is held in shards."""
    if not isinstance(parameter, DTensor) or whole.shape != parameter.shape:
        return whole
    on_device = whole.to(parameter.device)
    return distribute_tensor(on_device, parameter.device_mesh, parameter.placements, src_data_rank=None)


def _added_up(_: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
    """In the place of DDP's mean: the loss is divided by the global count before."""
    reduced: torch.futures.Future[list[Tensor]] = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
    return reduced.then(lambda future: future.value()[0])
