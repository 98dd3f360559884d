"""Every implementation against fp64 softmax under an independent mask, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longgen.attention import attention
from longgen.attention.testing import (
    ErrorBudget,
    Inputs,
    random_inputs,
    visible_in_output,
    with_gradients,
)
from longgen.layout import (
    Layout,
    axis_length,
    cached,
    contiguous,
    from_position_ids,
    packed,
    padded,
)
from longgen.pattern import SparsePattern

LayoutMask = Callable[..., torch.Tensor]

PATTERNS = {
    "full": SparsePattern.full(),
    "sink": SparsePattern(block_size=16, sink_blocks=1, local_blocks=2),
    "strided": SparsePattern.block_sparse(block_size=16, stride_blocks=4),
    "both": SparsePattern(
        block_size=50, sink_blocks=1, local_blocks=1, stride_blocks=3, head_shift=2
    ),
}
KINDS = ("plain", "offset", "packed", "mid_document", "left_padded", "cached_per_head")
LENGTHS = (1, 63, 111, 257, 600)
GROUPS = (1, 3, 4, 8)
HEAD_DIMS = (64, 80, 96, 128)
SEEN = 150


def make_layout(kind: str, pattern: SparsePattern, length: int, heads: int, offset: int) -> Layout:
    if kind == "plain":
        return Layout.causal(length)
    if kind == "offset":
        return Layout.causal(length, length + SEEN)
    if kind == "packed":
        return Layout.packed(sorted({0, length // 3, length // 2, length}))
    if kind == "mid_document":
        halves = length - length // 2
        first = np.concatenate([np.arange(37, 37 + halves), np.arange(length - halves)])
        second = np.arange(5, 5 + length)
        return Layout.of_rows([from_position_ids(first), from_position_ids(second)])
    if kind == "left_padded":
        return Layout.of_rows(padded(length, 0, padding) for padding in (length // 2, 0, length))
    paddings = (0, 41)
    kept = [[cached(pattern, SEEN, n, offset + h) for h in range(heads)] for n in paddings]
    room = max(axis_length(axis) for row in kept for axis in row)
    return Layout(
        tuple(padded(length, SEEN, n) for n in paddings),
        tuple(
            tuple(
                cached(pattern, SEEN, n, offset + h, room) + padded(length, SEEN, n)
                for h in range(heads)
            )
            for n in paddings
        ),
    )


@dataclass(frozen=True)
class Case:
    pattern: SparsePattern
    layout: Layout
    key_value_heads: int
    group: int
    head_dim: int
    head_offset: int

    @property
    def batch(self) -> int:
        # Two rows where the layout has but one for all: implementations must not mix the batch up.
        return self.layout.num_rows if self.layout.num_rows > 1 else 2

    def inputs(self, dtype: torch.dtype) -> Inputs:
        return random_inputs(
            self.layout.num_queries,
            self.layout.num_keys,
            batch=self.batch,
            heads=self.key_value_heads * self.group,
            key_value_heads=self.key_value_heads,
            head_dim=self.head_dim,
            dtype=dtype,
            seed=self.layout.num_queries,
        )


def make_cases() -> dict[str, Case]:
    """Cross patterns with layouts; the other dimensions go round, so each value comes up often."""
    cases = {}
    for number, (name, kind) in enumerate((p, k) for p in PATTERNS for k in KINDS):
        length = LENGTHS[number % 5]
        group, head_dim = GROUPS[number % 4], HEAD_DIMS[(number // 4 + number) % 4]
        heads, offset = 1 if group == 8 else 2, (0, 5)[number % 2]
        layout = make_layout(kind, PATTERNS[name], length, heads, offset)
        case = Case(PATTERNS[name], layout, heads, group, head_dim, offset)
        cases[f"{name}-{kind}-T{length}-G{group}-Hkv{heads}-D{head_dim}"] = case
    return cases


CASES = make_cases()
IMPLS = ("reference", "blocked", "auto")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def run(case: Case, impl: str) -> Callable[..., torch.Tensor]:
    return partial(
        attention,
        pattern=case.pattern,
        layout=case.layout,
        head_offset=case.head_offset,
        impl=impl,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients(layout_mask: LayoutMask, case: str, dtype: str) -> None:
    it = CASES[case]
    mask = layout_mask(it.pattern, it.layout, it.key_value_heads, it.head_offset)
    budget = ErrorBudget(it.inputs(DTYPES[dtype]), mask)
    budget.check("reference", run(it, "reference"))
    budget.check("blocked", run(it, "blocked"))


# Where "auto" takes neither of the two above: PyTorch's own attention, causal or without a mask.
SINK = PATTERNS["sink"]
DENSE = {
    "full": (SparsePattern.full(), Layout.causal(257)),
    "covered": (SINK, Layout.causal(30)),
    "decoding": (SparsePattern.full(), Layout.causal(1, 151)),
    "decoding_from_caches": (
        SINK,
        Layout(
            tuple(padded(1, 150, n) for n in (0, 32)),
            tuple((cached(SINK, 150, n, 0) + padded(1, 150, n),) for n in (0, 32)),
        ),
    ),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", DENSE)
def test_what_auto_leaves_to_pytorch(layout_mask: LayoutMask, case: str, dtype: str) -> None:
    pattern, layout = DENSE[case]
    it = Case(pattern, layout, key_value_heads=2, group=3, head_dim=64, head_offset=0)
    budget = ErrorBudget(it.inputs(DTYPES[dtype]), layout_mask(pattern, layout, 2))
    budget.check("auto", run(it, "auto"))


def test_the_cases_have_every_value() -> None:
    assert {case.layout.num_queries for case in CASES.values()} == set(LENGTHS)
    assert {case.group for case in CASES.values()} == set(GROUPS)
    assert {case.head_dim for case in CASES.values()} == set(HEAD_DIMS)


@pytest.mark.parametrize("impl", IMPLS)
def test_padding_gives_zeros_and_takes_no_gradient(impl: str) -> None:
    lengths = (0, 7, 30, 70)
    layout = Layout.of_rows(padded(70, 0, padding) for padding in lengths)
    inputs = random_inputs(70, batch=4)
    results = with_gradients(
        partial(attention, pattern=PATTERNS["strided"], layout=layout, impl=impl), inputs
    )
    for row, padding in enumerate(lengths):
        for name, value in results.items():
            assert not value[row, :padding].any(), f"{name} of padding in row {row}"
    assert all(torch.isfinite(value).all() for value in results.values())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", ["full", "strided"])
def test_nothing_but_padding_has_gradients_of_zero(name: str, impl: str) -> None:
    layout = Layout.of_rows([padded(70, 0, 70)] * 2)
    q, k, v = (x.requires_grad_() for x in random_inputs(70, batch=2)[:3])
    out, lse = attention(q, k, v, pattern=PATTERNS[name], layout=layout, impl=impl, return_lse=True)
    assert not out.any() and bool((lse == float("-inf")).all())
    for grad in torch.autograd.grad(out.sum(), (q, k, v)):
        assert not grad.any()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", ["sink", "strided", "both"])
def test_heads_in_two_halves_equal_all_at_once(
    layout_mask: LayoutMask, name: str, impl: str
) -> None:
    attend = partial(attention, pattern=PATTERNS[name], impl=impl)

    def halves(*qkv: torch.Tensor) -> torch.Tensor:
        parts = zip(*(x.chunk(2, dim=2) for x in qkv), strict=True)
        return torch.cat([attend(*part, head_offset=2 * n) for n, part in enumerate(parts)], 2)

    mask = layout_mask(PATTERNS[name], Layout.causal(200), 4)
    budget = ErrorBudget(random_inputs(200, heads=12, key_value_heads=4), mask)
    budget.check("all", attend)
    budget.check("halves", halves)


@pytest.mark.parametrize("scale", [0.02, 0.3])
@pytest.mark.parametrize("pattern", [SINK, SparsePattern.full()])
def test_the_scale_is_used(layout_mask: LayoutMask, pattern: SparsePattern, scale: float) -> None:
    mask = layout_mask(pattern, Layout.causal(100), 2)
    budget = ErrorBudget(random_inputs(100), mask, scale=scale)
    for impl in IMPLS:
        budget.check(impl, partial(attention, pattern=pattern, scale=scale, impl=impl))


@pytest.mark.parametrize("pattern", [SparsePattern.full(), PATTERNS["strided"]])
def test_inputs_need_not_be_contiguous(layout_mask: LayoutMask, pattern: SparsePattern) -> None:
    """Heads are often a view of (B, H, T, D) memory, and keys a slice of a longer buffer."""
    inputs = random_inputs(120)
    budget = ErrorBudget(inputs, layout_mask(pattern, Layout.causal(120), 2))

    def on_views(impl: str, *qkv: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv)
        nan = torch.full_like(k, float("nan"))
        buffer = torch.cat([nan, k, nan], 1)
        assert not q.is_contiguous()
        return attention(q, buffer[:, 120:240], v, pattern=pattern, impl=impl)

    for impl in IMPLS:
        budget.check(impl, partial(on_views, impl))


AXIS_KINDS = ("causal", "packed", "rows", "cached", "shared_keys", "shared_queries")


@given(
    st.one_of(st.just(SparsePattern.full()), st.from_type(SparsePattern)),
    st.sampled_from(AXIS_KINDS),
    st.sampled_from(IMPLS),
    st.lists(st.integers(1, 90), min_size=1, max_size=4),
    st.lists(st.integers(0, 150), min_size=1, max_size=3),
    st.integers(1, 3),
    st.sampled_from((1, 2, 3)),
    st.integers(0, 6),
)
def test_exactly_the_visible_keys_are_read(
    layout_mask: LayoutMask,
    pattern: SparsePattern,
    kind: str,
    impl: str,
    lengths: list[int],
    paddings: list[int],
    heads: int,
    group: int,
    head_offset: int,
) -> None:
    total, seen = sum(lengths), paddings[0]
    if kind == "causal":
        layout = Layout.causal(total, total + seen)
    elif kind == "packed":
        layout = Layout.of_rows([packed([0, *np.cumsum(lengths).tolist()]), contiguous(total)])
    elif kind == "rows":
        layout = Layout.of_rows(padded(total, 0, padding) for padding in paddings)
    elif kind == "shared_keys":
        queries = tuple(contiguous(total, padding) for padding in paddings)
        layout = Layout(queries, ((contiguous(total + seen),),))
    elif kind == "shared_queries":
        keys = tuple((padded(total + seen, 0, padding),) for padding in paddings)
        layout = Layout((contiguous(total, seen),), keys)
    else:
        own = [[cached(pattern, seen, n, head_offset + h) for h in range(heads)] for n in paddings]
        room = max(axis_length(axis) for row in own for axis in row) + 2
        layout = Layout(
            tuple(padded(total, seen, n) for n in paddings),
            tuple(
                tuple(
                    cached(pattern, seen, n, head_offset + h, room) + padded(total, seen, n)
                    for h in range(heads)
                )
                for n in paddings
            ),
        )
    read = visible_in_output(
        partial(attention, pattern=pattern, layout=layout, head_offset=head_offset, impl=impl),
        layout.num_queries,
        layout.num_keys,
        batch=layout.num_rows,
        heads=heads * group,
        key_value_heads=heads,
    )
    expected = layout_mask(pattern, layout, heads, head_offset).repeat_interleave(group, 1)
    assert torch.equal(read, expected.expand_as(read))


def test_blocked_attention_crosses_its_chunks(layout_mask: LayoutMask) -> None:
    """Three query chunks, of which one is all padding and none sees a tile of another."""
    pattern = SparsePattern(block_size=16, sink_blocks=0, local_blocks=1)
    layout = Layout.of_rows([padded(700, 0, 300), packed([0, 256, 512, 700])])
    read = visible_in_output(
        partial(attention, pattern=pattern, layout=layout, impl="blocked"),
        700,
        700,
        batch=2,
        head_dim=175,
    )
    assert torch.equal(read, layout_mask(pattern, layout, 1))
