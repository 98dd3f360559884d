"""What `--quick` measures: little enough for a minute on any GPU, or seconds on a CPU."""

from __future__ import annotations

from dataclasses import replace

import torch

from longgen.bench.attention import DTYPES, Settings
from longgen.bench.timing import Budget

_CPU_LENGTHS = (1024, 3072)
_GPU_LENGTHS = (32768, 16384, 8192, 4096)
# Queries, keys, values, output and their gradients, two graphs of them, and a kernel's fp32 sums.
_BYTES_PER_ELEMENT = 40
_SECONDS = 40.0


def quick_settings(settings: Settings, *, keep_lengths: bool) -> Settings:
    """Return settings that measure less.

    Args:
        settings: what was asked for.
        keep_lengths: whether the lengths were given by the user.
    """
    lengths = settings.lengths
    if settings.device.type != "cuda":
        return replace(
            settings,
            lengths=lengths if keep_lengths else _CPU_LENGTHS,
            budget=Budget(warmup_ms=5.0, repeat_ms=20.0, least=2, rounds=2),
            matmul_size=512,
            copy_bytes=1 << 24,
        )
    free, _ = torch.cuda.mem_get_info(settings.device)
    if not keep_lengths:
        shape = settings.shape
        per_token = (shape.heads + shape.kv_heads) * shape.head_dim * _BYTES_PER_ELEMENT
        lengths = (next((n for n in _GPU_LENGTHS if n * per_token < free // 2), _GPU_LENGTHS[-1]),)
    return replace(
        settings,
        lengths=lengths,
        budget=Budget(warmup_ms=50.0, repeat_ms=100.0, least=4, rounds=2),
        # fp32 has no tensor cores on most cards: the same product would take seconds.
        matmul_size=8192 if DTYPES[settings.dtype].itemsize == 2 else 4096,
        copy_bytes=min(1 << 30, free // 8),
        seconds=_SECONDS,
    )
