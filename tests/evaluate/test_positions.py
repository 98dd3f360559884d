from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from longgen.errors import UsageError
from longgen.evaluate import positions
from longgen.evaluate.positions import (
    lay_windows,
    loss_by_position,
    rows_of_windows,
    window_starts,
)

# The same float32 sums in another order: 32 products per logit, losses of a few nats.
EPS = 32 * 10 * torch.finfo(torch.float32).eps


def naive(model: LlamaForCausalLM, sequence: np.ndarray) -> np.ndarray:
    ids = torch.from_numpy(sequence)
    with torch.no_grad():
        logits = model(input_ids=ids[None, :-1]).logits[0].float()
    return F.cross_entropy(logits, ids[1:], reduction="none").double().numpy()


@pytest.fixture
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 600, 1000)


@pytest.mark.parametrize("chunk", [7, 64, 10_000])
def test_equals_whole_logits(
    model: LlamaForCausalLM, tokens: np.ndarray, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(positions, "LOGITS_PER_CHUNK", chunk * 600)
    sizes = []
    hook = model.lm_head.register_forward_hook(lambda m, args, out: sizes.append(len(args[0])))
    try:
        found = loss_by_position(model, tokens, 130, num_windows=4, num_buckets=4)
    finally:
        hook.remove()
    assert max(sizes) == min(chunk, 130) and sum(sizes) == 4 * 130

    starts = [0, 289, 579, 869]  # spread over the 1000 - 131 places a window may start
    losses = np.stack([naive(model, tokens[s : s + 131]) for s in starts])
    assert found.edges == (0, 32, 65, 97, 130)
    by_window = np.stack(
        [losses[:, a:b].mean(1) for a, b in ((0, 32), (32, 65), (65, 97), (97, 130))]
    )
    np.testing.assert_allclose(found.mean, by_window.mean(1), rtol=0, atol=EPS)
    error = by_window.std(1, ddof=1) / 2
    np.testing.assert_allclose(found.standard_error, error, rtol=0, atol=EPS)
    assert found.overall == pytest.approx(losses.mean(), abs=EPS)


def test_windows_do_not_overlap(model: LlamaForCausalLM, tokens: np.ndarray) -> None:
    seen: list[torch.Tensor] = []
    hook = model.model.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(kwargs["input_ids"][0]), with_kwargs=True
    )
    unique = np.arange(600)
    try:
        found = loss_by_position(model, unique, 100, num_windows=9, num_buckets=1)
        assert found.num_windows == len(seen) == 5
        assert len(torch.cat(seen).unique()) == 500
        # Exactly two windows and the last target: both ends of the text are used.
        seen.clear()
        found = loss_by_position(model, unique[:201], 100, num_windows=9, num_buckets=1)
        assert [int(window[0]) for window in seen] == [0, 100]
    finally:
        hook.remove()


def test_bos_goes_before_every_window(model: LlamaForCausalLM, tokens: np.ndarray) -> None:
    found = loss_by_position(
        model, tokens[:200], 100, num_windows=2, num_buckets=100, bos_token_id=0
    )
    halves = [np.concatenate([[0], tokens[a : a + 100]]) for a in (0, 100)]
    expected = np.mean([naive(model, half) for half in halves], axis=0)
    np.testing.assert_allclose(found.mean, expected, rtol=0, atol=EPS)


def test_single_window_has_no_error(model: LlamaForCausalLM, tokens: np.ndarray) -> None:
    done: list[tuple[int, int]] = []
    found = loss_by_position(
        model, tokens[:65], 64, num_buckets=2, progress=lambda a, b: done.append((a, b))
    )
    assert found.num_windows == 1 and found.standard_error is None and done == [(1, 1)]
    (row,) = found.rows("full")
    assert row["case"] == "loss.full" and row["value"] == found.overall and row["n"] == 1
    assert row["standard_error"] is None and row["edges"] == [0, 32, 64]


def test_too_little_text(model: LlamaForCausalLM, tokens: np.ndarray) -> None:
    with pytest.raises(UsageError, match=r"64 tokens.*context of 64 needs at least 65"):
        loss_by_position(model, tokens[:64], 64)


@pytest.mark.parametrize("counts", [{"num_windows": 0}, {"num_buckets": 0}, {"num_buckets": 65}])
def test_senseless_counts(
    model: LlamaForCausalLM, tokens: np.ndarray, counts: dict[str, int]
) -> None:
    with pytest.raises(UsageError, match="context of 64"):
        loss_by_position(model, tokens, 64, **counts)


