"""Pack tokenized documents into sequences once, and keep the result on disk as an index.

A packed set is a folder beside its tokens, which stay where they are:

- `pieces.npy`: int64 [pieces, 2], where each piece begins in the token stream and its length;
- `rows.npy`: int64 [rows], the end of each row in pieces;
- `heldout.npy`: int64 [documents, 2], the same of text that is in no row;
- `packed.json`: settings, tokenizer, where the tokens are, and the report. It is written last.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from longgen.checkpoint import write_json
from longgen.data.corpus import (
    CorpusView,
    TokenizedCorpus,
    check_made_by,
    default_heldout,
    split_heldout,
)
from longgen.data.rows import min_piece, pack
from longgen.data.shards import ShardedCorpus, open_tokens
from longgen.errors import UsageError

FORMAT = 1
PACKED_FILE, PIECES_FILE, ROWS_FILE, HELDOUT_FILE = (
    "packed.json",
    "pieces.npy",
    "rows.npy",
    "heldout.npy",
)
LONG_DOCUMENTS = ("cut", "truncate", "drop")
_DOCUMENTS = 0  # numbers apart the random streams of one seed


@dataclass(frozen=True, slots=True, kw_only=True)
class PackOptions:
    """Say what becomes of documents of all lengths.

    Attributes:
        context: tokens in a row.
        long_documents: what becomes of documents longer than `max_length`: "cut" into pieces of
            that length and a rest, "truncate" to the first piece, or "drop".
        max_length: the longest piece; None is the context.
        min_length: documents, and rests of cut ones, below this are left out.
        whole: never cut a document to fill space in rows; more of it stays empty.
        heldout_tokens: tokens that go into no row; None is `default_heldout`.
        seed: decides which of equally long documents go together, and which are held out.
    """

    context: int
    long_documents: str = "cut"
    max_length: int | None = None
    min_length: int = 1
    whole: bool = False
    heldout_tokens: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.context < 2:
            raise UsageError(f"The context is {self.context} tokens, but must be at least 2.")
        if self.long_documents not in LONG_DOCUMENTS:
            raise UsageError(
                f"long is {self.long_documents!r}; choose {', '.join(LONG_DOCUMENTS)}."
            )
        if not 2 <= self.limit <= self.context:
            raise UsageError(
                f"max_length is {self.limit:,}; give from 2 to the context ({self.context:,})."
            )
        if not 1 <= self.min_length <= self.limit:
            raise UsageError(
                f"min_length is {self.min_length:,}; give from 1 to the longest piece "
                f"({self.limit:,})."
            )
        if self.heldout_tokens is not None and self.heldout_tokens < 0:
            raise UsageError(f"heldout_tokens is {self.heldout_tokens}; give at least 0.")
        if self.seed < 0:
            raise UsageError(f"The seed is {self.seed}, but must be at least 0.")

    @property
    def limit(self) -> int:
        """The longest piece in tokens."""
        return self.context if self.max_length is None else self.max_length


@dataclass(frozen=True, slots=True)
class PackedReport:
    """Count what became of every token of a source.

    `tokens` = `heldout_tokens` + `short_tokens` + `dropped_tokens` + `truncated_tokens` +
    `rest_tokens` + `packed_tokens`, and `packed_tokens` + `padding_tokens` = `rows` x context.

    Attributes:
        documents, tokens: of the source.
        heldout_documents, heldout_tokens: held out; of a long document it may be the tail.
        short_documents, short_tokens: left out, as shorter than `min_length`.
        long_documents: longer than `max_length`.
        dropped_tokens, truncated_tokens: left out of those ("drop", "truncate").
        rest_tokens: left out as rests of cut documents shorter than `min_length`.
        cut_documents: not longer than `max_length`, and cut to fill space.
        packed_tokens, pieces, rows: what is in the set.
        padding_tokens, padding_rate: places that hold no document, and their share of all.
        predicted_tokens: labels; the first token of each piece isn't predicted.
    """

    documents: int
    tokens: int
    heldout_documents: int
    heldout_tokens: int
    short_documents: int
    short_tokens: int
    long_documents: int
    dropped_tokens: int
    truncated_tokens: int
    rest_tokens: int
    cut_documents: int
    packed_tokens: int
    pieces: int
    rows: int
    padding_tokens: int
    padding_rate: float
    predicted_tokens: int

    def to_dict(self) -> dict[str, Any]:
        """Return the counts as plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Packing:
    """Hold the index of a packed set before it is written (see the module for the arrays)."""

    pieces: np.ndarray
    rows: np.ndarray
    heldout: np.ndarray
    report: PackedReport


