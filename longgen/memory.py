"""How much memory is free, and how to give back what nobody uses."""

from __future__ import annotations

import gc
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


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an exception means that a GPU or the machine has no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # The CPU's allocator and cuBLAS raise a bare RuntimeError that can only be told by its text.
    text = str(error) if isinstance(error, RuntimeError) else ""
    return "DefaultCPUAllocator" in text or "CUBLAS_STATUS_ALLOC_FAILED" in text


def clear(device: torch.device) -> None:
    """Give memory back that nobody uses.

    Call it after an exception's handler: until that ends, the exception's frames hold the tensors.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
