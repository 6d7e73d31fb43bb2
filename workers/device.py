"""Where tensors live."""

import torch

from workers.errors import InputError


def resolve_device(name: str) -> torch.device:
    """``auto`` is the first accelerator torch sees, else the CPU.

    Raises:
        InputError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0]
        raise InputError(f"--device {name} cannot be used here: {reason}. Use --device auto.") from None
    return device


def device_name(device: torch.device) -> str:
    """``cpu``, or the accelerator's own name: what a plan records."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
