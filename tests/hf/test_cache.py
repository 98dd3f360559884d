"""The hybrid cache: exactly the tokens that the pattern still needs, and nothing hidden behind."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, StaticCache

from longgen.errors import UsageError
from longgen.hf import HybridCache, SparseLayer, cache_bytes
from longgen.hf.cache import cache_layout
from longgen.layout import PADDING
from longgen.pattern import SparsePattern
from longgen.plan import LayerPlan

Make = Callable[..., Any]


@pytest.fixture(autouse=True)
def no_grad() -> Any:
    with torch.no_grad():
        yield


@st.composite
def patterns(draw: st.DrawFn) -> SparsePattern:
    stride = draw(st.integers(0, 5))
    return SparsePattern(
        block_size=draw(st.integers(1, 6)),
        sink_blocks=draw(st.integers(0, 2)),
        local_blocks=draw(st.integers(1, 3)),
        stride_blocks=stride,
        head_shift=draw(st.integers(0, 4)) if stride else 0,
    )


def numbered(start: int, length: int, rows: int, heads: int) -> torch.Tensor:
    """Give keys (rows, heads, length, 2) that say which column, row and head they are of."""
    column = torch.arange(start, start + length).view(1, 1, -1, 1).expand(rows, heads, -1, 1)
    place = torch.arange(rows * heads).view(rows, heads, 1, 1).expand_as(column)
    return torch.cat([column, place], -1).double()


def columns(states: torch.Tensor, row: int, head: int, heads: int) -> np.ndarray:
    """Read off which columns `states` hold in one row and head, and that they are its own."""
    own = states[row, head]
    assert (own[:, 1] == row * heads + head).all()
    return own[:, 0].long().numpy()


@settings(max_examples=150)
@given(
    pattern=patterns(),
    heads=st.integers(1, 3),
    paddings=st.lists(st.integers(0, 15), min_size=1, max_size=3),
    chunks=st.lists(st.integers(1, 17), min_size=1, max_size=6),
)
def test_layers_hold_what_later_queries_see(
    pattern: SparsePattern, heads: int, paddings: list[int], chunks: list[int]
) -> None:
    """Any pattern, heads, left padding and chunks, against the rule itself, token by token."""
    cache = HybridCache(LayerPlan("S", pattern))
    cache.set_paddings(paddings)
    layer, rows, seen = cache.layers[0], len(paddings), 0
    for length in chunks:
        keys = numbered(seen, length, rows, heads)
        got, values = layer.update(keys, -keys)
        assert torch.equal(got, -values) and torch.equal(layer.keys, -layer.values)
        layout = cache_layout(pattern, seen, length, tuple(paddings), heads)
        q_documents, q_places = layout.query_places()
        k_documents, k_places = layout.key_places()
        before, seen = seen, seen + length
        for row, padding in enumerate(paddings):
            for head in range(heads):
                # What the layout says of the keys that this step attends to is what they are.
                at = (min(row, len(k_places) - 1), min(head, k_places.shape[1] - 1))
                real = k_documents[at] != PADDING
                offered = columns(got, row, head, heads)[real] - padding
                assert (offered == k_places[at][real]).all()
                # Every query finds what it may see.
                q_row = min(row, len(q_places) - 1)
                real = q_documents[q_row] != PADDING
                queries = np.arange(before, seen)[real] - padding
                assert (queries == q_places[q_row][real]).all()
                assert len(queries) == min(length, max(seen - padding, 0))
                for query in queries:
                    past = np.arange(query + 1)
                    assert set(past[pattern.visible(query, past, head)]) <= set(offered)
                # What stays is what some later query sees; rows are only filled up to the longest.
                past = np.arange(max(seen - padding, 0))
                horizon = pattern.block_size * (pattern.local_blocks + pattern.stride_blocks + 1)
                later = np.arange(horizon)[:, None] + len(past)
                needed = past[pattern.visible(later, past[None], head).any(0)]
                held = columns(layer.keys, row, head, heads) - padding
                assert (held[: len(needed)] == needed).all()
        longest = max(pattern.cache_length(max(seen - p, 0), heads) for p in paddings)
        assert layer.keys.shape == (rows, heads, longest, 2)
    assert layer.get_seq_length() == cache.get_seq_length() == seen


def planned_bytes(config: Any, length: int, batch: int = 1, paddings: Any = (0,)) -> int:
    plan, heads = config.layer_plan, config.num_key_value_heads
    kept = sum(
        max(plan.pattern.cache_length(length - padding, heads) for padding in paddings)
        if kind == "S"
        else length
        for kind in plan.layers
    )
    return 2 * kept * batch * heads * config.head_dim * 4


def assert_nothing_hidden(cache: HybridCache) -> None:
    for layer in cache.layers:
        for states in (layer.keys, layer.values):
            assert states.untyped_storage().nbytes() == states.numel() * states.element_size()


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("length", [1, 4, 5, 12, 13, 16, 47, 48, 49])
def test_bytes_after_prefill(model: Any, tokens: Make, length: int, batch: int) -> None:
    cache = model(tokens(batch, length)).past_key_values
    assert cache_bytes(cache) == planned_bytes(model.config, length, batch)
    assert_nothing_hidden(cache)


def test_a_window_alone_holds_no_more_than_itself(build: Make, tokens: Make) -> None:
    """What stays is one slice, which must be copied out of the chunk that it came in."""
    model = build(pattern=SparsePattern(block_size=4, sink_blocks=0, local_blocks=2))
    cache = HybridCache(model.config)
    for length in (33, 50, 51, 90):
        model(tokens(1, length)[:, cache.get_seq_length() :], past_key_values=cache)
        assert cache_bytes(cache) == planned_bytes(model.config, length)
        assert_nothing_hidden(cache)


def test_bytes_while_decoding_across_blocks(hybrid: Any, tokens: Make) -> None:
    model = hybrid.model
    cache = model(tokens(2, 30)).past_key_values
    for length in range(31, 50):
        model(tokens(2, 1), past_key_values=cache)
        assert cache_bytes(cache) == planned_bytes(model.config, length, 2), length
        assert_nothing_hidden(cache)


def test_bytes_of_a_left_padded_batch(model: Any, tokens: Make) -> None:
    paddings = (0, 13, 30)
    mask = (torch.arange(60) >= torch.tensor(paddings)[:, None]).long()
    cache = HybridCache(model.config)
    for stop in (40, *range(41, 61)):
        start = cache.get_seq_length()
        model(tokens(3, stop)[:, start:], attention_mask=mask[:, :stop], past_key_values=cache)
        assert cache_bytes(cache) == planned_bytes(model.config, stop, 3, paddings)
        assert_nothing_hidden(cache)


def test_bytes_after_beams_and_selection(model: Any, tokens: Make) -> None:
    cache = model(tokens(4, 50)).past_key_values
    cache.reorder_cache(torch.tensor([1, 1, 0, 3]))
    assert cache_bytes(cache) == planned_bytes(model.config, 50, 4)
    cache.batch_select_indices(torch.tensor([2]))
    assert cache_bytes(cache) == planned_bytes(model.config, 50, 1)
    assert_nothing_hidden(cache)


def test_chunked_prefill_never_holds_more_than_kept_and_chunk(
    model: Any, tokens: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunk, length, taken = 16, 500, []
    update = SparseLayer.update

    def spy(layer: SparseLayer, keys: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        held = 0 if layer.keys is None else layer.keys.shape[2]
        new = update(layer, keys, *args, **kwargs)
        assert new[0].shape[2] == held + keys.shape[2]
        assert new[0].untyped_storage().nbytes() == new[0].numel() * 4
        taken.append((layer.seen, new[0].shape[2], layer.keys.shape[2]))
        return new

    monkeypatch.setattr(SparseLayer, "update", spy)
    out = model.generate(
        tokens(1, length),
        max_new_tokens=2,
        do_sample=False,
        prefill_chunk_size=chunk,
        return_dict_in_generate=True,
    )
    pattern, heads = model.config.layer_plan.pattern, model.config.num_key_value_heads
    most = max(pattern.cache_length(seen, heads) for seen in range(1, length))
    assert len(taken) == 2 * (-(-length // chunk) + 1), "every step of both sparse layers was seen"
    for seen, attended, held in taken:
        assert attended <= most + chunk and held == pattern.cache_length(seen, heads)
    assert cache_bytes(out.past_key_values) == planned_bytes(model.config, length + 1)


def test_cache_bytes_counts_whole_allocations_once() -> None:
    cache = DynamicCache()
    states = torch.zeros(1, 2, 10, 8)
    cache.update(states, states, 0)
    cache.layers[0].keys = states[:, :, :1]
    cache.layers[0].values = states[:, :, 1:2]
    assert cache_bytes(cache) == states.numel() * 4
    assert cache_bytes(HybridCache(LayerPlan("SF", SparsePattern()))) == 0


def test_a_pattern_that_keeps_nothing_at_block_borders(
    build: Make, tokens: Make, expect: Make
) -> None:
    pattern = SparsePattern(block_size=4, sink_blocks=0, local_blocks=1)
    expected = expect(build(pattern=pattern), [tokens(30)])
    ids = tokens(30)[None].repeat(2, 1)
    cache = expected.model(ids[:, :8]).past_key_values
    assert cache.layers[0].keys.shape[2] == 0
    cache.reorder_cache(torch.tensor([1, 0]))
    logits = expected.model(ids[:, 8:], past_key_values=cache).logits
    expected.check("after the border", logits[1], start=8)


def test_reset_forgets_everything(hybrid: Any, tokens: Make) -> None:
    """Left padding of an earlier use must not blank the next one's tokens."""
    mask = (torch.arange(30) >= torch.tensor([7, 0])[:, None]).long()
    cache = HybridCache(hybrid.model.config)
    hybrid.model(tokens(2, 30), attention_mask=mask, past_key_values=cache)
    cache.reset()
    assert cache.get_seq_length() == 0 and cache_bytes(cache) == 0 and set(cache.paddings) == {0}
    ids = hybrid.rows[0][None]
    hybrid.check("after reset", hybrid.model(ids[:, :50], past_key_values=cache).logits[0])
    hybrid.check("and on", hybrid.model(ids[:, 50:], past_key_values=cache).logits[0], start=50)


