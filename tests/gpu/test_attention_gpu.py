"""Attention on one NVIDIA GPU: every way that layers run there, against fp64 on the same card."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch._dynamo.utils import counters

from longgen.attention import api, attention
from longgen.attention.flex import block_mask
from longgen.attention.testing import (
    ErrorBudget,
    Inputs,
    assert_within_eager_error,
    random_inputs,
    visible_in_output,
    with_gradients,
)
from longgen.layout import Layout, axis_length, cached, padded
from longgen.pattern import SparsePattern

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

LayoutMask = Callable[..., torch.Tensor]

FULL = SparsePattern.full()
SINK = SparsePattern(block_size=64, sink_blocks=1, local_blocks=4)
STRIDED = SparsePattern.block_sparse(stride_blocks=8)
BOTH = SparsePattern(block_size=100, sink_blocks=1, local_blocks=1, stride_blocks=3, head_shift=2)
EARLIER = 700


@pytest.fixture(autouse=True)
def poisoned() -> None:
    """Leave NaN in the memory that the allocator hands out next, in blocks small and large."""
    torch.cuda.empty_cache()
    nan = float("nan")
    blocks = [torch.full((1 << 17,), nan, device="cuda") for _ in range(64)]
    blocks.append(torch.full((1 << 29,), nan, device="cuda"))
    del blocks


@dataclass(frozen=True)
class Case:
    """One compiled kernel: pattern, layouts of the same shape, Hkv, H / Hkv, D and dtype."""

    pattern: SparsePattern
    layouts: tuple[Layout, ...]
    key_value_heads: int
    group: int
    head_dim: int
    dtype: torch.dtype = torch.bfloat16
    head_offset: int = 0
    batch: int = 1

    def inputs(self) -> Inputs:
        return random_inputs(
            self.layouts[0].num_queries,
            self.layouts[0].num_keys,
            batch=max(self.batch, self.layouts[0].num_rows),
            heads=self.key_value_heads * self.group,
            key_value_heads=self.key_value_heads,
            head_dim=self.head_dim,
            dtype=self.dtype,
            device="cuda",
        )

    def attend(self, layout: Layout, impl: str) -> Callable[..., torch.Tensor]:
        return partial(
            attention,
            pattern=self.pattern,
            layout=layout,
            head_offset=self.head_offset,
            impl=impl,
        )


def plain(length: int) -> tuple[Layout, ...]:
    return (Layout.causal(length),)


def offset(length: int) -> tuple[Layout, ...]:
    return (Layout.causal(length, length + EARLIER),)


def packed(length: int) -> tuple[Layout, ...]:
    return (
        Layout.packed([0, length // 3, length // 3 + 1, length]),
        Layout.packed([0, length // 2, length]),
    )


def left_padded(length: int) -> tuple[Layout, ...]:
    return (Layout.of_rows(padded(length, 0, n) for n in (150, 0, length)),)


def per_head_caches(length: int, heads: int) -> tuple[Layout, ...]:
    """New tokens over caches that kept other tokens in each head and, left-padded, in each row."""
    paddings = (0, 333)
    kept = [[cached(STRIDED, 2000, n, h) for h in range(heads)] for n in paddings]
    room = max(axis_length(axis) for row in kept for axis in row) + 5
    return (
        Layout(
            tuple(padded(length, 2000, n) for n in paddings),
            tuple(
                tuple(
                    cached(STRIDED, 2000, n, h, room) + padded(length, 2000, n)
                    for h in range(heads)
                )
                for n in paddings
            ),
        ),
    )


FP32 = torch.float32
# Each costs a compilation. Between them they have each pattern with each kind of layout, and each
# GQA ratio, head size and length at least twice.
COMPILED = {
    "sink-plain-2049": Case(SINK, plain(2049), 2, 3, 128),
    "sink-packed-1000": Case(SINK, packed(1000), 2, 8, 80, batch=2),
    "sink-offset-2049": Case(SINK, offset(2049), 1, 4, 96),
    "strided-plain-2049": Case(STRIDED, plain(2049), 4, 1, 96, head_offset=3),
    "strided-packed-2049": Case(STRIDED, packed(2049), 2, 3, 64),
    "strided-offset-63": Case(STRIDED, offset(63), 2, 8, 128),
    "both-plain-1000": Case(BOTH, plain(1000), 3, 3, 80, head_offset=1),
    "both-packed-63": Case(BOTH, packed(63), 1, 1, 64),
    "full-packed-1000": Case(FULL, packed(1000), 2, 4, 128),
    "full-offset-63": Case(FULL, offset(63), 1, 8, 96),
    # In fp32, where one wrong pair in a gradient cannot hide behind rounding.
    "strided-packed-1000-fp32": Case(STRIDED, packed(1000), 2, 3, 64, FP32),
    "sink-left-padded-300": Case(SINK, left_padded(300), 2, 3, 64),
    "strided-caches-100": Case(STRIDED, per_head_caches(100, 4), 4, 4, 128),
}


@pytest.mark.parametrize("name", COMPILED)
def test_flex(layout_mask: LayoutMask, name: str) -> None:
    case = COMPILED[name]
    inputs = case.inputs()
    before = counters["stats"]["unique_graphs"]
    for layout in case.layouts:
        mask = layout_mask(case.pattern, layout, case.key_value_heads, case.head_offset).cuda()
        budget = ErrorBudget(inputs, mask)
        budget.check("flex", case.attend(layout, "flex"))
        if case.layouts[0].num_queries > api._FEW_QUERIES:
            budget.check("auto", case.attend(layout, "auto"))
        read = visible_in_output(
            case.attend(layout, "flex"),
            layout.num_queries,
            layout.num_keys,
            batch=inputs.q.shape[0],
            heads=inputs.q.shape[2],
            key_value_heads=case.key_value_heads,
            head_dim=case.head_dim,
            dtype=case.dtype,
            device="cuda",
            requires_grad=True,
        )
        assert torch.equal(read, mask.repeat_interleave(case.group, 1).expand_as(read))
    # Other documents of the same total length must not compile again: training packs them anew at
    # every step.
    assert counters["stats"]["unique_graphs"] == before + 1


@pytest.mark.skipif(not os.environ.get("LONGGEN_ALL_SHAPES"), reason="LONGGEN_ALL_SHAPES isn't set")
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
@pytest.mark.parametrize("group", [1, 3, 4, 8])
@pytest.mark.parametrize("pattern", [FULL, SINK, STRIDED, BOTH], ids=str)
@pytest.mark.parametrize("impl", ["flex", "blocked", "reference"])
def test_all_shapes(
    layout_mask: LayoutMask, impl: str, pattern: SparsePattern, group: int, head_dim: int
) -> None:
    for layouts in (plain(1001), packed(1001), offset(333)):
        case = Case(pattern, layouts, 2, group, head_dim)
        for layout in layouts:
            mask = layout_mask(pattern, layout, case.key_value_heads).cuda()
            ErrorBudget(case.inputs(), mask).check(impl, case.attend(layout, impl))


@pytest.mark.parametrize("impl", ["flex", "blocked"])
def test_padding_gives_zeros_and_takes_no_gradient(impl: str) -> None:
    case = COMPILED["sink-left-padded-300"]
    results = with_gradients(case.attend(case.layouts[0], impl), case.inputs())
    for name, value in results.items():
        assert torch.isfinite(value).all(), name
        for row, padding in enumerate((150, 0, 300)):
            assert not value[row, :padding].any(), name


def peak_bytes(work: Callable[[], object]) -> int:
    work()
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    return torch.cuda.max_memory_allocated() - before


def test_flex_makes_no_mask() -> None:
    case = COMPILED["sink-plain-2049"]
    inputs = case.inputs()
    peak = peak_bytes(lambda: with_gradients(case.attend(case.layouts[0], "flex"), inputs))
    # Inputs, output, gradients and working copies are 32 MB at most; scores would be 50 MB.
    linear = 2049 * 6 * 128
    assert 8 * linear < peak < 6 * 2049 * 2049 * 2


HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("group", "head_dim"), [(1, 64), (3, 80), (4, 96), (8, 128)])
def test_dense(layout_mask: LayoutMask, group: int, head_dim: int, dtype: torch.dtype) -> None:
    """Full layers, and sparse ones that still see everything, go to PyTorch's fused kernels."""
    for length in (1, 63, 1000, 2049):
        layout = Layout.causal(length)
        inputs = random_inputs(
            length,
            heads=2 * group,
            key_value_heads=2,
            head_dim=head_dim,
            dtype=dtype,
            device="cuda",
        )
        budget = ErrorBudget(inputs, layout_mask(FULL, layout, 2).cuda())
        budget.check(f"full {length}", attention)
        if SINK.covers(length):
            budget.check(f"covered {length}", partial(attention, pattern=SINK))


