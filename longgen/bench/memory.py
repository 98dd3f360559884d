"""How much memory is free and in use where something is measured."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch


def free_bytes(device: torch.device) -> int:
    """Return the bytes of memory that are free: the card's, or the machine's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo.read_text("ascii"), re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])


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
