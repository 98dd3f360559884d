"""The lists by Triton: packed from maps in one launch, or made from the pattern without any map.

PyTorch would sort, scan or gather a whole map many times, in many launches. Where a layout is plain
(the queries are the last of the one document that the keys are), a few numbers say what a tile is,
and nothing is kept of it but its place in a list. These lists are equal, entry by entry, to those
that `lists` makes of `tile_maps`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from longgen.attention.flash.lists import ForwardLists
from longgen.layout import Layout
from longgen.pattern import SparsePattern

# Tiles that a program looks at together, and query tiles whose forward lists it makes.
BLOCK, ROWS = 128, 8

# One kernel serves all lengths, heads and patterns: Triton would compile another one for numbers
# that are 1 or divide by 16.
NUMBERS = [
    *("num_queries", "num_keys", "num_key_value_heads", "group", "batch"),
    *("size", "sink", "local", "stride", "residue", "step"),
    *("mask_width", "full_width", "num_q", "num_k"),
]


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


@triton.jit
def classify(
    i: tl.tensor,
    j: tl.tensor,
    plain: tl.tuple,
    TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr,
    STRIDED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Say of query tiles i and key tiles j if some pair is visible, and if every pair is.

    The closed form of `tile_lists`, written down a second time for tiles that are one segment each;
    tests/attention/flash/test_plain_lists.py holds it to the first. Whatever is divided is at least
    0: Triton rounds towards it.
    """
    num_queries, num_keys, size, sink, local, stride, residue = plain
    q_first = num_keys - num_queries + i * TILE_Q
    k_first = j * TILE_K
    q_stop, k_stop = tl.minimum(q_first + TILE_Q, num_keys), tl.minimum(k_first + TILE_K, num_keys)
    i_first, i_last = q_first // size, (q_stop - 1) // size
    j_first, j_last = k_first // size, (k_stop - 1) // size
    reachable = k_first <= q_stop - 1
    some = reachable & ((i_first - j_last < local) | (j_first < sink))
    left_first = tl.maximum(j_first, sink)
    left_last = tl.minimum(j_last, i_last - local)
    filled = (q_stop - q_first == TILE_Q) & (k_stop - k_first == TILE_K)
    whole = filled & (k_stop - 1 <= q_first)
    if STRIDED:
        strided = j_first + (residue + stride - j_first % stride) % stride
        some = some | (reachable & (strided <= j_last))
        one_strided = (left_first == left_last) & (left_first % stride == residue)
        whole = whole & ((left_first > left_last) | (stride == 1) | one_strided)
    else:
        whole = whole & (left_first > left_last)
    return some, whole


@triton.jit
def _put(
    index_ptr: tl.tensor,
    width: tl.tensor,
    i: tl.tensor,
    heads: tl.tuple,
    place: tl.tensor,
    value: tl.tensor,
    chosen: tl.tensor,
) -> None:
    """Write values to places of the lists (H, nq, width) of query tiles i, of all like heads."""
    num_q, num_key_value_heads, group = heads
    for key_head in range(tl.program_id(1), num_key_value_heads, tl.num_programs(1)):
        for head in range(key_head * group, key_head * group + group):
            row = (head * num_q + i).to(tl.int64) * width
            tl.store(index_ptr + row + place, value, mask=chosen)