def pack_documents(corpus: CorpusView, options: PackOptions) -> Packing:
    """Choose, cut and pack the documents of a corpus; nothing is read but their lengths.

    Documents are chosen and cut by the options. The pieces then go whole into rows, the longest
    first, each into the fullest row that has space (best fit decreasing). Unless `whole`, the
    emptiest rows are then taken apart again and their pieces cut to fill the space in the others,
    as in `PackedDataset`; no part gets shorter than `min_piece` (1/256 of a row).

    Raises:
        UsageError: no document is left to pack, or more than half is to be held out.
    """
    tokens = options.heldout_tokens
    if tokens is None:
        tokens = default_heldout(corpus.num_tokens, options.context)
    nothing = np.empty(0, dtype=np.int64)
    train, held = corpus, CorpusView(corpus.tokens, nothing, nothing)
    if tokens:
        train, held = split_heldout(corpus, tokens=tokens, seed=options.seed)

    lengths, limit = train.lengths, options.limit
    short = lengths < options.min_length
    long = lengths > limit
    starts, sizes = train.starts[~short & ~long], lengths[~short & ~long]
    fitting = len(sizes)
    dropped = truncated = rests = 0
    if options.long_documents == "drop":
        dropped = int(lengths[long].sum())
    elif options.long_documents == "truncate":
        truncated = int((lengths[long] - limit).sum())
        starts = np.concatenate([starts, train.starts[long]])
        sizes = np.concatenate([sizes, np.full(int(long.sum()), limit, dtype=np.int64)])
    else:
        whole, rest = np.divmod(lengths[long], limit)
        first = np.repeat(train.starts[long], whole)
        number = np.arange(len(first)) - np.repeat(np.cumsum(whole) - whole, whole)
        kept = rest >= options.min_length
        rests = int(rest[~kept].sum())
        starts = np.concatenate(
            [starts, first + number * limit, (train.starts[long] + whole * limit)[kept]]
        )
        sizes = np.concatenate([sizes, np.full(len(first), limit, dtype=np.int64), rest[kept]])
    if not sizes.sum():
        raise UsageError(
            f"Nothing is left to pack: of {len(corpus):,} documents ({corpus.num_tokens:,} tokens) "
            f"{held.num_tokens:,} tokens are held out, {int(short.sum()):,} documents are shorter "
            f"than {options.min_length:,} tokens and {int(long.sum()):,} longer than {limit:,}. "
            "Give more data or other lengths."
        )
    rng = np.random.default_rng((options.seed, _DOCUMENTS))
    packed = pack(sizes, options.context, rng, fill=not options.whole)
    by_row = np.argsort(packed.row, kind="stable")
    pieces = np.stack([starts[packed.document] + packed.offset, packed.length], axis=1)[by_row]
    rows = np.cumsum(np.bincount(packed.row))
    in_pieces = np.bincount(packed.document, minlength=len(sizes))
    packed_tokens = int(packed.length.sum())
    places = len(rows) * options.context
    report = PackedReport(
        documents=len(corpus),
        tokens=corpus.num_tokens,
        heldout_documents=len(held),
        heldout_tokens=held.num_tokens,
        short_documents=int(short.sum()),
        short_tokens=int(lengths[short].sum()),
        long_documents=int(long.sum()),
        dropped_tokens=dropped,
        truncated_tokens=truncated,
        rest_tokens=rests,
        cut_documents=int((in_pieces[:fitting] > 1).sum()),
        packed_tokens=packed_tokens,
        pieces=len(pieces),
        rows=len(rows),
        padding_tokens=places - packed_tokens,
        padding_rate=(places - packed_tokens) / places,
        predicted_tokens=packed_tokens - len(pieces),
    )
    return Packing(pieces, rows, np.stack([held.starts, held.lengths], axis=1), report)


def identity_of(corpus: TokenizedCorpus | ShardedCorpus) -> str:
    """Return a hash of a tokenized corpus: of its boundaries, and of its text where it is known."""
    text = corpus.info.get("sha256") or corpus.info.get("input_sha256") or ""
    return hashlib.sha256(corpus.ends.astype("<i8").tobytes() + str(text).encode()).hexdigest()


