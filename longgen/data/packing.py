"""Pack documents into training sequences of equal length that keep document boundaries."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset

from longgen.data.corpus import CorpusView
from longgen.data.recall import RecallText
from longgen.data.rows import Pieces, min_piece, pack
from longgen.errors import UsageError

IGNORE = -100  # the label of positions that aren't trained on
# Numbers apart the random streams that come of one seed.
_DOCUMENTS, _ROWS, _RECALL = 0, 1, 2


@dataclass(frozen=True, slots=True)
class PackingReport:
    """Count what packing did in one epoch. No token is ever dropped.

    Attributes:
        documents, tokens: what was packed.
        rows: sequences of an epoch.
        padding_tokens, padding_rate: positions that hold no document, and their share of all.
        long_documents: documents longer than a row, cut because they have to be.
        cut_documents: documents that would fit into a row and were cut to fill space.
        truncation_rate: share of documents cut for either reason.
        predicted_tokens: labels of an epoch; the first token of each piece isn't predicted.
    """

    documents: int
    tokens: int
    rows: int
    padding_tokens: int
    padding_rate: float
    long_documents: int
    cut_documents: int
    truncation_rate: float
    predicted_tokens: int

    def to_dict(self) -> dict[str, Any]:
        """Return the counts as plain values for JSON."""
        return asdict(self)


class PackedDataset(Dataset[dict[str, torch.Tensor]]):
    """Serve rows of `context` tokens; row i is a pure function of (corpus, context, seed, i).

    Packing, done once: documents are taken in a seeded order. One longer than `context` is cut
    into rows of `context` tokens. The rests and the shorter documents go whole into rows, the
    longest first, each into the fullest row that has space (best fit decreasing). Then the
    emptiest rows are taken apart again and their pieces cut to fill the space in the others, as
    many rows as that space can take. Pieces cut there have at least `min_piece` tokens (1/256 of
    a row), since the start of a piece is seen without its past. So every token of the corpus is
    in exactly one row of an epoch, and padding is the spaces below twice `min_piece` and at most
    about one row more. Cost is O(n log n) for n documents.

    Every epoch serves these rows in another seeded order: `dataset[i]` takes any i >= 0 and is
    in epoch i // len(dataset). Iteration stops after one epoch.

    A row is a dict of tensors, where positions, sinks and labels treat each piece as a document:

    - `input_ids`, int64 [context]; padding is token 0;
    - `shift_labels`, int64 [context]: the next token, -100 at the last token of each piece and on
      padding;
    - `position_ids`, int64 [context], from 0 in each piece and in the padding;
    - `cu_seqlens`, int32 [pieces + 1]: 0, the end of each piece, and of the padding if any.
    """

    def __init__(
        self,
        corpus: CorpusView,
        *,
        context: int,
        seed: int,
        recall: RecallText | None = None,
        recall_share: float = 0.0,
    ) -> None:
        """Pack a corpus.

        Args:
            corpus: the documents.
            context: tokens in a row, at least 2.
            seed: at least 0; decides the order of documents and rows, and where recall goes.
            recall: plants records and lookups into pieces that can hold a pair, spread over them
                by length: as many a row as `recall` has for `context` tokens.
            recall_share: the share of rows that get it; which ones is a hash of (seed, i).

        Raises:
            UsageError: a value out of its range, or no documents.
        """
        if context < 2:
            raise UsageError(f"The context is {context} tokens, but must be at least 2.")
        if seed < 0:
            raise UsageError(f"The seed is {seed}, but must be at least 0.")
        check_recall(recall, recall_share)
        if not corpus.num_tokens:
            raise UsageError("There are no tokens to pack. Give more data.")
        self.context = context
        self.seed = seed
        self.recall = recall
        self.recall_share = recall_share
        self.min_piece = min_piece(context)
        self._corpus = corpus  # and not its tokens: it pickles a memory map by name
        pieces = pack(corpus.lengths, context, np.random.default_rng((seed, _DOCUMENTS)))
        by_row = np.argsort(pieces.row, kind="stable")
        self._starts = (corpus.starts[pieces.document] + pieces.offset)[by_row]
        self._lengths = pieces.length[by_row]
        self._row_ptr = np.concatenate([[0], np.cumsum(np.bincount(pieces.row))])
        self._report = _report(corpus, pieces, context)
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    def __len__(self) -> int:
        """Return the rows of one epoch."""
        return len(self._row_ptr) - 1

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return (self.item(i) for i in range(len(self)))

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.item(index)

    def item(self, index: int) -> dict[str, torch.Tensor]:
        """Return row `index`, counted over all epochs (see the class for its tensors).

        Raises:
            IndexError: the index is below 0.
        """
        index = operator.index(index)
        if index < 0:
            raise IndexError(f"row {index}: rows are counted from 0 on")
        epoch, place = divmod(index, len(self))
        row = self._rows_of(epoch)[place]
        pieces = slice(self._row_ptr[row], self._row_ptr[row + 1])
        lengths = self._lengths[pieces]
        bounds = np.concatenate([[0], np.cumsum(lengths)])
        # One gather: a row of thousands of tiny documents costs no more than a row of one.
        source = np.repeat(self._starts[pieces] - bounds[:-1], lengths) + np.arange(bounds[-1])
        ids = self._corpus.tokens[source].astype(np.int64)
        plant(ids, bounds, index, self)
        return row_of(ids, bounds, self.context)

    def report(self) -> PackingReport:
        """Return what packing did in one epoch."""
        return self._report

    def check_enough(self, num_sequences: int, *, allow_repeat: bool) -> None:
        """Refuse a run that asks for more data than there is.

        Args:
            num_sequences: rows that the run will take.
            allow_repeat: whether rows may be taken more than once; even then there must be at
                least one row full of tokens.

        Raises:
            UsageError: there is too little data.
        """
        have, rows = self._report.tokens, len(self)
        numbers = (
            f"the run asks for {num_sequences:,} sequences of {self.context:,} tokens "
            f"({num_sequences * self.context:,} tokens), but the data hold {have:,} tokens "
            f"({rows:,} {'sequence' if rows == 1 else 'sequences'})"
        )
        if not allow_repeat and num_sequences > rows:
            raise UsageError(
                f"There is too little data: {numbers}. Give more data, take fewer steps or a "
                "smaller batch, or allow the data to be repeated."
            )
        if have < self.context:
            raise UsageError(
                f"There is too little data: {numbers}, less than one sequence. Give more data or "
                "a shorter context."
            )

    def _rows_of(self, epoch: int) -> np.ndarray:
        if self._order[0] != epoch:
            rng = np.random.default_rng((self.seed, _ROWS, epoch))
            self._order = (epoch, rng.permutation(len(self)))
        return self._order[1]


def row_of(ids: np.ndarray, bounds: np.ndarray, context: int) -> dict[str, torch.Tensor]:
    """Make a training sequence of pieces, each treated as a document.

    Args:
        ids: tokens of the pieces one after another, int64 [at most context].
        bounds: int64 [pieces + 1]: 0 and the end of each piece.
        context: tokens in the row; what is left of it is padding.

    Returns:
        The tensors that `PackedDataset` describes.
    """
    used = len(ids)
    ids = np.pad(ids, (0, context - used))
    if used < context:
        bounds = np.append(bounds, context)
    positions = np.arange(context) - np.repeat(bounds[:-1], np.diff(bounds))
    labels = np.full(context, IGNORE, dtype=np.int64)
    labels[: used - 1] = ids[1:used]
    labels[bounds[1:] - 1] = IGNORE
    return {
        "input_ids": torch.from_numpy(ids),
        "shift_labels": torch.from_numpy(labels),
        "position_ids": torch.from_numpy(positions),
        "cu_seqlens": torch.from_numpy(bounds.astype(np.int32)),
    }


class Planting(Protocol):
    """What decides which rows get recall text, and how much."""

    context: int
    seed: int
    recall: RecallText | None
    recall_share: float


def plant(ids: np.ndarray, bounds: np.ndarray, index: int, settings: Planting) -> None:
    """Plant recall text in place, if row `index` is one of those that get it.

    Args:
        ids, bounds: the pieces, as in `row_of`.
        index: of the row in the whole stream; with the seed it decides everything.
        settings: the dataset.
    """
    if settings.recall is None:
        return
    rng = np.random.default_rng((settings.seed, _RECALL, index))
    if rng.random() >= settings.recall_share:
        return
    lengths = np.diff(bounds)
    fits = lengths >= settings.recall.min_tokens
    if not fits.any():
        return
    share = np.where(fits, lengths, 0)
    pairs = rng.multinomial(settings.recall.num_pairs(settings.context), share / share.sum())
    for piece in np.flatnonzero(pairs):
        span = slice(bounds[piece], bounds[piece + 1])
        ids[span] = settings.recall.apply(ids[span], rng, pairs=int(pairs[piece]))


def check_recall(recall: RecallText | None, share: float) -> None:
    """Refuse a share of rows that makes no sense.

    Raises:
        UsageError: it is outside 0 to 1, or there is no recall text to plant.
    """
    if not 0.0 <= share <= 1.0:
        raise UsageError(f"The recall share is {share}, but must be from 0 to 1.")
    if share > 0 and recall is None:
        raise UsageError("A recall share above 0 needs `recall`: pass RecallText(tokenizer).")


def collate(batch: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Stack rows into a batch.

    Args:
        batch: rows of one context length.

    Returns:
        The same keys with a leading batch axis. Rows of `cu_seqlens` are made equally long by
        repeating their last entry: documents of no tokens at the end.
    """
    stacked = {
        key: torch.stack([row[key] for row in batch]) for key in batch[0] if key != "cu_seqlens"
    }
    ends = [row["cu_seqlens"] for row in batch]
    width = max(len(one) for one in ends)
    stacked["cu_seqlens"] = torch.stack(
        [torch.cat([one, one[-1:].expand(width - len(one))]) for one in ends]
    )
    return stacked


def _report(corpus: CorpusView, pieces: Pieces, context: int) -> PackingReport:
    lengths = corpus.lengths
    rows = int(pieces.row.max()) + 1
    padding = rows * context - corpus.num_tokens
    is_long = lengths > context
    in_pieces = np.bincount(pieces.document, minlength=len(lengths))
    long, cut = int(is_long.sum()), int(((in_pieces > 1) & ~is_long).sum())
    return PackingReport(
        documents=len(lengths),
        tokens=corpus.num_tokens,
        rows=rows,
        padding_tokens=padding,
        padding_rate=padding / (rows * context),
        long_documents=long,
        cut_documents=cut,
        truncation_rate=(long + cut) / len(lengths),
        predicted_tokens=corpus.num_tokens - len(pieces.row),
    )