@triton.jit(do_not_specialize=NUMBERS)
def _forward(
    count_ptr: tl.tensor,
    mask_ptr: tl.tensor,
    full_ptr: tl.tensor,
    mask_width: tl.tensor,
    full_width: tl.tensor,
    num_queries: tl.tensor,
    num_keys: tl.tensor,
    num_key_value_heads: tl.tensor,
    group: tl.tensor,
    size: tl.tensor,
    sink: tl.tensor,
    local: tl.tensor,
    stride: tl.tensor,
    residue: tl.tensor,
    step: tl.tensor,
    TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr,
    STRIDED: tl.constexpr,
    FILL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Some query tiles of one map: counts (2, H, nq), or, if FILL, the lists and zeros behind."""
    num_q = tl.cdiv(num_queries, TILE_Q)
    heads = (num_q, num_key_value_heads, group)
    begin_q = tl.program_id(0) * ROWS
    i = begin_q + tl.arange(0, ROWS)[:, None]
    residue = (residue + tl.program_id(1) * step) % stride
    plain = (num_queries, num_keys, size, sink, local, stride, residue)
    # Keys up to the last query's own.
    first = num_keys - num_queries + begin_q * TILE_Q
    num_tiles = tl.cdiv(tl.minimum(first + ROWS * TILE_Q, num_keys), TILE_K)
    # Without strides, nothing lies between the sinks and what the first query sees as local.
    num_sink, gap = num_tiles, 0
    if not STRIDED:
        num_sink = tl.cdiv(sink * size, TILE_K)
        first_local = tl.maximum(first // size - local + 1, 0) * size // TILE_K
        gap = tl.maximum(first_local - num_sink, 0)
    num_mask = tl.zeros((ROWS, 1), tl.int32)
    num_full = tl.zeros((ROWS, 1), tl.int32)
    for begin in range(0, num_tiles - gap, BLOCK):
        j = begin + tl.arange(0, BLOCK)[None, :]
        is_tile = (i < num_q) & (j < num_tiles - gap)
        j = tl.where(j < num_sink, j, j + gap)
        some, whole = classify(i, j, plain, TILE_Q, TILE_K, STRIDED)
        full = whole & is_tile
        masked = some & is_tile & (full == 0)
        if FILL:
            place = num_mask + tl.cumsum(masked.to(tl.int32), 1) - 1
            _put(mask_ptr, mask_width, i, heads, place, j, masked)
            place = num_full + tl.cumsum(full.to(tl.int32), 1) - 1
            _put(full_ptr, full_width, i, heads, place, j, full)
        num_mask += tl.sum(masked.to(tl.int32), 1)[:, None]
        num_full += tl.sum(full.to(tl.int32), 1)[:, None]
    if FILL:
        for begin in range(0, tl.maximum(mask_width, full_width), BLOCK):
            place = begin + tl.arange(0, BLOCK)[None, :]
            zero = tl.zeros((ROWS, BLOCK), tl.int32)
            rest = (i < num_q) & (place >= num_mask) & (place < mask_width)
            _put(mask_ptr, mask_width, i, heads, place, zero, rest)
            rest = (i < num_q) & (place >= num_full) & (place < full_width)
            _put(full_ptr, full_width, i, heads, place, zero, rest)
    else:
        of_full = num_key_value_heads * group * num_q
        is_row, zero = i < num_q, tl.zeros((ROWS, 1), tl.int32)
        _put(count_ptr, 1, i, heads, zero, num_mask, is_row)
        _put(count_ptr + of_full, 1, i, heads, zero, num_full, is_row)


def numbers_of(pattern: SparsePattern, layout: Layout, head_offset: int) -> tuple[int, ...]:
    """Return lengths and pattern as the kernels take them.

    Blocks are at most as large and as many as the keys are, which changes nothing and keeps
    products within 32 bits.
    """
    size = min(pattern.block_size, layout.num_keys)
    num_blocks = -(-layout.num_keys // size)
    stride = max(pattern.stride_blocks, 1)
    return (
        size,
        min(pattern.sink_blocks, num_blocks),
        min(pattern.local_blocks, num_blocks),
        stride,
        pattern.residue(head_offset),
        -pattern.head_shift % stride,
    )


def plain_forward_lists(
    pattern: SparsePattern,
    layout: Layout,
    num_heads: int,
    num_key_value_heads: int,
    head_offset: int,
    tile_q: int,
    tile_k: int,
    device: torch.device,
) -> ForwardLists:
    """Make what `forward_lists` makes of the maps of a plain layout."""
    num_maps = min(num_key_value_heads, pattern.num_head_classes)
    heads, key_heads = (num_heads, num_key_value_heads) if num_maps > 1 else (1, 1)
    num_q = -(-layout.num_queries // tile_q)
    counts = torch.empty(2, 1, heads, num_q, dtype=torch.int32, device=device)
    grid = (-(-num_q // ROWS), num_maps)
    numbers = (
        *(layout.num_queries, layout.num_keys, key_heads, heads // key_heads),
        *numbers_of(pattern, layout, head_offset),
        *(tile_q, tile_k, pattern.stride_blocks > 0),
    )
    _forward[grid](counts, counts, counts, 0, 0, *numbers, False, ROWS, BLOCK)
    # The only wait for the device.
    widths = [max(width, 1) for width in counts.view(2, -1).amax(1).tolist()]
    index = [
        torch.empty(1, heads, num_q, width, dtype=torch.int32, device=device) for width in widths
    ]
    _forward[grid](counts, *index, *widths, *numbers, True, ROWS, BLOCK)
    return ForwardLists(counts[0], index[0], counts[1], index[1])
