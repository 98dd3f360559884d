"""Backward work tables of plain layouts by Triton, as `triton_lists` makes the forward lists."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from longgen.attention.flash import lists
from longgen.attention.flash.lists import WORK_FIELDS, BackwardWork
from longgen.attention.flash.triton_lists import NUMBERS, classify, numbers_of
from longgen.layout import Layout
from longgen.pattern import SparsePattern

# Query tiles that a program looks at together, and entries that it adds up together.
BLOCK, SCAN_BLOCK = 128, 1024

# What is found of a key tile, for each map: three numbers of its programs' rows, the mask tiles and
# the heavy key tiles of the map that come before its own, and whether it is heavy: seen by far more
# queries than most.
_MASK_COUNT, _FULL_LAST, _FULL_COUNT, _MASK_START, _HEAVY_BEFORE, _HEAVY = map(
    tl.constexpr, range(6)
)
_KEY_TILE, _TABLE_HEAD, _TABLE_ROW = map(tl.constexpr, (lists.KEY_TILE, lists.HEAD, lists.ROW))
_TABLE_MASK_START, _TABLE_MASK_COUNT = map(tl.constexpr, (lists.MASK_START, lists.MASK_COUNT))
_TABLE_FULL_LAST, _TABLE_FULL_COUNT = map(tl.constexpr, (lists.FULL_LAST, lists.FULL_COUNT))
_TABLE_FULL_TURN, _WORK_FIELDS = map(tl.constexpr, (lists.FULL_TURN, WORK_FIELDS))
_APART, _TOGETHER = map(tl.constexpr, (lists._APART, lists._TOGETHER))


@triton.jit
def _seeing(
    j: tl.tensor,
    plain: tl.tuple,
    TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr,
    STRIDED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Return the range of query tiles in which a pair with key tile j may be visible."""
    num_queries, num_keys, size, sink, local, stride, residue = plain
    offset = num_keys - num_queries
    j_first = j * TILE_K // size
    j_last = (tl.minimum(j * TILE_K + TILE_K, num_keys) - 1) // size
    # Sinks and strided blocks are seen to the end, others as long as they are local.
    is_kept = j_first < sink
    if STRIDED:
        is_kept |= j_first + (residue + stride - j_first % stride) % stride <= j_last
    last_seen = tl.minimum((j_last + local) * size, num_keys)
    stop = tl.where(is_kept, num_keys, last_seen) - offset
    return tl.maximum(j * TILE_K - offset, 0) // TILE_Q, tl.cdiv(tl.maximum(stop, 0), TILE_Q)


