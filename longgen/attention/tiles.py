"""Tile lists: which tiles of the score matrix hold anything, and which are wholly visible, in
closed form.

Kernels walk these lists. They are computed tile by tile from the pattern's block arithmetic; no T x
S mask is ever made.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from longgen.layout import PADDING, Axis, axis_length
from longgen.pattern import SparsePattern


def _segments(axis: Axis, tile: int) -> np.ndarray:
    """Cut an axis at tile borders: int32 (4, n) of tile index, document, first and one-past-last
    position."""
    pieces = []
    column = 0
    for document, start, length in axis:
        cuts = np.arange(column // tile + 1, (column + length - 1) // tile + 1) * tile
        edges = np.concatenate([[column], cuts, [column + length]])
        positions = edges - column + start
        documents = np.full(len(edges) - 1, document)
        pieces.append(np.stack([edges[:-1] // tile, documents, positions[:-1], positions[1:]]))
        column += length
    return np.concatenate(pieces, axis=1).astype(np.int32)


def tile_lists(
    pattern: SparsePattern,
    query_axis: Axis,
    key_axis: Axis,
    heads: Sequence[int],
    *,
    tile_q: int = 128,
    tile_k: int = 128,
    device: torch.device | str = "cpu",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Classify every tile of the score matrix.

    Args:
        pattern: what a query sees.
        query_axis: where the queries come from, T columns.
        key_axis: where the keys come from, S columns.
        heads: global key/value head indices to classify for.
        tile_q: query columns in a tile.
        tile_k: key columns in a tile.
        device: where to compute and leave the result.

    Returns:
        Two bool tensors (len(heads), ceil(T / tile_q), ceil(S / tile_k)): tiles in which some pair
        is visible, and tiles in which all of tile_q * tile_k pairs exist and are visible. Both are
        exact.
    """
    q = torch.from_numpy(_segments(query_axis, tile_q)).to(device)
    k = torch.from_numpy(_segments(key_axis, tile_k)).to(device)
    q_tile, q_document, q_first, q_stop = (row[:, None] for row in q)
    k_tile, k_document, k_first, k_stop = (row[None, :] for row in k)
    size = pattern.block_size
    i_first, i_last = q_first // size, (q_stop - 1) // size
    j_first, j_last = k_first // size, (k_stop - 1) // size

    same = (q_document == k_document) & (q_document != PADDING)
    reachable = same & (k_first <= q_stop - 1)
    # The nearest pair of a reachable segment pair is on the diagonal, or its first query with its
    # last key.
    near = (i_first - j_last).clamp(min=0) < pattern.local_blocks
    some = (reachable & (near | (j_first < pattern.sink_blocks))).expand(len(heads), -1, -1)
    # Blocks of the segment that its last query sees neither as local nor as sink: these must all be
    # strided.
    left_first = j_first.clamp(min=pattern.sink_blocks)
    left_last = torch.minimum(j_last, i_last - pattern.local_blocks)
    whole = (same & (k_stop - 1 <= q_first)).expand(len(heads), -1, -1)
    if pattern.stride_blocks:
        stride = pattern.stride_blocks
        residue = torch.tensor(
            [pattern.residue(h) for h in heads], dtype=torch.int32, device=device
        )
        residue = residue[:, None, None]
        strided = j_first + (residue - j_first) % stride
        # A strided block that starts behind the last query does no harm: the pair is near anyway.
        some = some | (reachable & (strided <= j_last))
        one_strided = (left_first == left_last) & (left_first % stride == residue)
        whole = whole & ((left_first > left_last) | (stride == 1) | one_strided)
    else:
        whole = whole & (left_first > left_last)

    num_q = -(-axis_length(query_axis) // tile_q)
    num_k = -(-axis_length(key_axis) // tile_k)
    # Weigh wholly visible segment pairs by their area: a tile is whole when the areas fill it.
    area = (q_stop - q_first) * (k_stop - k_first)
    if q.shape[1] == num_q and k.shape[1] == num_k:
        return some.contiguous(), whole & (area == tile_q * tile_k)

    def per_tile(values: torch.Tensor) -> torch.Tensor:
        rows = values.new_zeros(len(heads), num_q, k.shape[1], dtype=torch.int32)
        rows.index_add_(1, q_tile[:, 0], values.to(torch.int32))
        tiles = rows.new_zeros(len(heads), num_q, num_k)
        return tiles.index_add_(2, k_tile[0], rows)

    return per_tile(some) > 0, per_tile(whole * area) == tile_q * tile_k
