from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch._dynamo.utils import counters
from torch.nn.attention.flex_attention import create_mask

from longgen.attention import attention
from longgen.attention.flex import TILE, block_mask
from longgen.attention.testing import ErrorBudget, random_inputs
from longgen.layout import Layout, axis_length, cached, contiguous, padded
from longgen.pattern import SparsePattern

LayoutMask = Callable[..., torch.Tensor]

STRIDED = SparsePattern.block_sparse(block_size=16, stride_blocks=4)
SINK = SparsePattern(block_size=16, sink_blocks=1, local_blocks=2)
CPU = torch.device("cpu")


def no_compiler() -> str:
    """Say why torch.compile cannot build code for this CPU; empty if it can."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception as error:  # whichever it is: it is printed as the reason
        return f"FlexAttention on CPU needs a C++ compiler: {error}".splitlines()[0]
    return ""


def per_head_caches(pattern: SparsePattern, heads: int, seen: int, new: int, offset: int) -> Layout:
    paddings = (0, 37)
    kept = [[cached(pattern, seen, n, offset + h) for h in range(heads)] for n in paddings]
    room = max(axis_length(axis) for row in kept for axis in row) + 3
    return Layout(
        tuple(padded(new, seen, n) for n in paddings),
        tuple(
            tuple(
                cached(pattern, seen, n, offset + h, room) + padded(new, seen, n)
                for h in range(heads)
            )
            for n in paddings
        ),
    )


# Blocks as large as tiles, where heads and documents differ in whole tiles.
TILED = SparsePattern.block_sparse(block_size=TILE, stride_blocks=4)


@settings(max_examples=40)
@example(TILED, "causal", [700], 1, 3, 3, 2)
@example(TILED, "rows", [300, 400], 1, 3, 2, 1)
@example(TILED, "cached", [200], 900, 3, 2, 1)
@example(TILED, "mid_document", [500], 300, 2, 1, 3)
@given(
    st.one_of(st.just(SparsePattern.full()), st.from_type(SparsePattern)),
    st.sampled_from(("causal", "packed", "rows", "cached", "mid_document")),
    st.lists(st.integers(1, 130), min_size=1, max_size=3),
    st.integers(1, 200),
    st.integers(1, 3),
    st.sampled_from((1, 3)),
    st.integers(0, 6),
)
def test_the_block_mask_is_exact(
    layout_mask: LayoutMask,
    pattern: SparsePattern,
    kind: str,
    lengths: list[int],
    seen: int,
    heads: int,
    group: int,
    head_offset: int,
) -> None:
    """Its mask function pair by pair, and its tile lists, before anything is compiled."""
    total = sum(lengths)
    if kind == "causal":
        layout = Layout.causal(total, total + seen - 1)
    elif kind == "mid_document":
        layout = Layout.of_rows([contiguous(total, seen)])
    elif kind == "packed":
        layout = Layout.packed([0, *np.cumsum(lengths).tolist()])
    elif kind == "rows":
        layout = Layout.of_rows(padded(total, 0, n) for n in (0, lengths[0], total))
    else:
        layout = per_head_caches(pattern, heads, seen, total, head_offset)
    mask = block_mask(pattern, layout, heads * group, heads, head_offset, CPU)
    rows, num_q, num_k = layout.num_rows, layout.num_queries, layout.num_keys
    expected = layout_mask(pattern, layout, heads, head_offset).repeat_interleave(group, 1)
    pairs = create_mask(mask.mask_mod, rows, heads * group, num_q, num_k, device="cpu")
    assert torch.equal(pairs, expected)

    tall, wide = -(-num_q // TILE), -(-num_k // TILE)
    grid = torch.zeros(rows, heads * group, tall * TILE, wide * TILE, dtype=torch.bool)
    grid[:, :, :num_q, :num_k] = expected
    tiles = grid.reshape(rows, heads * group, tall, TILE, wide, TILE)
    some, whole = tiles.any(5).any(3), tiles.all(5).all(3)
    assert mask.seq_lengths == (num_q, num_k)
    for counts, indices, wanted in (
        (mask.kv_num_blocks, mask.kv_indices, some & ~whole),
        (mask.full_kv_num_blocks, mask.full_kv_indices, whole),
        # What the backward pass walks: for each key tile the query tiles that see it.
        (mask.q_num_blocks, mask.q_indices, (some & ~whole).transpose(2, 3)),
        (mask.full_q_num_blocks, mask.full_q_indices, whole.transpose(2, 3)),
    ):
        listed = torch.arange(wanted.shape[3]) < counts[..., None]
        marked = torch.zeros(listed.shape, dtype=torch.int32)
        marked.scatter_(-1, indices.long(), listed.to(torch.int32))
        assert torch.equal(marked.bool().expand_as(wanted), wanted)


def test_layers_of_one_pattern_share_a_block_mask() -> None:
    layout = Layout.packed([0, 70, 200])
    first = block_mask(SINK, layout, 4, 2, 0, CPU)
    again = block_mask(
        SparsePattern(block_size=16, sink_blocks=1, local_blocks=2),
        Layout.packed([0, 70, 200]),
        4,
        2,
        0,
        CPU,
    )
    assert first is again
    assert block_mask(SINK, layout, 4, 2, 1, CPU) is not first


# Each is one compilation, about ten seconds: a few that between them have the causal mask function
# and the general one, heads and rows that differ and that are shared, head sizes that are no power
# of two, and lengths off the tile.
COMPILED = {
    "strided-causal": (STRIDED, (Layout.causal(257),), 2, 3, 64, 3, torch.float32),
    "sink-packed": (
        SINK,
        (Layout.packed([0, 90, 111]), Layout.packed([0, 1, 2, 40, 111])),
        1,
        4,
        80,
        0,
        torch.bfloat16,
    ),
    "strided-caches": (
        STRIDED,
        (per_head_caches(STRIDED, 2, 150, 63, 5),),
        2,
        1,
        96,
        5,
        torch.float32,
    ),
}


@pytest.mark.parametrize("case", COMPILED)
def test_compiled_on_cpu(layout_mask: LayoutMask, case: str) -> None:
    if reason := no_compiler():
        pytest.skip(reason)
    pattern, layouts, heads, group, head_dim, head_offset, dtype = COMPILED[case]
    before = counters["stats"]["unique_graphs"]
    for layout in layouts:
        inputs = random_inputs(
            layout.num_queries,
            layout.num_keys,
            batch=2,
            heads=heads * group,
            key_value_heads=heads,
            head_dim=head_dim,
            dtype=dtype,
        )
        mask = layout_mask(pattern, layout, heads, head_offset)
        budget = ErrorBudget(inputs, mask, gradients=False)
        attend = partial(
            attention, pattern=pattern, layout=layout, head_offset=head_offset, impl="flex"
        )
        budget.check("flex", attend)
        # A second call, and other documents of the same total length, must not compile again.
        budget.check("flex again", attend)
    assert counters["stats"]["unique_graphs"] == before + 1
