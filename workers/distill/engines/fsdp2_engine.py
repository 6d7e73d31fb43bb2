"""The engine of torch's FSDP2: parameters, gradients and optimizer state in shards, one on each rank."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from workers.distill.engines.engine import T
from workers.distill.engines.torch_engine import TorchEngine
from workers.distill.student_loss import StudentLoss
from workers.errors import InputError


class FSDP2Engine(TorchEngine):
    """Every layer is gathered when it runs; embeddings, final norm and head once a step.

    In bfloat16 what is gathered is bfloat16, of float32 shards, and gradients are added up in float32.
    """

    def _wrap(self, student: StudentLoss) -> nn.Module:
        bfloat16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        policy = bfloat16 if self._dtype == "bfloat16" else MixedPrecisionPolicy()
        mesh = init_device_mesh(self._ranks.device.type, (self._ranks.size,))
        kinds = set(student.model._no_split_modules or ())
        layers = [module for module in student.model.modules() if type(module).__name__ in kinds]
        if not layers:
            raise InputError(
                f"engine.name=fsdp2: transformers names no layers of {type(student.model).__name__} to gather one by "
                f"one: choose --engine deepspeed --zero-stage 3, or torch."
            )
        for layer in layers:
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(student, mesh=mesh, mp_policy=policy)
        for module in student.modules():
            if isinstance(module, FSDPModule):
                # A plain sum: the loss is divided by the global count before.
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        return student

    @contextmanager
    def _round(self, last: bool) -> Iterator[None]:
        assert isinstance(self.student, FSDPModule)
        # The root's own parameters, head and embeddings among them, are kept gathered until the step's last backward.
        self.student.set_reshard_after_backward(last, recurse=False)
        yield

    def _over_ranks(self, squared_norm: float) -> float:
        return self._ranks.sums([squared_norm])[0]

    def measure(self, job: Callable[[Any], T]) -> T:
        result = super().measure(job)
        assert isinstance(self.student, FSDPModule)
        self.student.reshard()
        return result
