"""Where tensors live."""

import warnings

import torch

from workers.errors import InputError


def resolve_device(name: str, flag: str = "--device") -> torch.device:
    """``auto`` is the first accelerator torch sees, else the CPU.

    Args:
        flag: what the user gave the name with.

    Raises:
        InputError: no such device here, or one that does not compute.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
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


def _unusable(name: str, flag: str, reason: str) -> InputError:
    return InputError(f"{flag} {name} cannot be used here: {reason}. Use {flag} auto.")


def device_name(device: torch.device) -> str:
    """``cpu``, or the accelerator's own name: what a plan records."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