@pytest.mark.parametrize(("group", "head_dim"), [(1, 64), (3, 80), (4, 96), (8, 128)])
def test_dense_in_fp32(layout_mask: LayoutMask, group: int, head_dim: int) -> None:
    """PyTorch's fused fp32 kernel takes exp to a few ulp: by itself more than eager's whole error
    where few keys are summed. So only a long document, and no largest error; and the keys read."""
    inputs = random_inputs(
        2049, heads=2 * group, key_value_heads=2, head_dim=head_dim, device="cuda"
    )
    mask = layout_mask(FULL, Layout.causal(2049), 2).cuda()
    budget = ErrorBudget(inputs, mask)
    for name, value in with_gradients(attention, inputs).items():
        assert_within_eager_error(
            name, value, budget.eager[name], budget.exact[name], largest=False
        )
    for queries, keys in ((1, 1), (1, 200), (63, 63)):
        read = visible_in_output(
            attention, queries, keys, heads=2 * group, key_value_heads=2, head_dim=64, device="cuda"
        )
        expected = layout_mask(FULL, Layout.causal(queries, keys), 1).cuda()
        assert torch.equal(read, expected.expand_as(read))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("pattern", [FULL, SINK, STRIDED])
def test_decoding(layout_mask: LayoutMask, pattern: SparsePattern, dtype: torch.dtype) -> None:
    """One query over what the cache kept, and a few, with and without filler between the heads."""
    for seen, new in ((1500, 1), (1500, 5), (63, 1)):
        kept = [cached(pattern, seen, 0, head) for head in range(4)]
        room = max(axis_length(axis) for axis in kept)
        own = padded(new, seen, 0)
        layout = Layout(
            (own,), (tuple(cached(pattern, seen, 0, head, room) + own for head in range(4)),)
        )
        inputs = random_inputs(
            new, layout.num_keys, heads=12, key_value_heads=4, dtype=dtype, device="cuda"
        )
        mask = layout_mask(pattern, layout, 4).cuda()
        budget = ErrorBudget(inputs, mask, gradients=False)
        budget.check(f"{seen} + {new}", partial(attention, pattern=pattern, layout=layout))


