from dataclasses import replace

import pytest
import torch

from longgen.attention import attention
from longgen.attention.testing import Attend, Inputs, random_inputs
from longgen.bench.checks import (
    RowTruth,
    Wrong,
    check_full_length,
    check_gate,
    gate_budget,
    gate_length,
    gate_shape,
    sampled_rows,
)
from longgen.bench.work import DIRECTIONS, PATTERNS, Heads, Work
from longgen.pattern import SparsePattern

CPU = torch.device("cpu")


def under(pattern: SparsePattern) -> Attend:
    return lambda q, k, v: attention(q, k, v, pattern=pattern)


@pytest.mark.parametrize("name", [name for name in PATTERNS if name != "full"])
def test_the_gate_is_long_enough_to_hide_something(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    pattern = PATTERNS[name]
    length = gate_length(pattern)
    assert 2048 <= length <= 4608 and length % 128 == 0
    shape = gate_shape(pattern, Heads(heads=32, kv_heads=8))
    # Every part of the pattern hides something: leaving any out shows.
    pairs = pattern.mean_visible_pairs(length, shape.kv_heads)
    parts = [replace(pattern, local_blocks=pattern.local_blocks + 1)]
    parts += [replace(pattern, sink_blocks=pattern.sink_blocks + 1)]
    # A stride of 8,192 tokens would take 30 GB of scores; sampled rows at full length see to it.
    if 0 < pattern.stride_blocks * pattern.block_size < 8192:
        parts.append(replace(pattern, stride_blocks=pattern.stride_blocks + 1))
    for part in parts:
        assert part.mean_visible_pairs(length, shape.kv_heads) != pairs


def test_the_gate_keeps_group_and_size_with_few_heads() -> None:
    full, strided = PATTERNS["full"], PATTERNS["strided"]
    assert gate_shape(full, Heads(heads=9, kv_heads=3, head_dim=64)) == Heads(
        heads=6, kv_heads=2, head_dim=64
    )
    assert gate_shape(full, Heads(heads=64, kv_heads=8)).kv_heads == 1
    # Heads that see other blocks must not be confused.
    assert gate_shape(strided, Heads(heads=64, kv_heads=8)).kv_heads == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gate_tells_right_from_wrong(work: Work, dtype: torch.dtype) -> None:
    work = replace(work, dtype=dtype)
    budget = gate_budget(work, CPU, gradients=True, seed=0)
    check_gate("good", under(work.pattern), budget)
    for change in ({"local_blocks": 3}, {"sink_blocks": 0}, {"block_size": 32}):
        with pytest.raises(Wrong, match="wrong result at 192 tokens: bad out"):
            check_gate("bad", under(replace(work.pattern, **change)), budget)


def test_the_gate_sees_a_wrong_gradient(work: Work) -> None:
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return 1.02 * grad

    budget = gate_budget(work, CPU, gradients=True, seed=0)
    good = under(work.pattern)
    with pytest.raises(Wrong, match="dk"):
        check_gate("bad", lambda q, k, v: good(q, Doubled.apply(k), v), budget)


def test_sampled_rows_are_in_the_text_and_hold_the_last() -> None:
    for length in (1, 5, 192, 131072):
        groups = sampled_rows(length, 0)
        assert groups["late"][-1] == length - 1
        rows = [row for group in groups.values() for row in group]
        assert all(0 <= row < length for row in rows) and len(rows) <= 32
        assert groups == sampled_rows(length, 0)


@pytest.fixture
def inputs() -> Inputs:
    return random_inputs(640, heads=6, key_value_heads=3, head_dim=16)


PATTERN = SparsePattern(block_size=16, sink_blocks=1, local_blocks=2, stride_blocks=4, head_shift=1)


def test_rows_at_full_length_tell_right_from_wrong(inputs: Inputs) -> None:
    truth = RowTruth(inputs, PATTERN, gradients=True, seed=0)
    check_full_length("good", under(PATTERN), inputs, truth, DIRECTIONS)
    check_full_length("good", under(PATTERN), inputs, truth, ("forward",))
    for change in ({"local_blocks": 3}, {"sink_blocks": 0}, {"head_shift": 2}):
        with pytest.raises(Wrong, match="full length: bad out"):
            check_full_length("bad", under(replace(PATTERN, **change)), inputs, truth, DIRECTIONS)


def test_what_is_not_finite_or_of_another_shape_is_refused(inputs: Inputs) -> None:
    truth = RowTruth(inputs, PATTERN, gradients=True, seed=0)
    good = under(PATTERN)

    def hole(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = good(q, k, v)
        return torch.cat([out[:, :3], out[:, 3:4] * float("nan"), out[:, 4:]], 1)

    with pytest.raises(Wrong, match="out holds values that are not finite"):
        check_full_length("bad", hole, inputs, truth, DIRECTIONS)
    with pytest.raises(Wrong, match="out has shape"):
        check_full_length(
            "bad", lambda q, k, v: good(q, k, v).transpose(1, 2), inputs, truth, DIRECTIONS
        )


def test_a_wrong_gradient_of_the_queries_shows_in_rows(inputs: Inputs) -> None:
    truth = RowTruth(inputs, PATTERN, gradients=True, seed=0)
    good = under(PATTERN)

    def half(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return good(0.5 * q + 0.5 * q.detach(), k, v)

    with pytest.raises(Wrong, match="bad dq"):
        check_full_length("bad", half, inputs, truth, DIRECTIONS)


def test_truth_is_that_of_plain_attention(inputs: Inputs) -> None:
    truth = RowTruth(inputs, PATTERN, gradients=False, seed=0)
    whole = attention(*(x.double() for x in inputs[:3]), pattern=PATTERN, impl="blocked")
    rows, heads = truth.rows["late"], [head for _, head in truth.heads]
    assert [kv for kv, _ in truth.heads] == [0, 1, 2] and len(set(heads)) == 3
    expected = whole[:, rows][:, :, heads]
    torch.testing.assert_close(truth.truth["late"][1]["out"], expected)