@pytest.mark.parametrize("operation", ["reorder", "repeat", "select"])
def test_rows_move_with_their_padding(hybrid: Any, tokens: Make, operation: str) -> None:
    """Rows of a left-padded cache are shuffled, repeated, dropped; each goes on as if alone."""
    rows, start = hybrid.rows[:2], 55
    ids = torch.stack([rows[0], torch.cat([tokens(13), rows[1]])])
    mask = (torch.arange(61) >= torch.tensor([0, 13])[:, None]).long()
    cache = HybridCache(hybrid.model.config)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    hybrid.model(
        ids[:, :start],
        attention_mask=mask[:, :start],
        position_ids=positions[:, :start],
        past_key_values=cache,
    )
    if operation == "reorder":
        order = [1, 0]
        cache.reorder_cache(torch.tensor(order))
    elif operation == "repeat":
        order = [0, 0, 1, 1]
        cache.batch_repeat_interleave(2)
    else:
        order = [1]
        cache.batch_select_indices(torch.tensor(order))
    assert cache.paddings == tuple((0, 13)[row] for row in order)
    logits = hybrid.model(
        ids[order, start:],
        attention_mask=mask[order],
        position_ids=positions[order, start:],
        past_key_values=cache,
    ).logits
    for place, row in enumerate(order):
        hybrid.check(f"row {row}", logits[place], row, len(rows[row]) - (61 - start))