@triton.jit(do_not_specialize=NUMBERS)
def _backward_counts(
    found_ptr: tl.tensor,
    lengths_ptr: tl.tensor,
    num_queries: tl.tensor,
    num_keys: tl.tensor,
    num_key_value_heads: tl.tensor,
    size: tl.tensor,
    sink: tl.tensor,
    local: tl.tensor,
    stride: tl.tensor,
    residue: tl.tensor,
    step: tl.tensor,
    TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr,
    STRIDED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One key tile of one map: what it counts, to `found` (6, maps, nk), and how many query tiles
    there are, to the histogram of all key/value heads (nq + 1,)."""
    j, own = tl.program_id(0), tl.program_id(1)
    num_k, num_maps = tl.num_programs(0), tl.num_programs(1)
    num_q = tl.cdiv(num_queries, TILE_Q)
    residue = (residue + own * step) % stride
    plain = (num_queries, num_keys, size, sink, local, stride, residue)
    start, stop = _seeing(j, plain, TILE_Q, TILE_K, STRIDED)
    num_some, num_full, full_last = 0, 0, -1
    for begin in range(start, stop, BLOCK):
        i = begin + tl.arange(0, BLOCK)
        some, whole = classify(i, j, plain, TILE_Q, TILE_K, STRIDED)
        some, whole = some & (i < stop), whole & (i < stop)
        num_some += tl.sum(some.to(tl.int32), 0)
        num_full += tl.sum(whole.to(tl.int32), 0)
        full_last = tl.maximum(full_last, tl.max(tl.where(whole, i, -1), 0))
    # No tile in between lacks a pair: a key that drops out of sight never comes back.
    full_last = tl.where(num_full == 0, num_q - 1, full_last)
    found_ptr += own * num_k + j
    tl.store(found_ptr + _MASK_COUNT * num_maps * num_k, num_some - num_full)
    tl.store(found_ptr + _FULL_LAST * num_maps * num_k, full_last)
    tl.store(found_ptr + _FULL_COUNT * num_maps * num_k, num_full)
    tl.atomic_add(lengths_ptr + num_some, tl.cdiv(num_key_value_heads - own, num_maps))


@triton.jit(do_not_specialize=NUMBERS)
def _backward_scan(
    found_ptr: tl.tensor,
    lengths_ptr: tl.tensor,
    total_ptr: tl.tensor,
    num_q: tl.tensor,
    num_k: tl.tensor,
    num_key_value_heads: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """One map: which key tiles are heavy, and running sums; totals (2, maps) of mask tiles and of
    heavy key tiles."""
    own, num_maps = tl.program_id(0), tl.num_programs(0)
    # The lower median of all heads: as many lengths as have less than half of the tiles up to them.
    median, seen = 0, 0
    for begin in range(0, num_q + 1, BLOCK):
        length = begin + tl.arange(0, BLOCK)
        tiles = tl.load(lengths_ptr + length, mask=length <= num_q, other=0)
        below = 2 * (seen + tl.cumsum(tiles, 0)) < num_key_value_heads * num_k
        median += tl.sum((below & (length <= num_q)).to(tl.int32), 0)
        seen += tl.sum(tiles, 0)
    num_mask, num_heavy = 0, 0
    found_ptr += own * num_k
    field = num_maps * num_k
    for begin in range(0, num_k, BLOCK):
        j = begin + tl.arange(0, BLOCK)
        is_tile = j < num_k
        count = tl.load(found_ptr + _MASK_COUNT * field + j, mask=is_tile, other=0)
        length = count + tl.load(found_ptr + _FULL_COUNT * field + j, mask=is_tile, other=0)
        heavy = (length > 2 * median).to(tl.int32)
        starts = num_mask + tl.cumsum(count, 0) - count
        before = num_heavy + tl.cumsum(heavy, 0) - heavy
        tl.store(found_ptr + _MASK_START * field + j, starts, mask=is_tile)
        tl.store(found_ptr + _HEAVY_BEFORE * field + j, before, mask=is_tile)
        tl.store(found_ptr + _HEAVY * field + j, heavy, mask=is_tile)
        num_mask += tl.sum(count, 0)
        num_heavy += tl.sum(heavy, 0)
    tl.store(total_ptr + own, num_mask)
    tl.store(total_ptr + num_maps + own, num_heavy)


@triton.jit(do_not_specialize=NUMBERS)
def _backward_fill(
    found_ptr: tl.tensor,
    total_ptr: tl.tensor,
    table_ptr: tl.tensor,
    index_ptr: tl.tensor,
    num_queries: tl.tensor,
    num_keys: tl.tensor,
    num_key_value_heads: tl.tensor,
    group: tl.tensor,
    batch: tl.tensor,
    size: tl.tensor,
    sink: tl.tensor,
    local: tl.tensor,
    stride: tl.tensor,
    residue: tl.tensor,
    step: tl.tensor,
    TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr,
    STRIDED: tl.constexpr,
    MAPS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One key tile of one map: its mask tiles, and its programs' rows of the table."""
    j, own = tl.program_id(0), tl.program_id(1)
    num_k, num_maps = tl.num_programs(0), tl.num_programs(1)
    residue = (residue + own * step) % stride
    plain = (num_queries, num_keys, size, sink, local, stride, residue)
    maps = tl.arange(0, MAPS)
    masks = tl.load(total_ptr + maps, mask=maps < own, other=0)
    found_ptr += own * num_k + j
    field = num_maps * num_k
    mask_start = tl.sum(masks, 0) + tl.load(found_ptr + _MASK_START * field)
    mask_count = tl.load(found_ptr + _MASK_COUNT * field)
    full_last = tl.load(found_ptr + _FULL_LAST * field)
    full_count = tl.load(found_ptr + _FULL_COUNT * field)
    start, stop = _seeing(j, plain, TILE_Q, TILE_K, STRIDED)
    end = mask_start
    for begin in range(start, stop, BLOCK):
        i = begin + tl.arange(0, BLOCK)
        some, whole = classify(i, j, plain, TILE_Q, TILE_K, STRIDED)
        masked = some & (i < stop) & (whole == 0)
        tl.store(index_ptr + end + tl.cumsum(masked.to(tl.int32), 0) - 1, i, mask=masked)
        end += tl.sum(masked.to(tl.int32), 0)

    is_heavy = tl.load(found_ptr + _HEAVY * field) != 0
    heavy_before = tl.load(found_ptr + _HEAVY_BEFORE * field)
    heavy_own = tl.load(total_ptr + num_maps + own)
    heavy = tl.load(total_ptr + num_maps + maps, mask=maps < num_maps, other=0)
    # Rounded up: the heads before this one that have a map.
    per_row = group * tl.sum(heavy * ((num_key_value_heads - maps + num_maps - 1) // num_maps), 0)
    column = tl.arange(0, _WORK_FIELDS)
    work = tl.where(column == _KEY_TILE, j, 0)
    work = tl.where(column == _TABLE_MASK_START, mask_start, work)
    work = tl.where(column == _TABLE_MASK_COUNT, mask_count, work)
    work = tl.where(column == _TABLE_FULL_LAST, full_last, work)
    work = tl.where(column == _TABLE_FULL_COUNT, full_count, work)
    for row in range(batch):
        for key_head in range(own, num_key_value_heads, num_maps):
            others = group * tl.sum(heavy * ((key_head - maps + num_maps - 1) // num_maps), 0)
            for member in range(group):
                head = key_head * group + member
                before = row * per_row + others + member * heavy_own + heavy_before
                program = (row * num_key_value_heads * group + head) * num_k + j
                place = tl.where(is_heavy, before, batch * per_row + program - before)
                turn = (before + 1) % _TOGETHER * _APART % tl.maximum(full_count, 1)
                work = tl.where(column == _TABLE_HEAD, head, work)
                work = tl.where(column == _TABLE_ROW, row, work)
                work = tl.where(column == _TABLE_FULL_TURN, tl.where(is_heavy, turn, 0), work)
                tl.store(table_ptr + place.to(tl.int64) * _WORK_FIELDS + column, work)


def plain_backward_work(
    pattern: SparsePattern,
    layout: Layout,
    batch: int,
    num_heads: int,
    num_key_value_heads: int,
    head_offset: int,
    tile_q: int,
    tile_k: int,
    device: torch.device,
) -> BackwardWork:
    """Make what `backward_work` makes of the maps of a plain layout."""
    num_maps = min(num_key_value_heads, pattern.num_head_classes)
    num_q, num_k = -(-layout.num_queries // tile_q), -(-layout.num_keys // tile_k)
    found = torch.empty(6, num_maps, num_k, dtype=torch.int32, device=device)
    lengths = torch.zeros(num_q + 1, dtype=torch.int32, device=device)
    totals = torch.empty(2, num_maps, dtype=torch.int32, device=device)
    grid = (num_k, num_maps)
    sizes = (layout.num_queries, layout.num_keys, num_key_value_heads)
    numbers = (
        *numbers_of(pattern, layout, head_offset),
        *(tile_q, tile_k, pattern.stride_blocks > 0),
    )
    _backward_counts[grid](found, lengths, *sizes, *numbers, BLOCK, num_warps=1)
    _backward_scan[(num_maps,)](
        found, lengths, totals, num_q, num_k, num_key_value_heads, SCAN_BLOCK
    )
    programs = batch * num_heads * num_k
    table = torch.empty(programs, WORK_FIELDS, dtype=torch.int32, device=device)
    # The only wait for the device.
    index = torch.empty(sum(totals[0].tolist()), dtype=torch.int32, device=device)
    group = num_heads // num_key_value_heads
    _backward_fill[grid](
        *(found, totals, table, index, *sizes, group, batch, *numbers),
        *(triton.next_power_of_2(num_maps), BLOCK),
        num_warps=1,
    )
    return BackwardWork(table, index)