def test_block_masks_made_for_inference_serve_training() -> None:
    case = COMPILED["both-packed-63"]
    layout = Layout.packed([0, 20, 63])
    with torch.inference_mode():
        made = block_mask(case.pattern, layout, 1, 1, 0, torch.device("cuda", 0))
    assert not made.kv_indices.is_inference()
    with_gradients(case.attend(layout, "flex"), case.inputs())
    assert made is block_mask(case.pattern, layout, 1, 1, 0, torch.device("cuda", 0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, FP32])
def test_dense_makes_no_mask(dtype: torch.dtype) -> None:
    length = 8192
    inputs = random_inputs(
        length, heads=2, key_value_heads=1, head_dim=64, dtype=dtype, device="cuda"
    )
    # A bool mask alone, without heads, would be 67 MB; inputs, gradients and copies are below 30.
    assert peak_bytes(lambda: with_gradients(attention, inputs)) < length * length


@pytest.mark.parametrize(
    ("pattern", "layout", "choice"),
    [
        (FULL, Layout.causal(300), "dense_causal"),
        (SINK, Layout.causal(100), "dense_causal"),
        (FULL, Layout.causal(1, 300), "dense"),
        (SINK, Layout.causal(api._FEW_QUERIES, 900), "blocked"),
        (SINK, Layout.causal(2049), "flex"),
        (STRIDED, Layout.causal(2049), "flex"),
        (FULL, Layout.packed([0, 100, 300]), "flex"),
    ],
)
def test_auto_says_once_what_it_chose(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    pattern: SparsePattern,
    layout: Layout,
    choice: str,
) -> None:
    monkeypatch.setattr(api, "_announced", set())
    # What it chose is known before anything is compiled.
    monkeypatch.setitem(api._MASKED, "flex", lambda q, *_, **__: (q, None))
    caplog.set_level(logging.INFO, logger="longgen.attention.api")
    inputs = random_inputs(layout.num_queries, layout.num_keys, device="cuda")
    for _ in range(2):
        attention(*inputs[:3], pattern=pattern, layout=layout)
    # In fp32, which the flash backend does not take: said where it would have been the choice.
    (message,) = caplog.messages
    assert message.startswith(f"attention ({pattern}) on cuda: {choice}")
    assert ("not flash: " in message) == (
        choice == "flex" or (choice == "dense_causal" and layout.num_queries > api._FEW_QUERIES)
    )