@pytest.mark.parametrize("how", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_a_copy_goes_its_own_way(hybrid: Any, tokens: Make, how: Make) -> None:
    ids = hybrid.rows[0][None]
    cache = hybrid.model(ids[:, :40]).past_key_values
    branch = how(cache)
    hybrid.model(tokens(1, 9), past_key_values=cache)
    assert (cache.get_seq_length(), branch.get_seq_length()) == (49, 40)
    hybrid.check("copy", hybrid.model(ids[:, 40:], past_key_values=branch).logits[0], start=40)
    cache.set_paddings([0, 0])
    assert branch.paddings == (0,)


def test_crop_is_refused_and_leaves_the_cache_alone(build: Make, tokens: Make) -> None:
    cache = build(layers="FSF")(tokens(1, 20)).past_key_values
    with pytest.raises(UsageError, match="cannot be cropped"):
        cache.crop(-3)
    assert [layer.get_seq_length() for layer in cache.layers] == [20, 20, 20]
    cache.crop(0)
    assert not cache.is_croppable


def test_caches_that_do_not_know_the_pattern_are_refused(model: Any, tokens: Make) -> None:
    with pytest.raises(UsageError, match=r"longgen\.hf\.HybridCache"):
        DynamicCache(config=model.config)
    with pytest.raises((UsageError, KeyError), match=r"longgen_sparse|HybridCache"):
        StaticCache(config=model.config, max_cache_len=64)
    for foreign in (DynamicCache(), ((torch.zeros(1),) * 2,) * 3):
        with pytest.raises(UsageError, match=r"longgen\.hf\.HybridCache"):
            model(tokens(1, 20), past_key_values=foreign)


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_the_cache_goes_by_either_name(hybrid: Any, tokens: Make, name: str) -> None:
    """transformers 5.24 renamed the argument; with any release both are taken, but not at once."""
    ids = hybrid.rows[0][None]
    cache = HybridCache(hybrid.model.config)
    for part in (hybrid.model, hybrid.model.model):
        cache.reset()
        part(ids[:, :50], **{name: cache})
        assert cache.get_seq_length() == 50
    hybrid.check("and on", hybrid.model(ids[:, 50:], **{name: cache}).logits[0], start=50)
    with pytest.raises(UsageError, match="give one"):
        hybrid.model(ids, past_key_values=cache, cache=cache)


def test_mask_sizes_are_those_of_all_tokens(model: Any, tokens: Make) -> None:
    cache = model(tokens(1, 50)).past_key_values
    for index in range(3):
        assert cache.get_mask_sizes(4, index) == (54, 0)
        assert cache.get_seq_length(index) == 50


def test_a_cache_can_be_made_from_a_plan(model: Any, tokens: Make) -> None:
    cache = HybridCache(model.config.layer_plan)
    assert torch.equal(
        model(tokens(1, 50), past_key_values=cache).logits, model(tokens(1, 50)).logits
    )
    assert cache_bytes(cache) == planned_bytes(model.config, 50)
