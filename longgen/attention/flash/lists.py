"""Lists of the tiles that kernels visit, packed on the device from closed-form tile maps.

The forward kernel reads, for each query tile, the key tiles that it has to mask and those that it
need not. The backward kernel reads a work table: one row a program, each with its key tile and the
query tiles that see it.

Plain layouts go without maps on a GPU: `triton_lists` and `triton_work` make the same lists.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from longgen.attention.tiles import tile_lists
from longgen.layout import Layout
from longgen.pattern import SparsePattern

# Columns of a work table's rows.
KEY_TILE, HEAD, ROW, MASK_START, MASK_COUNT, FULL_LAST, FULL_COUNT, FULL_TURN = range(8)
WORK_FIELDS = 8
# Programs side by side begin this many query tiles apart, and again together after so many: far
# enough not to add to the same dQ at once, near enough to find their queries in the L2 cache.
_APART, _TOGETHER = 4, 64


class ForwardLists(NamedTuple):
    """Hold key tiles by query tile, int32: counts (R, H, nq) and indices (R, H, nq, longest).

    R is the batch size or 1, H the query heads or 1, where all share a list.
    """

    mask_count: torch.Tensor
    mask_index: torch.Tensor
    full_count: torch.Tensor
    full_index: torch.Tensor


class BackwardWork(NamedTuple):
    """Hold the backward kernel's programs, int32.

    table (programs, WORK_FIELDS): key tile, query head, batch row, start in `tiles` and number of
    the query tiles that need a mask, last and number of those that do not (they are consecutive,
    and visited from the last down), and how many of these come last instead of first. tiles
    (entries,): query tiles.
    """

    table: torch.Tensor
    tiles: torch.Tensor


def tile_maps(
    pattern: SparsePattern,
    layout: Layout,
    num_key_value_heads: int,
    head_offset: int,
    tile_q: int,
    tile_k: int,
    device: torch.device | str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return in which tiles some pair is visible, and in which every pair is.

    Bool (rows or 1, maps, nq, nk); maps is 1 where heads see alike, otherwise it divides the heads
    or is their number: head h has map h % maps.
    """
    heads_alike = min(num_key_value_heads, pattern.num_head_classes)
    rows = []
    for index in range(layout.num_rows):
        queries, keys = layout.row(index)
        shared = len(keys) == 1
        parts = [
            tile_lists(
                pattern,
                queries,
                axis,
                range(head_offset, head_offset + heads_alike) if shared else [head_offset + h],
                tile_q=tile_q,
                tile_k=tile_k,
                device=device,
            )
            for h, axis in enumerate(keys)
        ]
        rows.append([torch.cat(part) for part in zip(*parts, strict=True)])
    some, whole = (torch.stack(part) for part in zip(*rows, strict=True))
    return some, whole


def without(
    maps: tuple[torch.Tensor, torch.Tensor], taken: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the maps of the pairs in `maps` that are not in `taken`, pairs of the same tiles."""
    (some, whole), (some_taken, whole_taken) = maps, taken
    return some & ~whole_taken, whole & ~some_taken


def forward_lists(
    some: torch.Tensor, whole: torch.Tensor, num_heads: int, group: int
) -> ForwardLists:
    """Pack maps (R, maps, nq, nk) into lists for `num_heads` query heads, `group` a key head."""
    tiles = torch.stack([some & ~whole, whole])
    counts = tiles.sum(-1, dtype=torch.int32)
    # The only wait for the device.
    widths = counts.flatten(1).amax(1).clamp(min=1).tolist() if counts.numel() else [1, 1]
    packed = []
    for kind in (0, 1):
        flat = tiles[kind].flatten(0, 2)
        index = torch.zeros(len(flat), widths[kind], dtype=torch.int32, device=some.device)
        starts = torch.arange(0, index.numel(), widths[kind], dtype=torch.int32, device=some.device)
        _pack_rows(flat, starts, index.view(-1))
        packed += [counts[kind], index.view(*counts.shape[1:], widths[kind])]
    if some.shape[1] > 1:
        maps = torch.arange(num_heads, device=some.device) // group % some.shape[1]
        packed = [values[:, maps] for values in packed]
    return ForwardLists(*packed)


def backward_work(
    some: torch.Tensor, whole: torch.Tensor, batch: int, num_heads: int, group: int
) -> BackwardWork:
    """Make the work table of maps (R, maps, nq, nk) for every key tile, head and batch row.

    Tiles that far more queries see than most (sinks, strides) come first, head by head: their
    programs run longest, and side by side from the last query down they share their queries in
    the L2 cache, wherever each begins. The many short ones fill up behind them.
    """
    some, whole = some.transpose(-1, -2), whole.transpose(-1, -2)
    num_q = whole.shape[-1]
    full_count = whole.sum(-1, dtype=torch.int32)
    full_last = num_q - 1 - whole.flip(-1).to(torch.int8).argmax(-1)
    full_first = whole.to(torch.int8).argmax(-1)
    # Where a layout scatters them, the mask list takes all: a mask that is true does no harm.
    consecutive = full_last - full_first + 1 == full_count
    mask = some & ~(whole & consecutive[..., None])
    full_count = full_count * consecutive
    mask_count = mask.sum(-1, dtype=torch.int32)
    ends = torch.cumsum(mask_count.flatten(), 0, dtype=torch.int32)
    mask_start = ends.view_as(mask_count) - mask_count
    index = torch.empty(int(ends[-1]), dtype=torch.int32, device=some.device)
    _pack_rows(mask.flatten(0, 2), mask_start.flatten(), index)

    device = some.device
    rows, maps, num_k, _ = some.shape
    shape = (batch, num_heads, num_k)
    row = torch.arange(batch, device=device)[:, None, None]
    head = torch.arange(num_heads, device=device)[None, :, None]
    tile = torch.arange(num_k, device=device)[None, None, :]
    place = (row if rows > 1 else 0 * row, head // group % maps, tile)
    by_map = torch.stack([mask_start, mask_count, full_last, full_count], -1).to(torch.int32)
    table = torch.zeros(*shape, WORK_FIELDS, dtype=torch.int32, device=device)
    table[..., KEY_TILE], table[..., HEAD], table[..., ROW] = tile, head, row
    table[..., MASK_START : FULL_COUNT + 1] = by_map[place]
    table = table.view(-1, WORK_FIELDS)
    length = table[:, MASK_COUNT] + table[:, FULL_COUNT]
    light = length <= 2 * length.median()
    rank = torch.cumsum(~light, 0) % _TOGETHER
    turn = (rank * _APART) % table[:, FULL_COUNT].clamp(min=1)
    table[:, FULL_TURN] = turn.masked_fill(light, 0)
    order = torch.sort(light.to(torch.int8), stable=True).indices
    return BackwardWork(table[order], index)


def _pack_rows(tiles: torch.Tensor, starts: torch.Tensor, out: torch.Tensor) -> None:
    """Write the columns set in each row of bool (n, m) to `out`, each row's from its start on."""
    if tiles.device.type == "cuda":
        from longgen.attention.flash.triton_lists import pack_rows

        pack_rows(tiles, starts, out)
        return
    row, column = tiles.nonzero().unbind(1)
    order = torch.arange(len(row), device=tiles.device)
    first = torch.cumsum(tiles.sum(-1), 0) - tiles.sum(-1)
    out[starts[row] + order - first[row]] = column.to(torch.int32)
