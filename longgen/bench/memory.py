"""How much memory tensors take where something is measured."""

from __future__ import annotations

import torch


def allocated_bytes(device: torch.device) -> int | None:
    """Return the bytes of all tensors on a GPU; None elsewhere."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else None


def restart_peak(device: torch.device) -> None:
    """Begin to look for the peak of `allocated_bytes` anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int | None:
    """Return the peak of `allocated_bytes` since `restart_peak`; None elsewhere than on a GPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
