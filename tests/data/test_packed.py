"""Packed sets: every token is in one row or reported, boundaries hold, and files are what was
packed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import longgen
from longgen.data import CorpusView
from longgen.data.packed import (
    LONG_DOCUMENTS,
    PackedSet,
    Packing,
    PackOptions,
    pack_documents,
    write_packed,
)
from longgen.data.rows import min_piece
from longgen.data.shards import open_tokens, write_shard
from longgen.errors import UsageError

ROOT = Path(longgen.__file__).parents[1]
MADE_BY = {"name": "t", "fingerprint": "f" * 64, "vocab_size": 100_000}


def view_of(lengths: Sequence[int]) -> CorpusView:
    """Return documents of the given lengths in which every token is another number."""
    ends = np.cumsum(lengths)
    return CorpusView(np.arange(ends[-1], dtype=np.uint32), ends - lengths, ends)


document_lengths = st.lists(
    st.one_of(st.integers(1, 12), st.integers(1, 90), st.integers(1, 700)), min_size=1, max_size=60
)


@st.composite
def all_options(draw: st.DrawFn) -> PackOptions:
    context = draw(st.one_of(st.integers(2, 300), st.integers(512, 1200)))
    limit = draw(st.one_of(st.none(), st.integers(2, context)))
    return PackOptions(
        context=context,
        long_documents=draw(st.sampled_from(LONG_DOCUMENTS)),
        max_length=limit,
        min_length=draw(st.one_of(st.just(1), st.integers(1, limit or context))),
        whole=draw(st.booleans()),
        heldout_tokens=draw(st.sampled_from([0, None])),
        seed=draw(st.integers(0, 3)),
    )


def spans(pieces: np.ndarray) -> list[int]:
    return [token for start, length in pieces.tolist() for token in range(start, start + length)]


# Rows that leave space, which only cut documents can fill.
TO_FILL = ([50] * 20, PackOptions(context=64, heldout_tokens=0))


@example(*TO_FILL)
@given(document_lengths, all_options())
def test_every_token_is_in_one_row_or_reported(lengths: list[int], options: PackOptions) -> None:
    corpus = view_of(lengths)
    try:
        packing = pack_documents(corpus, options)
    except UsageError as error:
        assert "Nothing is left to pack" in str(error)
        return
    report, pieces = packing.report, packing.pieces
    packed, held = spans(pieces), spans(packing.heldout)
    # Nothing twice, and what is missing is what the report says.
    assert len(set(packed) | set(held)) == len(packed) + len(held)
    left_out = (
        report.short_tokens + report.dropped_tokens + report.truncated_tokens + report.rest_tokens
    )
    assert (report.packed_tokens, report.heldout_tokens) == (len(packed), len(held))
    assert report.tokens == sum(lengths) == len(packed) + len(held) + left_out
    # No piece crosses a boundary, and no row is too long or empty.
    documents = np.searchsorted(corpus.ends, pieces[:, 0], side="right")
    assert (pieces.sum(axis=1) <= corpus.ends[documents]).all()
    assert (pieces[:, 1] > 0).all() and (pieces[:, 1] <= options.limit).all()
    content = [int(part[:, 1].sum()) for part in np.split(pieces, packing.rows[:-1])]
    assert len(content) == report.rows and packing.rows[-1] == report.pieces == len(pieces)
    assert all(0 < one <= options.context for one in content)
    assert report.padding_tokens == report.rows * options.context - len(packed)
    assert report.predicted_tokens == len(packed) - len(pieces)


@example(*TO_FILL)
@given(document_lengths, all_options())
def test_documents_are_chosen_and_cut_as_asked(lengths: list[int], options: PackOptions) -> None:
    """An oracle of its own goes through the documents one by one; nothing is held out here."""
    options = PackOptions(
        context=options.context,
        long_documents=options.long_documents,
        max_length=options.max_length,
        min_length=options.min_length,
        whole=options.whole,
        heldout_tokens=0,
    )
    expected: list[tuple[int, int]] = []
    start = 0
    for length in lengths:
        if length >= options.min_length and length <= options.limit:
            expected.append((start, length))
        elif length > options.limit and options.long_documents == "truncate":
            expected.append((start, options.limit))
        elif length > options.limit and options.long_documents == "cut":
            at = 0
            while length - at >= options.min_length and at < length:
                expected.append((start + at, min(options.limit, length - at)))
                at += options.limit
        start += length
    if not expected:
        with pytest.raises(UsageError, match="Nothing is left"):
            pack_documents(view_of(lengths), options)
        return
    packing = pack_documents(view_of(lengths), options)
    got = sorted(map(tuple, packing.pieces.tolist()))
    if options.whole:
        assert got == sorted(expected)
        assert packing.report.cut_documents == 0
        return
    # Cut to fill: the same tokens, in pieces that are not too short.
    assert sorted(spans(packing.pieces)) == sorted(
        token for at, length in expected for token in range(at, at + length)
    )
    uncut = set(expected)
    smallest = min_piece(options.context)
    assert all(piece in uncut or piece[1] >= smallest for piece in got)
    fitting = {(s, n) for s, n in expected if n <= options.limit}
    short_ones = {
        (int(end) - n, n)
        for end, n in zip(np.cumsum(lengths), lengths, strict=True)
        if n <= options.limit
    }
    assert packing.report.cut_documents == len((fitting & short_ones) - set(got))


def test_long_sources_are_cut_to_full_rows() -> None:
    """What ProLong does to code and books: rows of one document, no padding, rests left out."""
    options = PackOptions(context=64, min_length=64, heldout_tokens=0)
    report = pack_documents(view_of([200, 10, 64, 63, 129]), options).report
    assert (report.rows, report.pieces, report.padding_tokens) == (6, 6, 0)
    assert (report.short_documents, report.short_tokens, report.rest_tokens) == (2, 73, 9)


def write(folder: Path, lengths: Sequence[int]) -> Path:
    """Write documents of numbered tokens as two shards."""
    folder.mkdir(parents=True)
    tokens = np.arange(sum(lengths), dtype="<u2")
    first = len(lengths) // 2
    cut = sum(lengths[:first])
    for name, ids, sizes in (
        ("0", tokens[:cut], lengths[:first]),
        ("1", tokens[cut:], lengths[first:]),
    ):
        (folder / "tokens").write_bytes(ids.tobytes())
        write_shard(folder, name, folder / "tokens", np.cumsum(sizes))
    return folder


LENGTHS = [int(n) for n in np.random.default_rng(0).integers(1, 150, 60)]


def make(tmp_path: Path, **options: Any) -> tuple[Path, Packing]:
    tokens = write(tmp_path / "tokens", LENGTHS)
    corpus = open_tokens(tokens)
    chosen = PackOptions(**{"context": 64, **options})
    packing = pack_documents(corpus, chosen)
    write_packed(tmp_path / "packed", "s", tokens, corpus, packing, chosen, MADE_BY)
    return tmp_path / "packed", packing


def test_rows_come_back_from_disk(tmp_path: Path) -> None:
    folder, packing = make(tmp_path)
    packed = PackedSet(folder)
    assert len(packed) == packing.report.rows and packed.context == 64
    seen: list[int] = []
    for number in range(len(packed)):
        ids, bounds = packed.row(number)
        assert bounds[0] == 0 and bounds[-1] == len(ids) <= 64
        for start, end in zip(bounds, bounds[1:], strict=False):
            # Tokens are numbers in a row: a piece of one document has no gap.
            assert (np.diff(ids[start:end]) == 1).all()
        seen += ids.tolist()
    held = packed.heldout(10**6).tolist()
    assert sorted(seen + held) == list(range(sum(LENGTHS)))
    assert packed.heldout_tokens == len(held) > 0
    assert packed.heldout(10).tolist() == held[:10]
    assert len(packed.heldout(0)) == 0


def test_a_moved_folder_finds_its_tokens_and_changed_ones_are_refused(tmp_path: Path) -> None:
    folder, _ = make(tmp_path / "a")
    before = PackedSet(folder).fingerprint
    shutil.move(tmp_path / "a", tmp_path / "b")
    assert PackedSet(tmp_path / "b" / "packed").fingerprint == before
    shutil.rmtree(tmp_path / "b" / "tokens")
    with pytest.raises(UsageError, match="are gone: there is no folder"):
        PackedSet(tmp_path / "b" / "packed")
    write(tmp_path / "b" / "tokens", [1, *LENGTHS[1:-1], LENGTHS[-1] + LENGTHS[0] - 1])
    with pytest.raises(UsageError, match="are not those that"):
        PackedSet(tmp_path / "b" / "packed")


def test_damaged_sets_are_refused(tmp_path: Path) -> None:
    folder, _ = make(tmp_path)
    for name in ("pieces.npy", "rows.npy", "heldout.npy"):
        kept = (folder / name).read_bytes()
        (folder / name).write_bytes(kept[:-8] + bytes([kept[-8] ^ 1]) + kept[-7:])
        with pytest.raises(UsageError, match="damaged or cut off"):
            PackedSet(folder)
        (folder / name).unlink()
        with pytest.raises(UsageError, match="damaged or cut off"):
            PackedSet(folder)
        (folder / name).write_bytes(kept)
    info = folder / "packed.json"
    info.write_text(json.dumps({**json.loads(info.read_text()), "format": 9}))
    with pytest.raises(UsageError, match="format 9, this version reads 1"):
        PackedSet(folder)


def test_another_process_packs_the_same() -> None:
    program = (
        "import hashlib, numpy as np\n"
        "from longgen.data import CorpusView\n"
        "from longgen.data.packed import PackOptions, pack_documents\n"
        "n = np.random.default_rng(5).integers(1, 3000, 500); e = np.cumsum(n)\n"
        "p = pack_documents(CorpusView(np.arange(e[-1]), e - n, e), PackOptions(context=1024))\n"
        "h = hashlib.sha256(p.pieces.tobytes() + p.rows.tobytes() + p.heldout.tobytes())\n"
        "print(h.hexdigest())\n"
    )
    prints = []
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed}
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True
        )
        prints.append(done.stdout.strip())
    lengths = np.random.default_rng(5).integers(1, 3000, 500)
    here = pack_documents(view_of(lengths.tolist()), PackOptions(context=1024))
    digest = hashlib.sha256(here.pieces.tobytes() + here.rows.tobytes() + here.heldout.tobytes())
    assert prints == [digest.hexdigest()] * 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"context": 1}, "context is 1 tokens"),
        ({"long_documents": "keep"}, "long is 'keep'; choose cut, truncate, drop"),
        ({"max_length": 65}, r"max_length is 65; give from 2 to the context \(64\)"),
        ({"max_length": 32, "min_length": 33}, "min_length is 33; give from 1 to the longest"),
        ({"min_length": 0}, "min_length is 0"),
        ({"heldout_tokens": -1}, "heldout_tokens is -1"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        PackOptions(**{"context": 64, **options})
