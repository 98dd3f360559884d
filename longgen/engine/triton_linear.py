"""One token's products with weights in Triton, with the norm before and the residual behind.

Each program owns a few rows and reads them from end to end. Weights depend on no other kernel:
where the GPU can (programmatic dependent launch, from Hopper on) a program has its first ones under
way before the kernel ahead of it is done.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from longgen.engine.kernels import launch_options
from longgen.engine.linear import Norm


class Tuning(NamedTuple):
    """Hold the rows of a program, the numbers of each that it reads at a time, and its warps."""

    rows: int
    block: int
    num_warps: int


# Of 42 combinations for the products of Llama-2-7B most run at the speed of a copy on an H100; on
# an H200 these were the fastest of six in the model (docs/experiments.md).
TUNING, GATED_TUNING = Tuning(4, 2048, 8), Tuning(1, 4096, 8)


@triton.jit
def _project(
    x_ptr: tl.tensor,
    norm_ptr: tl.tensor,
    w0_ptr: tl.tensor,
    w1_ptr: tl.tensor,
    w2_ptr: tl.tensor,
    b0_ptr: tl.tensor,
    b1_ptr: tl.tensor,
    b2_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    out_ptr: tl.tensor,
    eps: tl.tensor,
    rows0: tl.tensor,
    rows1: tl.tensor,
    K: tl.constexpr,
    WEIGHTS: tl.constexpr,
    GATED: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
) -> None:
    """Multiply ROWS rows of one of the weights, or of gate and up, with the token."""
    begin = tl.program_id(0) * ROWS
    row, w_ptr, b_ptr = begin, w0_ptr, b0_ptr
    if WEIGHTS > 1:
        second = begin >= rows0
        row = tl.where(second, begin - rows0, begin)
        w_ptr = tl.where(second, w1_ptr, w0_ptr)
        b_ptr = tl.where(second, b1_ptr, b0_ptr)
    if WEIGHTS > 2:
        third = begin >= rows0 + rows1
        row = tl.where(third, begin - rows0 - rows1, row)
        w_ptr = tl.where(third, w2_ptr, w_ptr)
        b_ptr = tl.where(third, b2_ptr, b_ptr)
    index = tl.arange(0, ROWS)
    k = tl.arange(0, BLOCK)
    at = (row + index).to(tl.int64)[:, None] * K + k[None, :]
    w = tl.load(w_ptr + at, mask=(k < K)[None, :], other=0.0, eviction_policy="evict_first")
    if GATED:
        u = tl.load(w1_ptr + at, mask=(k < K)[None, :], other=0.0, eviction_policy="evict_first")
    if OVERLAPS:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    other = tl.zeros((ROWS, BLOCK), tl.float32)
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in tl.static_range(0, K, BLOCK):
        exists = start + k < K
        if start > 0:
            some = exists[None, :]
            w = tl.load(w_ptr + at + start, mask=some, other=0.0, eviction_policy="evict_first")
            if GATED:
                u = tl.load(
                    w1_ptr + at + start, mask=some, other=0.0, eviction_policy="evict_first"
                )
        x = tl.load(x_ptr + start + k, mask=exists, other=0.0).to(tl.float32)
        if HAS_NORM:
            squares += x * x
            x *= tl.load(norm_ptr + start + k, mask=exists, other=0.0).to(tl.float32)
        total += w.to(tl.float32) * x[None, :]
        if GATED:
            other += u.to(tl.float32) * x[None, :]
    factor = 1.0
    if HAS_NORM:
        factor = tl.rsqrt(tl.sum(squares, 0) / K + eps)
    y = tl.sum(total, 1) * factor
    if GATED:
        y = y / (1.0 + tl.exp(-y)) * (tl.sum(other, 1) * factor)
    if HAS_BIAS:
        y += tl.load(b_ptr + row + index).to(tl.float32)
    if HAS_RESIDUAL:
        y += tl.load(residual_ptr + begin + index).to(tl.float32)
    tl.store(out_ptr + begin + index, y.to(out_ptr.dtype.element_ty))


def _rows(most: int, counts: Sequence[int]) -> int:
    """Return the rows of a program: a power of two that divides all counts."""
    rows = most
    while any(count % rows for count in counts):
        rows //= 2
    return rows


def matvec(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    *,
    norm: Norm | None = None,
    residual: torch.Tensor | None = None,
    gated: bool = False,
    tuning: Tuning | None = None,
    overlaps: bool | None = None,
) -> torch.Tensor:
    """See `linear.project`, and `linear.project_gated` for `gated`.

    Args:
        tuning: None takes this module's.
        overlaps: whether kernels may begin before the one ahead is done; None asks the device.
    """
    assert len(x) == 1 and x.is_contiguous() and all(w.is_contiguous() for w in weights)
    given = [bias for bias in biases if bias is not None]
    assert len(given) in (0, len(weights))
    size, counts = x.shape[1], [len(w) for w in weights]
    if tuning is None:
        tuning = GATED_TUNING if gated else TUNING
    total = counts[0] if gated else sum(counts)
    rows = _rows(tuning.rows, counts)
    out = torch.empty(1, total, dtype=x.dtype, device=x.device)
    _project[(total // rows,)](
        x,
        x if norm is None else norm.weight,
        # What isn't read is any tensor.
        *(*weights, x, x)[:3],
        *(*given, x, x, x)[:3],
        x if residual is None else residual,
        out,
        0.0 if norm is None else norm.eps,
        counts[0],
        counts[1] if len(counts) > 1 else 0,
        K=size,
        WEIGHTS=1 if gated else len(weights),
        GATED=gated,
        HAS_NORM=norm is not None,
        HAS_BIAS=bool(given),
        HAS_RESIDUAL=residual is not None,
        ROWS=rows,
        BLOCK=min(tuning.block, triton.next_power_of_2(size)),
        num_warps=tuning.num_warps,
        **launch_options(x.device, overlaps),
    )
    return out