@pytest.mark.parametrize("step_tokens", [8192, 50])
def test_a_hybrid_is_read_through_the_engines_cache(
    hybrid: Any, tokens: np.ndarray, monkeypatch: pytest.MonkeyPatch, step_tokens: int
) -> None:
    """Beyond the context, too, and whatever the pieces: the losses of a forward pass."""
    monkeypatch.setattr(positions, "STEP_TOKENS", step_tokens)
    found = loss_by_position(hybrid, tokens, 230, num_windows=3, num_buckets=2, bos_token_id=0)
    assert found.runtime == "longgen.engine"
    starts = [0, 385, 770]
    windows = [np.concatenate([[0], tokens[s : s + 230]]) for s in starts]
    losses = np.stack([naive(hybrid, window) for window in windows])
    np.testing.assert_allclose(found.by_window, losses.mean(1), rtol=0, atol=EPS)
    expected = [losses[:, :115].mean(), losses[:, 115:].mean()]
    np.testing.assert_allclose(found.mean, expected, rtol=0, atol=EPS)
    (row,) = found.rows("hybrid")
    assert row["by_window"] == list(found.by_window)


def test_eight_bits_change_the_loss_a_little(hybrid: Any, tokens: np.ndarray) -> None:
    settings: dict[str, Any] = {"num_windows": 3, "num_buckets": 2}
    own = loss_by_position(hybrid, tokens, 160, **settings)
    small = loss_by_position(hybrid, tokens, 160, kv_dtype="fp8", **settings)
    again = loss_by_position(hybrid, tokens, 160, kv_dtype="fp8", **settings)
    assert small == again
    changes = np.abs(np.subtract(small.mean, own.mean))
    assert (changes > EPS).all() and (changes < 0.05 * np.array(own.mean)).all()


def test_eight_bits_are_for_hybrids(model: LlamaForCausalLM, tokens: np.ndarray) -> None:
    with pytest.raises(UsageError, match=r"fp8 are for hybrids, .* LlamaForCausalLM isn't one"):
        loss_by_position(model, tokens, 64, kv_dtype="fp8")


class Repeater(torch.nn.Module):
    """Predict the same token again: sure of itself in a document of one token, wrong at its end."""

    config = LlamaConfig(vocab_size=50)
    device = torch.device("cpu")
    lm_head = torch.nn.Identity()

    def model(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=30.0 * F.one_hot(input_ids, 50))


def documents(*lengths: int) -> tuple[np.ndarray, list[int]]:
    """Return documents, each of one token again and again, and where they begin."""
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    return np.repeat(np.arange(len(lengths)), lengths), starts


def test_no_window_sees_a_second_document() -> None:
    model: Any = Repeater()
    text, starts = documents(130, 40, 215, 90)
    settings: dict[str, Any] = {"num_windows": 4, "num_buckets": 10}
    joined = loss_by_position(model, text, 100, **settings)
    # This is the artefact: the loss rises where a document begins.
    assert max(joined.mean) > 0.5 and joined.within_documents is None
    found = loss_by_position(model, text, 100, document_starts=starts, **settings)
    assert max(found.mean) < 1e-6
    assert found.starts == (0, 170, 284) and found.num_windows == 3
    (row,) = found.rows("full")
    assert row["starts"] == [0, 170, 284] and row["within_documents"] is True


def test_the_last_target_is_of_the_document_too() -> None:
    """A document of exactly `span` tokens is one window, and of one token less it is none."""
    model: Any = Repeater()
    for bos, span in ((None, 51), (0, 50)):
        settings: dict[str, Any] = {"num_buckets": 50, "bos_token_id": bos}
        text, starts = documents(*[span] * 8)
        found = loss_by_position(model, text, 50, document_starts=starts, **settings)
        assert list(found.starts) == starts and found.within_documents
        assert max(found.mean[1:]) < 1e-6
        text, starts = documents(span, span - 1, span)
        found = loss_by_position(model, text, 50, document_starts=starts, **settings)
        assert found.starts == (0, 2 * span - 1)