def write_packed(
    folder: str | Path,
    name: str,
    tokens: str | Path,
    corpus: TokenizedCorpus | ShardedCorpus,
    packing: Packing,
    options: PackOptions,
    made_by: dict[str, Any],
    **more: Any,
) -> dict[str, Any]:
    """Write a packed set.

    Args:
        folder: where; made if missing.
        name: of the source.
        tokens: the folder of its tokens.
        corpus: those tokens, opened.
        packing: the index.
        options: that made it.
        made_by: the tokenizer's name, fingerprint and vocab_size.
        more: what else is to stand in packed.json.

    Returns:
        What was written to packed.json.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PACKED_FILE).unlink(missing_ok=True)
    np.save(folder / PIECES_FILE, packing.pieces)
    np.save(folder / ROWS_FILE, packing.rows)
    np.save(folder / HELDOUT_FILE, packing.heldout)
    info = {
        "format": FORMAT,
        "name": name,
        "options": asdict(options),
        "min_piece": min_piece(options.context),
        "tokenizer": made_by,
        "tokens": {
            "path": os.path.abspath(tokens),
            "relative_path": os.path.relpath(tokens, folder),
            "tokens": len(corpus.tokens),
            "identity": identity_of(corpus),
        },
        "sha256": _digest(packing.pieces, packing.rows, packing.heldout),
        "report": packing.report.to_dict(),
        **more,
    }
    write_json(folder / PACKED_FILE, info)
    return info


def _digest(*arrays: np.ndarray) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array, dtype="<i8").tobytes())
    return digest.hexdigest()


class PackedSet:
    """Read the rows of a packed set, in the order in which they are stored.

    Attributes:
        folder, name, info: where it is, the source's name, and its packed.json.
        context: tokens in a row.
        fingerprint: a hash of the rows and the tokens behind them.
    """

    def __init__(self, folder: str | Path) -> None:
        """Open a packed set.

        Raises:
            UsageError: it is damaged, or its tokens are gone or others.
        """
        self.folder = Path(folder)
        try:
            self.info = json.loads((self.folder / PACKED_FILE).read_text(encoding="utf-8"))
            if self.info["format"] != FORMAT:
                raise ValueError(f"format {self.info['format']}, this version reads {FORMAT}")
            self.name = str(self.info["name"])
            self.context = int(self.info["options"]["context"])
            arrays = [np.load(self.folder / f) for f in (PIECES_FILE, ROWS_FILE, HELDOUT_FILE)]
            if _digest(*arrays) != self.info["sha256"]:
                raise ValueError("its index is not the one that was written")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"The packed set in {self.folder} is damaged or cut off ({error}). Pack it again."
            ) from error
        self._pieces, self._rows, self._heldout = arrays
        self._tokens = self._open_tokens().tokens
        both = f"{self.info['sha256']} {self.info['tokens']['identity']} {self.context}"
        self.fingerprint = hashlib.sha256(both.encode()).hexdigest()

    def _open_tokens(self) -> CorpusView:
        wanted = self.info["tokens"]
        places = [self.folder / wanted["relative_path"], Path(wanted["path"])]
        place = next((path for path in places if path.is_dir()), None)
        if place is None:
            raise UsageError(
                f"The tokens of the packed set {self.folder} are gone: there is no folder "
                f"{places[1]}. Put them back there, or pack again."
            )
        corpus = open_tokens(place)
        if len(corpus.tokens) != wanted["tokens"] or identity_of(corpus) != wanted["identity"]:
            raise UsageError(
                f"The tokens in {place} are not those that {self.folder} was packed of. Pack again."
            )
        return corpus

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._rows)

    def row(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens of a row, int64 [at most context], and int64 [pieces + 1]: 0 and the
        end of each piece."""
        first = int(self._rows[number - 1]) if number else 0
        pieces = self._pieces[first : int(self._rows[number])]
        parts = [self._tokens[start : start + length] for start, length in pieces.tolist()]
        bounds = np.concatenate([[0], np.cumsum(pieces[:, 1])])
        return np.concatenate(parts).astype(np.int64), bounds

    def heldout(self, tokens: int) -> np.ndarray:
        """Return at most so many tokens of held-out documents, one after another."""
        parts = [np.empty(0, dtype=self._tokens.dtype)]
        for start, length in self._heldout.tolist():
            part = self._tokens[start : start + min(length, tokens)]
            parts.append(part)
            tokens -= len(part)
            if not tokens:
                break
        return np.concatenate(parts)

    @property
    def heldout_tokens(self) -> int:
        """Tokens of all held-out documents."""
        return int(self._heldout[:, 1].sum())

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Refuse a tokenizer other than the one that made the tokens.

        Raises:
            UsageError: the fingerprints differ.
        """
        check_made_by(self.info["tokenizer"], tokenizer, f"The packed set {self.folder}")
