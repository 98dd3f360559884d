"""What a layer's kernels need to know besides q, k and v: tile lists, work tables, places.

Made once for a pattern and a layout on a device, and shared by all layers that have them.
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from longgen.attention.flash.lists import (
    BackwardWork,
    ForwardLists,
    backward_work,
    forward_lists,
    tile_maps,
    without,
)
from longgen.layout import PADDING, Axis, Layout, Run, axis_length
from longgen.pattern import SparsePattern
from longgen.transfer import to_device

# The kernels' key tiles; the backward kernel has no other.
TILE_K = 128
# Some milliseconds of one core.
_MOST_TILES_BY_HOST = 1 << 18


@dataclass(frozen=True)
class Mask:
    """Say which pairs of a tile are visible, to the last detail that is compiled into a kernel.

    Attributes:
        pattern: what a query sees.
        only_strided: leave out what the pattern without its strides already shows.
        group: query heads a key/value head.
        head_offset: global index of the first key/value head.
        by_places: read documents and positions from arrays; otherwise query t of T stands at
            position S - T + t of the one document that the keys are.
        query_rows: whether batch rows have their own queries' places.
        key_rows: whether batch rows have their own keys' places.
        key_heads: key/value heads with their own keys' places, 1 if all share them.
    """

    pattern: SparsePattern
    only_strided: bool = False
    group: int = 1
    head_offset: int = 0
    by_places: bool = False
    query_rows: bool = False
    key_rows: bool = False
    key_heads: int = 1

    def is_by_row(self, tile_k: int) -> bool:
        """Whether a query sees of each key tile the keys up to itself, or nothing: every tile lies
        in one block."""
        return not self.by_places and (
            self.pattern.is_full or self.pattern.block_size % tile_k == 0
        )

    def encode(self) -> str:
        """Return the mask as text, for the signature of an operator."""
        return json.dumps(asdict(self))

    @classmethod
    @lru_cache(maxsize=256)
    def decode(cls, text: str) -> Mask:
        """Return the mask that `encode` made the text of."""
        fields = json.loads(text)
        return cls(SparsePattern.from_dict(fields.pop("pattern")), **fields)


class Tables(NamedTuple):
    """Hold what one attention call passes to its kernels.

    Attributes:
        mask: the mask of the whole pattern.
        tile_k: key tile of the forward kernel.
        forward: the forward kernel's lists, then the places if it reads them.
        backward_mask: the mask of the backward kernel; without strides if a second one takes them.
        backward: the backward kernel's work table and index, then the places.
        strided_mask: the mask of the second backward kernel, None if there is only one.
        strided: its gathered columns (rows or 1, Hkv, Sg), work table, index and places.
    """

    mask: Mask
    tile_k: int
    forward: list[torch.Tensor]
    backward_mask: Mask
    backward: list[torch.Tensor]
    strided_mask: Mask | None
    strided: list[torch.Tensor]


def is_plain(layout: Layout) -> bool:
    """Whether the queries are the last of the one document that the keys are."""
    if layout.num_rows > 1 or layout.num_key_heads > 1:
        return False
    queries, (keys,) = layout.row(0)
    if len(queries) != 1 or len(keys) != 1:
        return False
    q, k = queries[0], keys[0]
    same = q.document == k.document != PADDING
    return same and k.start == 0 and q.start + q.length == k.length


# Few: at 131,072 tokens one of 32 unlike heads takes some 30 MB.
@lru_cache(maxsize=8)
def tables(
    pattern: SparsePattern,
    layout: Layout,
    batch: int,
    num_heads: int,
    num_key_value_heads: int,
    head_offset: int,
    tiles_q: tuple[int, int],
    device: torch.device,
    gradients: bool,
) -> Tables:
    """Make the tables of one layout.

    Args:
        pattern: what a query sees.
        layout: where queries and keys stand.
        batch: batch rows B.
        num_heads: query heads H.
        num_key_value_heads: key/value heads Hkv.
        head_offset: global index of the first key/value head.
        tiles_q: query tile of the forward kernel and of the backward kernel.
        device: where they are needed.
        gradients: whether the backward kernel will run.
    """
    # Triton launches on the current device.
    current = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    # Shared by training and inference: tensors born in inference mode could not be saved for
    # backward.
    with current, torch.inference_mode(False), torch.no_grad():
        group = num_heads // num_key_value_heads
        mask = _mask(pattern, layout, group, head_offset, tiles_q[0])
        places = _places(layout, device) if mask.by_places else []
        tile_k = _forward_tile_k(pattern, layout)
        heads = (num_heads, num_key_value_heads, head_offset)
        where = device if gradients else _where(pattern, layout, num_key_value_heads, device)
        lists = _forward(pattern, layout, *heads, tiles_q[0], tile_k, where)
        forward = [*(to_device(x, device) for x in lists), *places]
        if not gradients:
            return Tables(mask, tile_k, forward, mask, [], None, [])

        def maps_of(part: SparsePattern, where: Layout) -> tuple[torch.Tensor, torch.Tensor]:
            return tile_maps(
                part, where, num_key_value_heads, head_offset, tiles_q[1], TILE_K, device
            )

        if not _gathers(pattern, layout):
            work = _backward(pattern, layout, batch, *heads, tiles_q[1], device)
            backward_mask = _mask(pattern, layout, group, head_offset, tiles_q[1])
            return Tables(mask, tile_k, forward, backward_mask, [*work, *places], None, [])
        rest = replace(pattern, stride_blocks=0, head_shift=0)
        work = _backward(rest, layout, batch, *heads, tiles_q[1], device)
        gathered, columns = _gather(pattern, layout, num_key_value_heads, head_offset)
        strided = backward_work(
            *without(maps_of(pattern, gathered), maps_of(rest, gathered)), batch, num_heads, group
        )
        strided_mask = replace(
            _mask(pattern, gathered, group, head_offset, tiles_q[1]), only_strided=True
        )
        strided_places = _places(gathered, device) if strided_mask.by_places else []
        return Tables(
            mask,
            tile_k,
            forward,
            _mask(rest, layout, group, head_offset, tiles_q[1]),
            [*work, *places],
            strided_mask,
            [torch.from_numpy(columns).to(device), *strided, *strided_places],
        )


def _never_nothing(some: torch.Tensor) -> torch.Tensor:
    """Return tiles to visit, in which query tiles that see nothing (padding) visit the first: the
    forward kernel expects one, and its mask leaves nothing of it."""
    nothing = ~some.any(-1, keepdim=True)
    return torch.cat([some[..., :1] | nothing, some[..., 1:]], -1)


def _where(
    pattern: SparsePattern, layout: Layout, num_key_value_heads: int, device: torch.device
) -> torch.device:
    """Return where lists for a prompt's piece are made.

    A device is asked how long they get, and would have to finish all that it does before it could
    tell. The host has the next piece's ready meanwhile, if they are not many.
    """
    maps = min(num_key_value_heads, pattern.num_head_classes)
    tiles = layout.num_rows * maps * layout.num_queries * layout.num_keys // TILE_K**2
    by_host = tiles <= _MOST_TILES_BY_HOST and not is_plain(layout)
    return torch.device("cpu") if by_host else device


def _by_triton(layout: Layout, device: torch.device) -> bool:
    """Whether lists are made by Triton, without maps of all tiles."""
    return device.type == "cuda" and is_plain(layout)


def _forward(
    pattern: SparsePattern,
    layout: Layout,
    num_heads: int,
    num_key_value_heads: int,
    head_offset: int,
    tile_q: int,
    tile_k: int,
    device: torch.device,
) -> ForwardLists:
    tiles = (head_offset, tile_q, tile_k, device)
    if _by_triton(layout, device):
        from longgen.attention.flash.triton_lists import plain_forward_lists

        return plain_forward_lists(pattern, layout, num_heads, num_key_value_heads, *tiles)
    some, whole = tile_maps(pattern, layout, num_key_value_heads, *tiles)
    if not is_plain(layout):
        some = _never_nothing(some)
    return forward_lists(some, whole, num_heads, num_heads // num_key_value_heads)


def _backward(
    pattern: SparsePattern,
    layout: Layout,
    batch: int,
    num_heads: int,
    num_key_value_heads: int,
    head_offset: int,
    tile_q: int,
    device: torch.device,
) -> BackwardWork:
    tiles = (head_offset, tile_q, TILE_K, device)
    if _by_triton(layout, device):
        from longgen.attention.flash.triton_work import plain_backward_work

        return plain_backward_work(pattern, layout, batch, num_heads, num_key_value_heads, *tiles)
    maps = tile_maps(pattern, layout, num_key_value_heads, *tiles)
    return backward_work(*maps, batch, num_heads, num_heads // num_key_value_heads)


def _mask(
    pattern: SparsePattern, layout: Layout, group: int, head_offset: int, tile_q: int
) -> Mask:
    # Heads that repeat compile once.
    offset = head_offset % pattern.num_head_classes
    if not is_plain(layout):
        return Mask(
            pattern,
            group=group,
            head_offset=offset,
            by_places=True,
            query_rows=len(layout.queries) > 1,
            key_rows=len(layout.keys) > 1,
            key_heads=layout.num_key_heads,
        )
    first = layout.num_keys - layout.num_queries
    if _is_aligned(pattern, layout) and pattern.block_size % tile_q == first % tile_q == 0:
        # Every tile lies within one block of queries and one of keys, so nothing but the diagonal
        # cuts any: such patterns share a kernel, which has the cheapest mask.
        return Mask(SparsePattern.full(), group=group)
    return Mask(pattern, group=group, head_offset=offset)


def _places(layout: Layout, device: torch.device) -> list[torch.Tensor]:
    """Return documents and positions of queries and keys, each flat int32.

    Kernels read them for all rows of a tile, also for those behind the end: hence the tail.
    """
    arrays = (*layout.query_places(), *layout.key_places())
    return [
        to_device(torch.from_numpy(np.pad(array.ravel(), (0, 256))), device) for array in arrays
    ]


def _is_aligned(pattern: SparsePattern, layout: Layout) -> bool:
    """Whether every key tile lies within one block of one document."""
    if pattern.block_size % TILE_K:
        return False
    return all(_begins_at_tiles(axis) for row in layout.keys for axis in row)


def _begins_at_tiles(axis: Axis) -> bool:
    column = 0
    for document, start, length in axis:
        if document != PADDING and (column % TILE_K or start % TILE_K):
            return False
        column += length
    return True


def _forward_tile_k(pattern: SparsePattern, layout: Layout) -> int:
    # Blocks that lie across the tiles waste less of small ones, which cost little more a token.
    return TILE_K if pattern.is_full or _is_aligned(pattern, layout) else TILE_K // 2


def _gathers(pattern: SparsePattern, layout: Layout) -> bool:
    """Whether the backward pass takes strided blocks, gathered next to each other, by themselves.

    In place, each would drag a tile along that is half empty or lies across two.
    """
    return pattern.stride_blocks > 1 and not _is_aligned(pattern, layout)


def _gather(
    pattern: SparsePattern, layout: Layout, num_key_value_heads: int, head_offset: int
) -> tuple[Layout, np.ndarray]:
    """Return the layout of the strided blocks alone, and their columns (rows or 1, Hkv, Sg)."""
    rows: list[list[tuple[list[Run], list[np.ndarray]]]] = []
    for index in range(len(layout.keys)):
        keys = layout.keys[index]
        rows.append(
            [
                _strided(pattern, keys[h if len(keys) > 1 else 0], head_offset + h)
                for h in range(num_key_value_heads)
            ]
        )
    longest = max(sum(run.length for run in runs) for row in rows for runs, _ in row)
    length = max(-(-longest // TILE_K), 1) * TILE_K
    columns = np.zeros((len(rows), num_key_value_heads, length), np.int64)
    axes: list[tuple[Axis, ...]] = []
    for r, row in enumerate(rows):
        filled = []
        for h, (runs, places) in enumerate(row):
            held = sum(run.length for run in runs)
            columns[r, h, :held] = np.concatenate([*places, np.zeros(0, np.int64)])
            rest = [Run(PADDING, 0, length - held)] if held < length else []
            filled.append((*runs, *rest))
        axes.append(tuple(filled))
    return Layout(layout.queries, tuple(axes)), columns


def _strided(pattern: SparsePattern, axis: Axis, head: int) -> tuple[list[Run], list[np.ndarray]]:
    """Return the runs of an axis that lie in blocks strided for `head`, and their columns."""
    runs, places, column = [], [], 0
    size, stride = pattern.block_size, pattern.stride_blocks
    for document, start, length in axis:
        if document != PADDING:
            first = max(start // size, pattern.sink_blocks)
            first += (pattern.residue(head) - first) % stride
            for block in range(first, -(-(start + length) // size), stride):
                a, b = max(block * size, start), min((block + 1) * size, start + length)
                runs.append(Run(document, a, b - a))
                places.append(np.arange(column + a - start, column + b - start))
        column += length
    return runs, places


def documents_alone(layout: Layout) -> list[int] | None:
    """Return cumulative lengths over all rows if each is whole documents that see themselves.

    None if there is padding, a cache, or a document that begins before its row does. Rows that
    share an axis are listed once.
    """
    if layout.num_key_heads > 1:
        return None
    bounds = [0]
    for index in range(layout.num_rows):
        queries, (keys,) = layout.row(index)
        if queries != keys or any(run.document == PADDING or run.start for run in queries):
            return None
        if len({run.document for run in queries}) < len(queries):
            return None
        for run in queries:
            bounds.append(bounds[-1] + run.length)
    assert bounds[-1] == layout.num_rows * axis_length(layout.queries[0])
    return bounds
