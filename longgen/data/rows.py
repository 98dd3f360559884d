"""Cut documents into pieces and put the pieces into rows of equal length (lengths only)."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Pieces:
    """List ranges of documents and the row that each is in: four int64 arrays [pieces]."""

    document: np.ndarray
    offset: np.ndarray
    length: np.ndarray
    row: np.ndarray


def min_piece(context: int) -> int:
    """Return the fewest tokens that a document is cut down to for filling a row's space."""
    return max(2, context // 256)


def pack(
    lengths: np.ndarray, context: int, rng: np.random.Generator, *, fill: bool = True
) -> Pieces:
    """Cut documents and put every piece into a row, as `PackedDataset` describes.

    Args:
        lengths: tokens of each document, int64 [documents].
        context: tokens in a row.
        rng: decides the order among documents of equal length.
        fill: cut documents to fill the space in rows; without it one that fits into a row is
            never cut, and more space stays empty.

    Returns:
        Pieces that cover every token of every document once; rows are 0 ... the largest.
    """
    order = rng.permutation(len(lengths))
    whole, rest = np.divmod(lengths[order], context)
    num_whole = int(whole.sum())
    full = Pieces(
        document=np.repeat(order, whole),
        offset=(np.arange(num_whole) - np.repeat(np.cumsum(whole) - whole, whole)) * context,
        length=np.full(num_whole, context),
        row=np.arange(num_whole),
    )
    some = np.flatnonzero(rest)
    some = some[np.argsort(-rest[some], kind="stable")]
    fitted = _best_fit_decreasing(rest[some], context)
    rests = Pieces(order[some], (whole * context)[some], rest[some], fitted)
    if fill:
        rests = _fill(rests, context)
    return _concatenate(
        full, Pieces(rests.document, rests.offset, rests.length, rests.row + num_whole)
    )


def _concatenate(first: Pieces, second: Pieces) -> Pieces:
    return Pieces(
        np.concatenate([first.document, second.document]),
        np.concatenate([first.offset, second.offset]),
        np.concatenate([first.length, second.length]),
        np.concatenate([first.row, second.row]),
    )


def _best_fit_decreasing(lengths: np.ndarray, context: int) -> np.ndarray:
    """Give each piece the fullest row that has space for it, a new one if none has.

    Args:
        lengths: tokens of each piece, falling, 1 ... context.
        context: tokens in a row.

    Returns:
        The row of each piece, int64 [pieces].
    """
    rows_with: dict[int, list[int]] = {}  # space -> rows that have just so much
    spaces: list[int] = []  # the keys of rows_with, rising
    used: list[int] = []
    number_in: list[int] = []
    num_rows = 0

    def offer(rows: Iterable[int], space: int) -> None:
        if space not in rows_with:
            insort(spaces, space)
        rows_with.setdefault(space, []).extend(rows)

    # Pieces of one length go together. The fullest row with space for one is, having taken it,
    # still the fullest for the next, so each row takes as many as it can before another is tried.
    values, counts = np.unique(lengths, return_counts=True)
    for length, count in zip(values[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while count:
            at = bisect_left(spaces, length)
            if at == len(spaces):
                opened = -(-count // (context // length))
                offer(range(num_rows, num_rows + opened), context)
                num_rows += opened
                continue
            space = spaces[at]
            number = min(space // length, count)
            rows = rows_with[space][-(count // number) :]
            del rows_with[space][-(count // number) :]
            if not rows_with[space]:
                del rows_with[space], spaces[at]
            used += rows
            number_in += [number] * len(rows)
            count -= number * len(rows)
            if space > number * length:
                offer(rows, space - number * length)
    return np.repeat(np.asarray(used, dtype=np.int64), number_in)


def _fill(pieces: Pieces, context: int) -> Pieces:
    """Take the emptiest rows apart and cut their pieces to fill the space in the others.

    Args:
        pieces: pieces in rows, the longest first.
        context: tokens in a row.

    Returns:
        The same tokens in fewer rows, which are numbered anew.
    """
    if not len(pieces.row):
        return pieces
    smallest = min_piece(context)
    content = np.bincount(pieces.row, weights=pieces.length).astype(np.int64)
    space = context - content
    space[space < smallest] = 0
    emptiest = np.argsort(content, kind="stable")
    # The most rows whose content goes into the space that the others have.
    pour = np.cumsum(content[emptiest])
    room = space.sum() - np.cumsum(space[emptiest])
    stays = np.ones(len(content), dtype=bool)
    stays[emptiest[: np.count_nonzero(pour <= room)]] = False
    renumbered = np.cumsum(stays) - 1
    kept = stays[pieces.row]

    slots = np.flatnonzero(stays & (space > 0))
    slots = slots[np.argsort(-space[slots], kind="stable")]
    open_slots = list(zip(renumbered[slots].tolist(), space[slots].tolist(), strict=True))[::-1]
    next_row = int(stays.sum())
    cut: list[tuple[int, int, int, int]] = []  # document, offset, length, row
    row, left = -1, 0
    poured = np.stack([pieces.document, pieces.offset, pieces.length], axis=1)[~kept]
    for document, offset, length in poured.tolist():
        while length:
            # All of the piece, or so much that neither part is too short.
            take = length if length <= left else min(left, length - smallest)
            if length > left and take < smallest:
                if open_slots:
                    row, left = open_slots.pop()
                else:
                    row, left = next_row, context
                    next_row += 1
                continue
            cut.append((document, offset, take, row))
            offset, length, left = offset + take, length - take, left - take
    whole = Pieces(
        pieces.document[kept],
        pieces.offset[kept],
        pieces.length[kept],
        renumbered[pieces.row[kept]],
    )
    return _concatenate(whole, Pieces(*np.asarray(cut, dtype=np.int64).reshape(-1, 4).T))
