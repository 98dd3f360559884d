"""What ranks fetch, planned without any process, and what cannot be shared."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longgen.errors import UsageError
from longgen.layout import Axis, Layout, axis_length, contiguous, cut, packed
from longgen.parallel import ContextGroup, shard
from longgen.parallel.attend import route, sent_bytes
from longgen.parallel.heads import head_offset, heads_per_rank
from longgen.parallel.ranges import plan_ranges
from longgen.pattern import SparsePattern

FULL = SparsePattern.full()


@given(st.from_type(SparsePattern), st.integers(2, 5), st.data())
def test_a_rank_fetches_exactly_what_its_queries_see(
    pattern: SparsePattern, size: int, data: st.DataObject
) -> None:
    length = data.draw(st.integers(1, 200))
    total = size * length
    borders = sorted(data.draw(st.lists(st.integers(0, total), max_size=4)))
    axis = packed([0, *borders, total])
    heads, rank = 3, data.draw(st.integers(0, size - 1))
    plan = plan_ranges(pattern, (axis,), rank, size, heads)
    own = cut(axis, rank * length, (rank + 1) * length)
    assert plan.layout.queries == (own,)
    before = cut(axis, 0, rank * length)
    seen = Layout((own,), ((before,),)).dense_mask(pattern, heads) if before else None
    fetched = 0
    for head in range(heads):
        keys = plan.layout.keys[0][head if len(plan.layout.keys[0]) > 1 else 0]
        assert cut(keys, plan.num_fetched, plan.num_fetched + length) == own
        elsewhere = cut(keys, 0, plan.num_fetched)
        got = {(d, a + i) for d, a, n in elsewhere if d >= 0 for i in range(n)}
        want = set()
        if seen is not None:
            columns = seen[0, head if seen.shape[1] > 1 else 0].any(0)
            places = [(d, a + i) for d, a, n in before for i in range(n)]
            want = {place for place, used in zip(places, columns, strict=True) if used}
        assert got == want
        fetched += len(got)
    assert sum(plan.num_received) * heads == fetched * plan.num_groups


@given(st.from_type(SparsePattern), st.integers(1, 5), st.integers(1, 100))
def test_what_one_rank_sends_another_expects(
    pattern: SparsePattern, size: int, length: int
) -> None:
    rows = (contiguous(size * length), packed([0, length // 2, size * length]))
    plans = [plan_ranges(pattern, rows, rank, size, 4) for rank in range(size)]
    sent = np.array([plan.num_sent for plan in plans])
    received = np.array([plan.num_received for plan in plans])
    assert (sent == received.T).all()
    for plan in plans:
        slots = np.concatenate([plan.fetch, plan.empty])
        assert len(slots) == 2 * plan.num_fetched * plan.num_groups
        assert len(np.unique(slots)) == len(slots)


def test_a_sparse_layer_sends_little_of_what_a_full_layer_sends() -> None:
    """The shapes of Llama-2-7B at 131,072 tokens on four GPUs, in bf16."""
    rows = (contiguous(131072),)
    shape = {"num_heads": 32, "num_key_value_heads": 32, "head_dim": 128}
    bytes_of = {
        name: [sent_bytes(pattern, rows, ContextGroup(rank, 4), **shape) for rank in range(4)]
        for name, pattern in (
            ("full", FULL),
            ("sink", SparsePattern.attention_sink()),
            ("strided", SparsePattern.block_sparse()),
        )
    }
    token = 2 * 32 * 128 * 2
    # 3/4 of queries, keys, values and outputs of 32,768 tokens.
    assert bytes_of["full"] == [3 * 32768 * 2 * token // 4] * 4
    # The sinks to three ranks, and to the next one the 31 blocks before its first.
    halo = 31 * 64
    assert bytes_of["sink"] == [(3 * 64 + halo) * token, halo * token, halo * token, 0]
    # One block in 64 to each rank that follows: 8 of 512.
    assert bytes_of["strided"] == [n * 8 * 64 * token for n in (3, 2, 1, 0)]


def test_full_layers_go_by_heads_where_they_divide() -> None:
    four = ContextGroup(0, 4)
    assert route(FULL, four, 32, 8) == route(FULL, four, 4, 1) == "heads"
    assert route(FULL, four, 6, 6) == route(FULL, four, 12, 3) == "ranges"
    assert route(FULL, ContextGroup(0, 4, full_mode="ranges"), 32, 8) == "ranges"
    assert route(FULL, ContextGroup(0, 4, full_mode="heads"), 6, 6) == "heads"
    assert route(SparsePattern(), ContextGroup(0, 4, full_mode="heads"), 32, 8) == "ranges"


def test_heads_that_do_not_divide_are_refused_by_name() -> None:
    with pytest.raises(UsageError, match=r"6 query heads do not divide by 4 ranks.*ranges"):
        heads_per_rank(6, 6, 4)
    with pytest.raises(UsageError, match=r"3 key/value heads and 4 ranks are no multiple"):
        heads_per_rank(12, 3, 4)


@pytest.mark.parametrize(
    ("kv_heads", "offsets"), [(8, [0, 2, 4, 6]), (4, [0, 1, 2, 3]), (2, [0, 0, 1, 1]), (1, [0] * 4)]
)
def test_head_indices_stay_global(kv_heads: int, offsets: list[int]) -> None:
    assert [head_offset(kv_heads, ContextGroup(rank, 4)) for rank in range(4)] == offsets


def test_shards_keep_true_positions() -> None:
    ids = torch.arange(24).reshape(2, 12)
    positions = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]).expand(2, -1)
    parts = [shard({"input_ids": ids, "position_ids": positions}, rank, 3) for rank in range(3)]
    assert parts[1]["position_ids"].tolist() == [[4, 0, 1, 2]] * 2
    assert torch.equal(torch.cat([part["input_ids"] for part in parts], 1), ids)


def test_what_cannot_be_cut_is_refused() -> None:
    with pytest.raises(UsageError, match=r"10 tokens cannot be cut into 4 equal.*12 tokens"):
        shard({"position_ids": torch.arange(10)}, 0, 4)
    with pytest.raises(UsageError, match=r"labels.*shift_labels"):
        shard({"position_ids": torch.arange(8), "labels": torch.arange(8)}, 0, 4)
    with pytest.raises(UsageError, match="Rank 4 is not in a group of 4"):
        ContextGroup(4, 4)
    with pytest.raises(UsageError, match="full_mode is 'ring'; choose from auto, heads, ranges"):
        ContextGroup(0, 1, full_mode="ring")


def test_cut_returns_columns_of_an_axis() -> None:
    axis: Axis = packed([0, 5, 5, 12])
    assert cut(axis, 0, 12) == axis
    assert cut(axis, 3, 7) == ((0, 3, 2), (2, 0, 2))
    assert cut(axis, 5, 5) == ()
    assert axis_length(cut(axis, 1, 11)) == 10