def test_without_a_document_long_enough_windows_lie_over_the_joined_text(
    model: LlamaForCausalLM, tokens: np.ndarray
) -> None:
    starts = [0, 100, 200, *range(290, 1000, 71)]
    found = loss_by_position(model, tokens, 100, num_windows=4, document_starts=starts)
    joined = loss_by_position(model, tokens, 100, num_windows=4)
    assert found.within_documents is False and found.rows("full")[0]["within_documents"] is False
    assert found.mean == joined.mean and found.starts == joined.starts == (0, 299, 599, 899)


def test_one_document_is_measured_as_text_without_any(
    model: LlamaForCausalLM, tokens: np.ndarray
) -> None:
    found = loss_by_position(model, tokens, 100, num_windows=4, document_starts=[0])
    joined = loss_by_position(model, tokens, 100, num_windows=4)
    assert (found.mean, found.by_window) == (joined.mean, joined.by_window)
    assert found.starts == joined.starts and found.within_documents is True


@pytest.mark.parametrize(
    ("lengths", "num_windows", "expected"),
    [
        # The first alone would have room for all, as would the last.
        ((900, 300, 900), 6, [0, 799, 900, 1099, 1200, 1999]),
        # The short one has room for one, and the others share what it leaves.
        ((900, 101, 900), 5, [0, 799, 900, 1001, 1800]),
        ((900, 101, 900), 8, [0, 266, 532, 799, 900, 1001, 1400, 1800]),
        # Fewer windows than documents are spread over them.
        ((150, 150, 150, 150, 150), 3, [0, 300, 600]),
        ((150, 150, 150), 1, [0]),
        ((20, 400, 100, 20), 9, [20, 169, 319]),
    ],
)
def test_documents_get_fair_shares(
    lengths: tuple[int, ...], num_windows: int, expected: list[int]
) -> None:
    _, starts = documents(*lengths)
    assert lay_windows(sum(lengths), 101, 100, num_windows, starts) == (expected, True)


@given(
    st.lists(st.integers(0, 60), min_size=1, max_size=12),
    st.integers(2, 20),
    st.integers(0, 1),
    st.integers(1, 20),
)
def test_windows_keep_to_documents_without_overlap(
    lengths: list[int], context: int, more: int, num_windows: int
) -> None:
    span = context + more
    _, begins = documents(*lengths)
    starts, within = lay_windows(sum(lengths), span, context, num_windows, begins)
    rooms = [1 + (n - span) // context if n >= span else 0 for n in lengths]
    assert within == any(rooms)
    if not within:
        assert starts == window_starts(sum(lengths), span, context, num_windows)
        return
    assert len(starts) == min(num_windows, sum(rooms))
    assert all(b - a >= context for a, b in pairwise(starts))
    ranges = [(begin, begin + n) for begin, n in zip(begins, lengths, strict=True)]
    inside = [[a <= start and start + span <= b for start in starts] for a, b in ranges]
    assert np.array(inside).sum() == len(starts)
    shares = np.array(inside).sum(1)
    for share, room in zip(shares, rooms, strict=True):
        assert share == room or share >= max(shares) - 1


@pytest.mark.parametrize("starts", [[], [5, 100], [0, 300, 200], [0, 1001]])
def test_senseless_documents(
    model: LlamaForCausalLM, tokens: np.ndarray, starts: list[int]
) -> None:
    with pytest.raises(UsageError, match=r"must begin at 0 .* the 1,000 tokens"):
        loss_by_position(model, tokens, 64, document_starts=starts)


def test_saved_rows_stay_where_their_windows_do_and_are_told_what_is_so() -> None:
    """A beginning-of-sequence token takes a token of text from each window."""
    for bos, lies in ((None, [0, 449, 899]), (5, [0, 450, 900])):
        row = {"length": 100, "starts": lies, "within_documents": False, "value": 1.0}
        other = {**row, "starts": [0, 448, 899]}

        def kept(
            documents: list[int] | None, bos: int | None = bos, rows: Any = (row, other)
        ) -> Any:
            return rows_of_windows(rows, 1000, 3, documents, bos)

        assert kept(None) == [row]
        assert kept([0]) == [{**row, "within_documents": True}]
        assert kept(list(range(0, 1000, 50))) == [row]
        assert kept([0, 500]) == []
        assert kept(None, None if bos else 5) == []
        # From before windows said where they lay: over the text as a whole.
        assert kept([0], rows=[{"length": 100}]) == [{"length": 100, "within_documents": True}]
