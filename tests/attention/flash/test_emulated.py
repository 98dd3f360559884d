"""Tables of any pattern and layout make written-out kernels compute what the reference does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longgen.attention import attention
from longgen.attention.flash.lists import FULL_COUNT
from longgen.attention.flash.plan import Tables, tables
from longgen.attention.testing import random_inputs
from longgen.layout import (
    PADDING,
    Layout,
    Run,
    axis_length,
    cached,
    contiguous,
    from_position_ids,
    packed,
    padded,
)
from longgen.pattern import SparsePattern

CPU = torch.device("cpu")
HEAD_DIM = 4
# Some thousand roundings of numbers near one in fp64. One pair too many or too few shows at 1e-3.
EXACT = {"rtol": 1e-11, "atol": 1e-11}


@dataclass(frozen=True)
class Case:
    pattern: SparsePattern
    layout: Layout
    key_value_heads: int
    group: int
    head_offset: int
    tiles_q: tuple[int, int]
    batch: int

    def tables(self, gradients: bool = True) -> Tables:
        return tables(
            self.pattern,
            self.layout,
            self.batch,
            self.key_value_heads * self.group,
            self.key_value_heads,
            self.head_offset,
            self.tiles_q,
            CPU,
            gradients,
        )


def check(emulate: Callable[[int, int], Any], case: Case) -> None:
    q, k, v, grad = random_inputs(
        case.layout.num_queries,
        case.layout.num_keys,
        batch=case.batch,
        heads=case.key_value_heads * case.group,
        key_value_heads=case.key_value_heads,
        head_dim=HEAD_DIM,
        dtype=torch.float64,
    )
    grad_lse = grad[..., 0].transpose(1, 2) + 0.5
    scale = 0.7
    leaves = [x.requires_grad_() for x in (q, k, v)]
    expected, expected_lse = attention(
        *leaves,
        pattern=case.pattern,
        layout=case.layout,
        scale=scale,
        head_offset=case.head_offset,
        impl="reference",
        return_lse=True,
    )
    gradients = torch.autograd.grad((expected, expected_lse), leaves, (grad, grad_lse))
    with torch.no_grad():
        kernels, made = emulate(*case.tiles_q), case.tables()
        out, lse = kernels.listed_forward(*leaves, made.forward, made.mask, made.tile_k, scale)
        torch.testing.assert_close(out, expected.detach(), **EXACT)
        torch.testing.assert_close(lse, expected_lse.detach(), **EXACT)
        found = kernels.listed_backward(
            *(grad, grad_lse, *leaves, out, lse),
            *(made.backward, made.backward_mask, made.strided, made.strided_mask, scale),
        )
    for name, actual, exact in zip(("dq", "dk", "dv"), found, gradients, strict=True):
        torch.testing.assert_close(actual, exact, **EXACT, msg=lambda text, n=name: f"{n}: {text}")


KINDS = (
    "plain",
    "offset",
    "packed",
    "mid_document",
    "left_padded",
    "cached",
    "cached_per_head",
    "shared_keys",
    "shared_queries",
    "any",
)
# Gaps, overlaps, documents out of order, padding in between.
RUNS = st.lists(
    st.builds(Run, st.sampled_from((PADDING, 0, 0, 1)), st.integers(0, 300), st.integers(1, 150)),
    min_size=1,
    max_size=4,
).map(tuple)
LENGTHS = st.one_of(st.integers(1, 420), st.sampled_from((64, 128, 192, 256, 384)))


@st.composite
def cases(draw: st.DrawFn, kinds: tuple[str, ...] = KINDS) -> Case:
    pattern = draw(st.one_of(st.just(SparsePattern.full()), *[st.from_type(SparsePattern)] * 4))
    heads, group = draw(st.sampled_from(((1, 1), (3, 1), (1, 3), (2, 3), (2, 4), (1, 8))))
    offset = draw(st.integers(0, 6))
    length, seen = draw(LENGTHS), draw(st.integers(0, 300))
    paddings = draw(st.lists(st.integers(0, 300), min_size=1, max_size=2))
    kind = draw(st.sampled_from(kinds))
    if kind == "plain":
        layout = Layout.causal(length)
    elif kind == "offset":
        layout = Layout.causal(length, length + seen)
    elif kind == "packed":
        cuts = draw(st.lists(st.integers(0, length), max_size=3))
        layout = Layout.of_rows(
            [packed(sorted({0, *cuts, length})), contiguous(length)][: len(paddings)]
        )
    elif kind == "mid_document":
        halves = length - length // 2
        ids = np.concatenate([np.arange(seen, seen + halves), np.arange(length - halves)])
        layout = Layout.of_rows([from_position_ids(ids), contiguous(length, 7)][: len(paddings)])
    elif kind == "left_padded":
        layout = Layout.of_rows(padded(length, 0, padding) for padding in paddings)
    elif kind == "shared_keys":
        queries = tuple(contiguous(length, padding) for padding in paddings)
        layout = Layout(queries, ((contiguous(length + seen),),))
    elif kind == "shared_queries":
        keys = tuple((padded(length + seen, 0, padding),) for padding in paddings)
        layout = Layout((contiguous(length, seen),), keys)
    elif kind == "any":
        layout = Layout((draw(RUNS),), ((draw(RUNS),),))
    else:
        own = range(heads if kind == "cached_per_head" else 1)
        kept = [[cached(pattern, seen, n, offset + h) for h in own] for n in paddings]
        room = max(axis_length(axis) for row in kept for axis in row)
        layout = Layout(
            tuple(padded(length, seen, n) for n in paddings),
            tuple(
                tuple(
                    cached(pattern, seen, n, offset + h, room) + padded(length, seen, n)
                    for h in own
                )
                for n in paddings
            ),
        )
    tiles = st.sampled_from((64, 128, 192))
    batch = layout.num_rows if layout.num_rows > 1 else draw(st.integers(1, 2))
    return Case(pattern, layout, heads, group, offset, (draw(tiles), draw(tiles)), batch)


@settings(max_examples=150)
@given(cases())
def test_tables_compute_the_reference(emulate: Callable[[int, int], Any], case: Case) -> None:
    check(emulate, case)


def axes(length: int, seen: int = 0) -> dict[str, Layout]:
    return {
        "plain": Layout.causal(length),
        "offset": Layout.causal(length, length + seen),
        "packed": Layout.packed([0, 64, length]),
        "left_padded": Layout.of_rows(padded(length, 0, padding) for padding in (0, 333)),
    }


# Long enough for tiles without mask in every table.
LONG = {
    "sink": SparsePattern(block_size=64, sink_blocks=1, local_blocks=6),
    "strided": SparsePattern.block_sparse(stride_blocks=4),
    "aligned": SparsePattern(
        block_size=128, sink_blocks=1, local_blocks=3, stride_blocks=3, head_shift=1
    ),
    "dense_stride": SparsePattern(block_size=50, local_blocks=1, sink_blocks=0, stride_blocks=1),
    "odd": SparsePattern(
        block_size=100, sink_blocks=2, local_blocks=2, stride_blocks=2, head_shift=1
    ),
}


@pytest.mark.parametrize("kind", axes(900))
@pytest.mark.parametrize("name", LONG)
def test_tables_with_tiles_that_need_no_mask(
    emulate: Callable[[int, int], Any], name: str, kind: str
) -> None:
    pattern, layout = LONG[name], axes(900, seen=70)[kind]
    case = Case(pattern, layout, 2, 1 if kind == "plain" else 2, 3, (128, 64), layout.num_rows)
    made = case.tables()
    assert made.forward[2].any()
    gathers = pattern.stride_blocks > 1 and not (name == "aligned" and kind in ("plain", "offset"))
    assert (made.strided_mask is not None) == gathers
    # One local block of at most 64 tokens has no whole tile below the diagonal.
    rest = pattern.local_blocks > 1 or not gathers
    assert bool(made.backward[0][:, FULL_COUNT].any()) == rest
    if gathers:
        assert made.strided[1][:, FULL_COUNT].any()
    check(emulate, case)


def test_scattered_tiles_without_mask(emulate: Callable[[int, int], Any]) -> None:
    """Another document's queries stand between those that see all of a key tile."""
    queries = (Run(0, 300, 128), Run(1, 0, 128), Run(0, 428, 128))
    layout = Layout((queries,), (((Run(0, 0, 200), Run(1, 0, 100)),),))
    case = Case(SparsePattern.full(), layout, 1, 3, 0, (128, 64), 1)
    assert case.tables().forward[2].any()
    assert not case.tables().backward[0][:, FULL_COUNT].any()
    check(emulate, case)


def test_one_strided_block_that_is_all_there_is(emulate: Callable[[int, int], Any]) -> None:
    """Behind it the cache has room: gathered by itself it is the plain document."""
    pattern = SparsePattern(block_size=128, sink_blocks=0, local_blocks=1, stride_blocks=4)
    keys = (Run(0, 0, 128), Run(PADDING, 0, 5))
    layout = Layout(((Run(0, 0, 128),),), ((keys,),))
    check(emulate, Case(pattern, layout, 1, 1, 0, (128, 64), 1))
