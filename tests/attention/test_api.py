from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from longgen.attention import IMPLEMENTATIONS, api, attention
from longgen.attention.testing import random_inputs
from longgen.errors import UsageError
from longgen.layout import Layout, contiguous, padded
from longgen.pattern import SparsePattern

PATTERN = SparsePattern(block_size=4, sink_blocks=1, local_blocks=2)


def tensor(*shape: int) -> torch.Tensor:
    return torch.zeros(shape)


@pytest.mark.parametrize(
    ("q", "k", "v", "sentence"),
    [
        (
            tensor(5, 2, 8),
            tensor(1, 5, 2, 8),
            tensor(1, 5, 2, 8),
            "q must be (B, T, H, D) and k, v (B, S, Hkv, D) alike; "
            "they are (5, 2, 8), (1, 5, 2, 8), (1, 5, 2, 8).",
        ),
        (
            tensor(1, 5, 2, 8),
            tensor(1, 5, 2, 8),
            tensor(1, 5, 2, 4),
            "q must be (B, T, H, D) and k, v (B, S, Hkv, D) alike; "
            "they are (1, 5, 2, 8), (1, 5, 2, 8), (1, 5, 2, 4).",
        ),
        (
            tensor(1, 5, 2, 8),
            tensor(1, 5, 8),
            tensor(1, 5, 8),
            "q must be (B, T, H, D) and k, v (B, S, Hkv, D) alike; "
            "they are (1, 5, 2, 8), (1, 5, 8), (1, 5, 8).",
        ),
        (
            tensor(2, 5, 2, 8),
            tensor(1, 5, 2, 8),
            tensor(1, 5, 2, 8),
            "q (2, 5, 2, 8) and k (1, 5, 2, 8) must agree in batch and head size, "
            "with query heads a multiple of key/value heads.",
        ),
        (
            tensor(1, 5, 2, 8),
            tensor(1, 5, 2, 4),
            tensor(1, 5, 2, 4),
            "q (1, 5, 2, 8) and k (1, 5, 2, 4) must agree in batch and head size, "
            "with query heads a multiple of key/value heads.",
        ),
        (
            tensor(1, 5, 3, 8),
            tensor(1, 5, 2, 8),
            tensor(1, 5, 2, 8),
            "q (1, 5, 3, 8) and k (1, 5, 2, 8) must agree in batch and head size, "
            "with query heads a multiple of key/value heads.",
        ),
        (
            tensor(1, 5, 2, 8),
            tensor(1, 5, 2, 8),
            tensor(1, 5, 2, 8).bfloat16(),
            "q, k and v must have one dtype; "
            "they are torch.float32, torch.float32, torch.bfloat16.",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sentence: str
) -> None:
    with pytest.raises(UsageError) as error:
        attention(q, k, v)
    assert str(error.value) == sentence


@pytest.mark.parametrize(
    ("layout", "sentence"),
    [
        (
            Layout.causal(4, 5),
            "The layout describes 4 queries and 5 keys, the tensors hold 5 and 5.",
        ),
        (
            Layout.causal(5, 9),
            "The layout describes 5 queries and 9 keys, the tensors hold 5 and 5.",
        ),
        (
            Layout.packed([0, 2, 6]),
            "The layout describes 6 queries and 6 keys, the tensors hold 5 and 5.",
        ),
        (
            Layout.of_rows(padded(5, 0, n) for n in range(3)),
            "The layout describes 3 rows and 1 key heads, the tensors hold 2 and 2.",
        ),
        (
            Layout((contiguous(5),), ((contiguous(5),) * 3,)),
            "The layout describes 1 rows and 3 key heads, the tensors hold 2 and 2.",
        ),
    ],
)
def test_a_layout_that_does_not_fit_is_refused(layout: Layout, sentence: str) -> None:
    inputs = random_inputs(5, batch=2, head_dim=8)
    for impl in IMPLEMENTATIONS:
        with pytest.raises(UsageError) as error:
            attention(*inputs[:3], pattern=PATTERN, layout=layout, impl=impl)
        assert str(error.value) == sentence


def test_fewer_keys_than_queries_are_refused() -> None:
    with pytest.raises(UsageError, match="There are 5 queries but only 4 keys"):
        attention(tensor(1, 5, 2, 8), tensor(1, 4, 2, 8), tensor(1, 4, 2, 8))


@pytest.mark.parametrize("impl", ["auto", "reference", "blocked", "flex"])
def test_nothing_to_attend_with_is_refused(impl: str) -> None:
    some, no_heads, no_tokens = tensor(1, 5, 2, 8), tensor(1, 5, 0, 8), tensor(1, 0, 2, 8)
    for q, k in ((some, no_heads), (no_heads, some), (no_tokens, some), (no_tokens, no_tokens)):
        with pytest.raises(UsageError, match="at least one token, one head"):
            attention(q, k, k, impl=impl)
    for dtype in (torch.int32, torch.float8_e4m3fn):
        with pytest.raises(UsageError, match=rf"floating point, 16 bits or more; they are {dtype}"):
            attention(*[some.to(dtype)] * 3, impl=impl)


def test_tensors_of_several_devices_are_refused() -> None:
    q, k, v, _ = random_inputs(5)
    for here, there in ((k, v.to("meta")), (k.to("meta"), v)):
        with pytest.raises(UsageError, match=r"one device; they are on cpu, .*meta"):
            attention(q, here, there)


def test_what_is_no_pattern_or_layout_is_refused() -> None:
    for wrong in ({"pattern": "attention-sink"}, {"pattern": ""}, {"layout": [0, 2, 5]}):
        with pytest.raises(UsageError, match="a SparsePattern and a Layout; they are "):
            attention(*random_inputs(5)[:3], **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("impl", ["flash3", "", "dense", "Reference"])
def test_an_unknown_implementation_is_refused(impl: str) -> None:
    with pytest.raises(UsageError) as error:
        attention(*random_inputs(5, head_dim=8)[:3], impl=impl)
    assert str(error.value) == (
        f"There is no attention implementation {impl!r}; "
        "choose from ('auto', 'reference', 'blocked', 'flex', 'flash')."
    )


@pytest.mark.parametrize("which", [0, 1, 2])
def test_flex_with_gradients_on_cpu_is_refused(which: int) -> None:
    inputs = [x.requires_grad_(i == which) for i, x in enumerate(random_inputs(5)[:3])]
    with pytest.raises(UsageError) as error:
        attention(*inputs, pattern=PATTERN, impl="flex")
    assert str(error.value) == (
        'FlexAttention computes no gradients on CPU; use impl="blocked" (or "auto") there.'
    )


def test_flex_in_fp64_is_refused() -> None:
    with pytest.raises(UsageError) as error:
        attention(*random_inputs(5, dtype=torch.float64)[:3], pattern=PATTERN, impl="flex")
    assert str(error.value) == (
        "FlexAttention takes torch.bfloat16, torch.float16, torch.float32, the tensors are "
        'torch.float64; use impl="blocked" (or "auto").'
    )


def test_a_named_implementation_is_never_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where "auto" would leave the work to PyTorch, and even where the named one fails."""

    def stub(name: str) -> Any:
        def run(*_: Any, **__: Any) -> torch.Tensor:
            raise RuntimeError(name)

        return run

    for name in list(api._MASKED):
        monkeypatch.setitem(api._MASKED, name, stub(name))
    for name in api._MASKED:
        with pytest.raises(RuntimeError, match=name):
            attention(*random_inputs(5)[:3], impl=name)


@pytest.fixture
def announcements(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(api, "_announced", set())
    caplog.set_level(logging.INFO, logger="longgen.attention.api")
    return caplog


@pytest.mark.parametrize(
    ("pattern", "layout", "choice"),
    [
        (None, None, "attention (full causal) on cpu: dense_causal"),
        (None, Layout.causal(30, 40), "attention (full causal) on cpu: blocked"),
        (None, Layout.packed([0, 10, 30]), "attention (full causal) on cpu: blocked"),
        (None, Layout.causal(1, 40), "attention (full causal) on cpu: dense"),
        # A sequence that starts within a document, as one rank of several holds it.
        (
            None,
            Layout.of_rows([contiguous(30, 7)]),
            "attention (full causal) on cpu: dense_causal",
        ),
        (
            PATTERN,
            None,
            "attention (1 sink + 2 local of 4-token blocks) on cpu: blocked",
        ),
        # Two blocks see all of each other, but not if their document began long before.
        (
            PATTERN,
            Layout.causal(8),
            "attention (1 sink + 2 local of 4-token blocks) on cpu: dense_causal",
        ),
        (
            PATTERN,
            Layout.of_rows([contiguous(8, 7)]),
            "attention (1 sink + 2 local of 4-token blocks) on cpu: blocked",
        ),
        (
            PATTERN,
            Layout.causal(1, 40),
            "attention (1 sink + 2 local of 4-token blocks) on cpu: blocked",
        ),
    ],
)
def test_auto_says_once_what_it_chose(
    announcements: pytest.LogCaptureFixture,
    pattern: SparsePattern | None,
    layout: Layout | None,
    choice: str,
) -> None:
    shape = layout or Layout.causal(30)
    inputs = random_inputs(shape.num_queries, shape.num_keys)
    for _ in range(3):
        attention(*inputs[:3], pattern=pattern, layout=layout)
    assert announcements.messages == [choice]


def test_a_named_implementation_says_nothing(announcements: pytest.LogCaptureFixture) -> None:
    attention(*random_inputs(5)[:3], impl="blocked")
    assert announcements.messages == []


@pytest.mark.parametrize("impl", ["auto", "reference", "blocked"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_output_has_the_queries_shape_and_dtype(impl: str, dtype: torch.dtype) -> None:
    inputs = random_inputs(3, 10, heads=4, key_value_heads=2, dtype=dtype)
    for pattern in (None, PATTERN):
        out = attention(*inputs[:3], pattern=pattern, impl=impl)
        assert (out.shape, out.dtype) == (inputs.q.shape, dtype)
