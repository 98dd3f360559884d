"""Numbers that the host works out, sent to the device without waiting for it."""

from __future__ import annotations

import torch


def to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor on a device; the copy of one of the host is queued behind what runs there."""
    if x.device.type != "cpu" or device.type != "cuda" or not x.numel():
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)
