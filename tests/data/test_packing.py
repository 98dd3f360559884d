"""Packing: every token once an epoch, no look across documents, any row at any time."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from longgen.data import CorpusView, PackedDataset, RecallText, collate
from longgen.data.rows import _best_fit_decreasing
from longgen.errors import UsageError

Row = dict[str, torch.Tensor]


def view_of(lengths: Sequence[int]) -> CorpusView:
    """Return documents of the given lengths in which every token is another number, from 1 on.

    There are tokens between the documents that belong to none, as in a view of a larger corpus.
    """
    starts = 1 + np.cumsum([0, *(n + 3 for n in lengths[:-1])])
    ends = starts + lengths
    return CorpusView(np.arange(ends[-1] + 5, dtype=np.uint32), starts, ends)


def pieces_of(row: Row) -> list[np.ndarray]:
    """Return the tokens of each piece of a row, without padding (token 0)."""
    bounds = row["cu_seqlens"].tolist()
    pieces = [row["input_ids"][a:b].numpy() for a, b in zip(bounds, bounds[1:], strict=False)]
    return [piece for piece in pieces if piece[0] != 0]


document_lengths = st.lists(
    st.one_of(st.integers(1, 12), st.integers(1, 90), st.integers(1, 700)), min_size=1, max_size=60
)


contexts = st.one_of(st.integers(2, 300), st.integers(512, 1200))


@given(document_lengths, contexts, st.integers(0, 5))
def test_every_token_is_in_one_row_of_an_epoch(lengths: list[int], context: int, seed: int) -> None:
    view = view_of(lengths)
    data = PackedDataset(view, context=context, seed=seed)
    of_document = np.zeros(len(view.tokens), dtype=int)
    for i, (start, end) in enumerate(zip(view.starts, view.ends, strict=True)):
        of_document[start:end] = i + 1
    rows = list(data)
    seen: list[int] = []
    cut: set[int] = set()
    num_pieces = 0
    for row in rows:
        for piece in pieces_of(row):
            assert (np.diff(piece) == 1).all()
            documents = set(of_document[piece].tolist())
            assert len(documents) == 1
            length = lengths[next(iter(documents)) - 1]
            if len(piece) < length:
                cut |= documents
                assert len(piece) >= data.min_piece or length > context
            seen += piece.tolist()
            num_pieces += 1
    assert sorted(seen) == np.flatnonzero(of_document).tolist()

    report = data.report()
    fits = {i + 1 for i, n in enumerate(lengths) if n <= context}
    padding = sum(int((row["input_ids"] == 0).sum()) for row in rows)
    assert report.rows == len(data) == len(rows)
    assert report.tokens == len(seen)
    assert report.padding_tokens == padding == len(rows) * context - len(seen)
    assert report.long_documents == len(lengths) - len(fits)
    assert report.cut_documents == len(cut & fits)
    assert report.truncation_rate == len(cut) / len(lengths)
    assert report.predicted_tokens == len(seen) - num_pieces
    # Every row but about one is filled up to less than two smallest pieces.
    assert padding < 2 * data.min_piece * len(rows) + 2 * context


@given(document_lengths, contexts, st.integers(0, 500))
def test_rows_treat_each_piece_as_a_document(lengths: list[int], context: int, index: int) -> None:
    view = view_of(lengths)
    row = PackedDataset(view, context=context, seed=0)[index]
    ids, bounds = row["input_ids"], row["cu_seqlens"].tolist()
    assert {key: (value.dtype, tuple(value.shape)) for key, value in row.items()} == {
        "input_ids": (torch.int64, (context,)),
        "shift_labels": (torch.int64, (context,)),
        "position_ids": (torch.int64, (context,)),
        "cu_seqlens": (torch.int32, (len(bounds),)),
    }
    assert bounds[0] == 0
    assert bounds[-1] == context
    for start, end in zip(bounds, bounds[1:], strict=False):
        assert start < end
        assert row["position_ids"][start:end].tolist() == list(range(end - start))
        is_padding = int(ids[start]) == 0
        assert not ids[start:end].any() if is_padding else ids[start:end].all()
        assert end == context or not is_padding
        following = [-100] * (end - start - 1) if is_padding else ids[start + 1 : end].tolist()
        assert row["shift_labels"][start:end].tolist() == [*following, -100]


@given(document_lengths, st.integers(2, 200))
def test_best_fit_decreasing_is_that_of_the_textbook(lengths: list[int], context: int) -> None:
    falling = sorted((min(n, context) for n in lengths), reverse=True)
    rows = _best_fit_decreasing(np.asarray(falling), context)
    content: list[int] = []
    for length in falling:
        fits = [i for i, used in enumerate(content) if used + length <= context]
        if not fits:
            content.append(0)
            fits = [len(content) - 1]
        content[max(fits, key=lambda i: content[i])] += length
    assert sorted(np.bincount(rows, weights=falling)) == sorted(content)


def test_space_is_filled_by_cutting_the_next_documents() -> None:
    report = PackedDataset(view_of([600] * 100), context=1000, seed=0).report()
    assert report.rows == 60  # and not 100, as of whole documents
    assert report.padding_tokens == 0
    assert report.cut_documents == 40


def test_no_cut_leaves_less_than_the_smallest_piece() -> None:
    # The document of 125 tokens is cut to go into spaces of 124, but not into 124 + 1.
    data = PackedDataset(view_of([900] * 4 + [125]), context=1024, seed=0)
    assert data.min_piece == 4
    lengths = sorted(len(piece) for row in data for piece in pieces_of(row))
    assert lengths == [4, 121] + [900] * 4


def test_a_long_document_fills_rows_alone() -> None:
    rows = list(PackedDataset(view_of([100, 12]), context=16, seed=0))
    pieces = [pieces_of(row) for row in rows]
    assert sorted(len(p) for p in pieces) == [1] * 6 + [2]
    assert sorted(len(piece) for row in pieces for piece in row) == [4, 12] + [16] * 6


def test_rows_depend_on_seed_and_index_alone() -> None:
    lengths = list(np.random.default_rng(0).integers(1, 400, 200))
    one = PackedDataset(view_of(lengths), context=128, seed=7)
    two = pickle.loads(pickle.dumps(PackedDataset(view_of(lengths), context=128, seed=7)))
    size = len(one)
    indices = [3, size + 3, 0, 5 * size + 1, size - 1, 2 * size]
    forwards = {i: one[i] for i in indices}
    for i in sorted(indices, reverse=True):
        row = two.item(np.int64(i))
        assert all(torch.equal(row[key], forwards[i][key]) for key in row)


def test_another_seed_makes_other_rows() -> None:
    def rows(seed: int) -> list[tuple[int, ...]]:
        data = PackedDataset(view_of([50] * 64), context=100, seed=seed)
        return [tuple(row["input_ids"].tolist()) for row in data]

    assert rows(0) == rows(0)
    assert set(rows(0)) != set(rows(1))  # other documents together, not just another order


def test_pickling_does_not_copy_the_tokens(tmp_path: Path) -> None:
    view = view_of([5000] * 20)
    view.tokens.tofile(tmp_path / "tokens")
    view.tokens = np.memmap(tmp_path / "tokens", dtype=np.uint32, mode="r")
    data = PackedDataset(view, context=1000, seed=0)
    pickled = pickle.dumps(data)
    assert len(pickled) < view.tokens.nbytes / 10
    assert torch.equal(pickle.loads(pickled)[3]["input_ids"], data[3]["input_ids"])


def test_each_epoch_has_all_rows_in_another_order() -> None:
    data = PackedDataset(view_of([50] * 64), context=100, seed=0)
    epochs = [
        [tuple(data[epoch * len(data) + i]["input_ids"].tolist()) for i in range(len(data))]
        for epoch in range(3)
    ]
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert len({frozenset(epoch) for epoch in epochs}) == 1
    assert len(list(data)) == len(data) == 32
    with pytest.raises(IndexError, match="row -1"):
        data[-1]


def test_collate_makes_boundaries_equally_long() -> None:
    data = PackedDataset(view_of([16, 5, 4, 3, 2, 2]), context=16, seed=0)
    batch = next(iter(DataLoader(data, batch_size=2, collate_fn=collate)))
    assert batch["input_ids"].shape == batch["shift_labels"].shape == (2, 16)
    assert batch["cu_seqlens"].dtype == torch.int32
    assert sorted(batch["cu_seqlens"].tolist()) == [[0, 5, 9, 12, 14, 16], [0] + [16] * 5]
    assert collate([data[0]])["position_ids"].shape == (1, 16)


def test_too_little_data_is_refused_with_the_numbers() -> None:
    data = PackedDataset(view_of([100] * 10), context=100, seed=0)
    data.check_enough(10, allow_repeat=False)
    data.check_enough(1000, allow_repeat=True)
    with pytest.raises(UsageError) as error:
        data.check_enough(11, allow_repeat=False)
    for part in ("11 sequences of 100", "1,100 tokens", "hold 1,000 tokens", "10 sequences"):
        assert part in str(error.value)
    small = PackedDataset(view_of([30, 40]), context=100, seed=0)
    for repeat in (False, True):
        with pytest.raises(UsageError, match=r"hold 70 tokens \(1 sequence\), less than one"):
            small.check_enough(1, allow_repeat=repeat)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"context": 1}, "context is 1 tokens"),
        ({"seed": -1}, "seed is -1"),
        ({"recall_share": 1.5}, "recall share is 1.5"),
        ({"recall_share": float("nan")}, "recall share is nan"),
        ({"recall_share": 0.5}, "needs `recall`"),
    ],
)
def test_values_that_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        PackedDataset(view_of([5]), **{"context": 8, "seed": 0, **options})


def test_no_tokens_are_refused() -> None:
    empty = CorpusView(np.zeros(0, dtype=np.uint16), np.zeros(0), np.zeros(0))
    with pytest.raises(UsageError, match="no tokens to pack"):
        PackedDataset(empty, context=8, seed=0)


def without_and_with(recall: RecallText, lengths: list[int]) -> tuple[PackedDataset, PackedDataset]:
    """Pack documents whose every token stands once, above the vocabulary of 320, plain and with
    recall text in every row."""
    view = view_of(lengths)
    view.tokens = view.tokens + 1000
    plain = PackedDataset(view, context=2000, seed=0)
    return plain, PackedDataset(view, context=2000, seed=0, recall=recall, recall_share=1.0)


def test_recall_stays_within_pieces(tokenizer: Any) -> None:
    recall = RecallText(tokenizer, kinds="codes", records_per_sequence=4)
    # Pieces below recall.min_tokens, some above, and one of a whole row.
    lengths = [recall.min_tokens - 1] * 8 + [900] * 24 + [5000, 1500]
    # No token of the vocabulary of 320, so that what was planted shows.
    plain, data = without_and_with(recall, lengths)
    all_pairs = 0
    for before, after in zip(plain, data, strict=True):
        assert torch.equal(before["cu_seqlens"], after["cu_seqlens"])
        changed = before["input_ids"] != after["input_ids"]
        bounds = after["cu_seqlens"].tolist()
        pairs = 0
        for start, end in zip(bounds, bounds[1:], strict=False):
            piece, touched = after["input_ids"][start:end], changed[start:end]
            assert not touched[0]
            assert not touched[-1]
            if end - start < recall.min_tokens or not before["input_ids"][start]:
                assert not touched.any()
            text = tokenizer.decode(piece[touched])
            assert text.count("Record ") == text.count("Lookup: ")
            pairs += text.count("Record ")
            assert after["shift_labels"][start : end - 1].tolist() == [
                int(token) or -100 for token in piece[1:]
            ]
            assert after["shift_labels"][end - 1] == -100
        assert pairs <= 4
        all_pairs += pairs
    assert all_pairs >= 3 * len(data)  # a few are lost where a piece is too crowded


def test_copies_stay_within_pieces(tokenizer: Any) -> None:
    recall = RecallText(tokenizer, records_per_sequence=8, kinds="facts,copies")
    lengths = [1, 2, recall.min_tokens - 1, recall.min_tokens] * 6 + [900] * 12 + [2000] * 3
    # Every token stands once, so that a copy tells where it comes from.
    plain, data = without_and_with(recall, lengths)
    copied = 0
    for before, after in zip(plain, data, strict=True):
        for ids, planted in zip(pieces_of(before), pieces_of(after), strict=True):
            changed = planted != ids
            if len(ids) < recall.min_tokens:
                assert not changed.any()
            tokens = planted[changed & (planted >= 1000)]
            assert np.isin(tokens, ids).all()
            copied += len(tokens)
    assert copied > 16 * len(data)


def test_share_of_rows_with_recall_is_a_function_of_the_index(tokenizer: Any) -> None:
    view = view_of([200] * 300)
    plain = PackedDataset(view, context=200, seed=0)
    data, again = (
        PackedDataset(
            view, context=200, seed=0, recall=RecallText(tokenizer, kinds="codes"), recall_share=0.3
        )
        for _ in range(2)
    )
    planted = [not torch.equal(plain[i]["input_ids"], data[i]["input_ids"]) for i in range(600)]
    # Binomial: 5 standard deviations on either side.
    assert abs(sum(planted) - 180) < 5 * (600 * 0.3 * 0.7) ** 0.5
    assert planted[:300] != planted[300:]  # another choice in another epoch
    for i in (599, 4, 301, 4):
        assert torch.equal(again[i]["input_ids"], data[i]["input_ids"])
    none = PackedDataset(view, context=200, seed=0, recall=RecallText(tokenizer, kinds="codes"))
    assert all(torch.equal(none[i]["input_ids"], plain[i]["input_ids"]) for i in range(50))
