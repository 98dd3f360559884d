"""What to measure: `Settings`, and those of `--quick`, little enough for a minute on any GPU."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from longgen.bench.providers import Provider
from longgen.bench.timing import Budget, quick_ceiling
from longgen.bench.work import DIRECTIONS, Heads
from longgen.pattern import SparsePattern

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

_CPU_LENGTHS = (1024, 3072)
_GPU_LENGTHS = (32768, 16384, 8192, 4096)
# Queries, keys, values, output and their gradients, two graphs of them, and a kernel's fp32 sums.
_BYTES_PER_ELEMENT = 40
_SECONDS = 40.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Say what to measure.

    Attributes:
        patterns: by the name that `case` gets.
        lengths: tokens.
        providers: who does it.
        directions: "forward", "backward" or both.
        shape: the heads.
        dtype: "bf16", "fp16" or "fp32".
        device: where.
        seed: of inputs and samples.
        budget: how long to measure each.
        matmul_size: side of the matrix product that is the ceiling.
        copy_bytes: size of the copy whose bandwidth is measured.
        seconds: begin nothing new after this time; None is no limit.
    """

    patterns: dict[str, SparsePattern]
    lengths: tuple[int, ...]
    providers: tuple[Provider, ...]
    shape: Heads
    device: torch.device
    directions: tuple[str, ...] = DIRECTIONS
    dtype: str = "bf16"
    seed: int = 0
    budget: Budget = field(default_factory=Budget)
    matmul_size: int = 8192
    copy_bytes: int = 1 << 32
    seconds: float | None = None


def quick_settings(settings: Settings, *, keep_lengths: bool) -> Settings:
    """Return settings that measure less.

    Args:
        settings: what was asked for.
        keep_lengths: whether the lengths were given by the user.
    """
    lengths = settings.lengths
    ceiling = quick_ceiling(settings.device, DTYPES[settings.dtype], rounds=2)
    if settings.device.type != "cuda":
        return replace(settings, lengths=lengths if keep_lengths else _CPU_LENGTHS, **ceiling)
    if not keep_lengths:
        free, _ = torch.cuda.mem_get_info(settings.device)
        shape = settings.shape
        per_token = (shape.heads + shape.kv_heads) * shape.head_dim * _BYTES_PER_ELEMENT
        lengths = (next((n for n in _GPU_LENGTHS if n * per_token < free // 2), _GPU_LENGTHS[-1]),)
    return replace(settings, lengths=lengths, seconds=_SECONDS, **ceiling)
