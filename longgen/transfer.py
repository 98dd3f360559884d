"""Numbers that the host works out, sent to the device without waiting for it."""

from __future__ import annotations

import torch


def to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a copy of a host tensor on a device; the copy is queued behind what runs there."""
    if device.type != "cuda" or not x.numel():
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)
