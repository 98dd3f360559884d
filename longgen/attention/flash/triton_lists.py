"""Packing tile maps in one launch: PyTorch would sort, scan or gather the whole map many times."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _pack(
    tiles_ptr: tl.tensor,
    start_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_columns: tl.tensor,
    row_stride: tl.tensor,
    column_stride: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """One row: the columns that are set, in order, from its start in `out` on."""
    row = tl.program_id(0)
    tiles_ptr += row.to(tl.int64) * row_stride
    out_ptr += tl.load(start_ptr + row).to(tl.int64)
    found = 0
    for begin in range(0, num_columns, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        is_set = tl.load(tiles_ptr + column * column_stride, mask=column < num_columns, other=0)
        is_set = (is_set != 0).to(tl.int32)
        place = found + tl.cumsum(is_set, 0) - 1
        tl.store(out_ptr + place, column, mask=is_set != 0)
        found += tl.sum(is_set, 0)


def pack_rows(tiles: torch.Tensor, starts: torch.Tensor, out: torch.Tensor) -> None:
    """Write the columns that are set in each row of a map, in order.

    Args:
        tiles: bool (n, m), any strides.
        starts: int32 (n,), where each row's columns begin in `out`.
        out: int32, flat.
    """
    num_rows, num_columns = tiles.shape
    _pack[(num_rows,)](
        tiles.view(torch.uint8),
        starts,
        out,
        num_columns,
        tiles.stride(0),
        tiles.stride(1),
        BLOCK=min(triton.next_power_of_2(max(num_columns, 1)), 1024),
    )
