"""Where tensors live."""

import os
import warnings

import torch

from workers.errors import InputError

_CPU = torch.device("cpu")


def resolve_device(name: str, flag: str = "--device") -> torch.device:
    """``auto`` is an accelerator torch sees, else the CPU. Of several GPUs this process's own, also for ``cuda``.

    Args:
        flag: what the user gave the name with.

    Raises:
        InputError: no such device here, or one that does not compute.
    """
    if name in ("auto", "cuda") and torch.cuda.is_available():
        return torch.device("cuda", _local_rank() % torch.cuda.device_count())
    if name == "auto":
        return _CPU
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of device types that torch is giving up
            device = torch.device(name)
    except RuntimeError:
        raise _unusable(name, flag, "torch knows no device of that name (cpu, cuda, cuda:1, ...)") from None
    try:
        one_11 = torch.ones((1, 1), device=device)
        (one_11 @ one_11).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        sentence = str(error).split("\n")[0].split(". ")[0].rstrip(".")
        raise _unusable(name, flag, f"it does not compute ({sentence})") from None
    return device


def _local_rank() -> int:
    """The number of this process on its machine, by torchrun or Slurm; 0 without them."""
    rank = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or "0"
    return int(rank) if rank.isdecimal() else 0


def _unusable(name: str, flag: str, reason: str) -> InputError:
    return InputError(f"{flag} {name} cannot be used here: {reason}. Use {flag} auto.")


def device_name(device: torch.device) -> str:
    """``cpu``, or the accelerator's own name: what a plan records."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
