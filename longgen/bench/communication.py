"""What of a step is communication between GPUs, and what of that nothing else hides."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

# NCCL's kernels: ncclDevKernel_AllGather_RING_LL and the like. SendRecv is of all-to-all as well.
_KERNEL = re.compile(r"nccl(?:\w*Kernel_([A-Za-z]+))?", re.IGNORECASE)

Interval = tuple[float, float]


class Communication(NamedTuple):
    """Hold seconds of a step: with NCCL's kernels on the GPU, their waiting for other ranks
    included, and with nothing else beside them.

    Attributes:
        seconds, exposed_seconds: of all together.
        kinds: both of each kind of kernel alone, by NCCL's names of them.
    """

    seconds: float
    exposed_seconds: float
    kinds: dict[str, tuple[float, float]]


def profile_communication(run: Callable[[], Any]) -> Communication:
    """Run a step on this process's GPU under PyTorch's profiler."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        run()
        torch.cuda.synchronize()
    on_device = torch.autograd.DeviceType.CUDA
    return communication_of(
        (event.name, event.time_range.start / 1e6, event.time_range.end / 1e6)
        for event in profile.events() or ()
        if event.device_type == on_device
    )


def communication_of(kernels: Iterable[tuple[str, float, float]]) -> Communication:
    """Add up communication among kernels: name, begin and end in seconds each."""
    ours: dict[str, list[Interval]] = {}
    others: list[Interval] = []
    for name, begin, end in kernels:
        found = _KERNEL.search(name)
        kind = others if found is None else ours.setdefault(found[1] or "other", [])
        kind.append((begin, end))
    alone = _length(others)

    def of(intervals: list[Interval]) -> tuple[float, float]:
        return _length(intervals), _length([*intervals, *others]) - alone

    every = of([interval for intervals in ours.values() for interval in intervals])
    return Communication(*every, {kind: of(ours[kind]) for kind in sorted(ours)})


def _length(intervals: list[Interval]) -> float:
    """Return the length of the union of intervals."""
    total, until = 0.0, float("-inf")
    for begin, end in sorted(intervals):
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total
