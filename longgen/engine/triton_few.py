"""Products of a few tokens with weights in Triton, on tensor cores: as many tokens as a tile takes
cost what one costs, the reading of weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from longgen.engine.kernels import launch_options
from longgen.engine.linear import Norm
from longgen.engine.triton_linear import Operands

# The smallest side of a tile that tensor cores take, and so the most tokens at a time.
MOST_TOKENS = 16


class Tuning(NamedTuple):
    """Hold the rows of weights of a program, the numbers of each that it reads at a time, its
    warps, and the blocks that it has under way."""

    rows: int
    block: int
    num_warps: int
    num_stages: int


TUNING, GATED_TUNING = Tuning(16, 256, 4, 5), Tuning(16, 256, 4, 4)


@triton.jit
def _norm(
    x_ptr: tl.tensor,
    norm_ptr: tl.tensor,
    out_ptr: tl.tensor,
    eps: tl.tensor,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
) -> None:
    """Norm one token."""
    if OVERLAPS:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    at = tl.program_id(0) * K
    k = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at + k, mask=k < K, other=0.0).to(tl.float32)
    x *= tl.rsqrt(tl.sum(x * x, 0) / K + eps)
    x *= tl.load(norm_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    tl.store(out_ptr + at + k, x.to(out_ptr.dtype.element_ty), mask=k < K)


@triton.jit
def _project(
    x_ptr: tl.tensor,
    w0_ptr: tl.tensor,
    w1_ptr: tl.tensor,
    w2_ptr: tl.tensor,
    b0_ptr: tl.tensor,
    b1_ptr: tl.tensor,
    b2_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    out_ptr: tl.tensor,
    number: tl.tensor,
    rows0: tl.tensor,
    rows1: tl.tensor,
    rows2: tl.tensor,
    K: tl.constexpr,
    WEIGHTS: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
) -> None:
    """Multiply ROWS rows of one of the weights, or of gate and up, with all tokens."""
    first = tl.program_id(0)
    w_ptr, b_ptr, rows, before = w0_ptr, b0_ptr, rows0, 0
    total = rows0
    if WEIGHTS > 1:
        tiles = tl.cdiv(rows0, ROWS)
        second = first >= tiles
        first = tl.where(second, first - tiles, first)
        w_ptr = tl.where(second, w1_ptr, w_ptr)
        b_ptr = tl.where(second, b1_ptr, b_ptr)
        rows = tl.where(second, rows1, rows)
        before = tl.where(second, rows0, 0)
        total += rows1
    if WEIGHTS > 2:
        tiles = tl.where(second, tl.cdiv(rows1, ROWS), tl.cdiv(rows0, ROWS))
        third = second & (first >= tiles)
        first = tl.where(third, first - tiles, first)
        w_ptr = tl.where(third, w2_ptr, w_ptr)
        b_ptr = tl.where(third, b2_ptr, b_ptr)
        rows = tl.where(third, rows2, rows)
        before = tl.where(third, rows0 + rows1, before)
        total += rows2
    row = first * ROWS + tl.arange(0, ROWS)
    token = tl.arange(0, TOKENS)
    k = tl.arange(0, BLOCK)
    in_rows, in_tokens = (row < rows)[:, None], (token < number)[:, None]
    w_at = row.to(tl.int64)[:, None] * K + k[None, :]
    x_at = token[:, None] * K + k[None, :]
    if OVERLAPS:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    y = tl.zeros((TOKENS, ROWS), tl.float32)
    other = tl.zeros((TOKENS, ROWS), tl.float32)
    for start in range(0, K, BLOCK):
        exists = (start + k < K)[None, :]
        x = tl.load(x_ptr + x_at + start, mask=in_tokens & exists, other=0.0)
        w = tl.load(w_ptr + w_at + start, mask=in_rows & exists, other=0.0)
        y = tl.dot(x, tl.trans(w), y, input_precision="ieee")
        if GATED:
            u = tl.load(w1_ptr + w_at + start, mask=in_rows & exists, other=0.0)
            other = tl.dot(x, tl.trans(u), other, input_precision="ieee")
    if GATED:
        y = y / (1.0 + tl.exp(-y)) * other
    if HAS_BIAS:
        y += tl.load(b_ptr + row, mask=row < rows, other=0.0).to(tl.float32)[None, :]
    out_at = token[:, None] * total + before + row[None, :]
    mask = in_tokens & (row < rows)[None, :]
    if HAS_RESIDUAL:
        y += tl.load(residual_ptr + out_at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + out_at, y.to(out_ptr.dtype.element_ty), mask=mask)


def multiply(
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
    number, size = x.shape
    counts = [len(w) for w in weights]
    assert number <= MOST_TOKENS and (residual is None or residual.is_contiguous())
    operands = Operands.of(x, weights, biases)
    if tuning is None:
        tuning = GATED_TUNING if gated else TUNING
    launch = launch_options(x.device, overlaps)
    if norm is not None:
        normed = torch.empty_like(x)
        block = triton.next_power_of_2(size)
        _norm[(number,)](x, norm.weight, normed, norm.eps, K=size, BLOCK=block, **launch)
        x = normed
    multiplied = counts[:1] if gated else counts
    out = torch.empty(number, sum(multiplied), dtype=x.dtype, device=x.device)
    rows = [*multiplied, 0, 0]
    _project[(sum(triton.cdiv(count, tuning.rows) for count in multiplied),)](
        x,
        *operands.weights,
        *operands.biases,
        x if residual is None else residual,
        out,
        number,
        *rows[:3],
        K=size,
        WEIGHTS=len(multiplied),
        GATED=gated,
        HAS_BIAS=operands.has_bias,
        HAS_RESIDUAL=residual is not None,
        TOKENS=MOST_TOKENS,
        ROWS=tuning.rows,
        BLOCK=min(tuning.block, max(triton.next_power_of_2(size), MOST_TOKENS)),
        num_warps=tuning.num_warps,
        num_stages=tuning.num_stages,
        **launch,
    )
    return out
