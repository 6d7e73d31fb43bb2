"""The processes of one run: which of them this one is, and what they tell each other."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from workers.device import resolve_device
from workers.errors import InputError

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among those of its run. One alone needs no process group.

    What is called collective must be called by all ranks, in the same order.
    """

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes the run's directory."""
        return self.rank == 0

    def sums(self, numbers: Sequence[float]) -> list[float]:
        """Each number added up over the ranks, in float64. Collective."""
        if self.size == 1:
            return [float(number) for number in numbers]
        total = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        added: list[float] = total.tolist()
        return added

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in the order of the ranks. Collective."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def together(self, work: Callable[[], T]) -> T:
        """Do what may be refused on any rank: where one refuses, all stop, and one of them says why. Collective.

        Raises:
            Exception: on the first rank that raised, what it raised.
            SystemExit: 1 on the others.
        """
        if self.size == 1:
            return work()
        result: Any = None
        error: Exception | None = None
        try:
            result = work()
        except Exception as raised:
            error = raised
        failed = [rank for rank, has_failed in enumerate(self.gather(error is not None)) if has_failed]
        if not failed:
            return result  # type: ignore[no-any-return]
        if error is not None and failed[0] == self.rank:
            raise error
        raise SystemExit(1)

    def refuse(self, error: Exception) -> NoReturn:
        """Stop with what every rank has raised; one of them says it.

        Raises:
            Exception: that, on the first rank.
            SystemExit: 1 on the others.
        """
        if self.is_first:
            raise error
        raise SystemExit(1) from error

    def from_first(self, make: Callable[[], T]) -> T:
        """What the first rank makes, for all of them; ``together``. Collective."""
        made = self.together(lambda: make() if self.is_first else None)
        return self.gather(made)[0]  # type: ignore[return-value]

    def wait(self) -> None:
        """Until all ranks are here. Collective."""
        self.sums([0.0])


@contextmanager
def joined(device_name: str, *, needs_group: bool = False) -> Iterator[Ranks]:
    """Join the processes that torchrun or ``deepspeed`` started beside this one; or be alone.

    Args:
        needs_group: whether one process alone shall have a process group too.

    Raises:
        InputError: no such device, or more processes on this machine than accelerators.
    """
    device, size = resolve_device(device_name), int(os.environ.get("WORLD_SIZE", "1"))
    # transformers imports an installed DeepSpeed when it saves, which would print a guess of this to standard output.
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    if size == 1 and not needs_group:
        yield Ranks(device)
        return
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)  # torchrun; deepspeed
    if device.type == "cuda":
        if local_size > 1 and device_name not in ("auto", "cuda"):
            raise InputError(
                f"--device {device_name} is one for all {local_size} ranks of this machine: leave it out, and each "
                f"takes its own."
            )
        if local_size > torch.cuda.device_count():
            raise InputError(
                f"{local_size} processes were started on a machine of {torch.cuda.device_count()} GPUs: start as many "
                f"as it has (--nproc-per-node), or give --device cpu."
            )
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if size == 1:
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    else:
        # Long enough for a rank to save a large student; of one that died, the launcher tells the others.
        dist.init_process_group(backend, timeout=timedelta(hours=1))
    ranks, is_left = Ranks(device, dist.get_rank(), dist.get_world_size()), False
    try:
        yield ranks
        ranks.wait()  # one that leaves while another still reads from it aborts that
        is_left = True
    finally:
        # Not after an error: the others would be waited for, who wait in a collective until their launcher ends them.
        if is_left or size == 1:
            dist.destroy_process_group()
