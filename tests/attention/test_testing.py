"""The error budget itself: it must let rounding pass and nothing else."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from longgen.attention.testing import (
    ErrorBudget,
    assert_within_eager_error,
    eager_attention,
    random_inputs,
    visible_in_output,
)

CAUSAL = torch.ones(40, 40, dtype=torch.bool).tril()[None, None]


def test_memory_is_poisoned_here() -> None:
    """Results that an implementation never wrote show as NaN in all tests of this folder."""
    for empty in (
        torch.empty(1000),
        torch.empty_like(torch.zeros(10, 10), dtype=torch.bfloat16),
        torch.zeros(1).new_empty(5),
        torch.empty_strided((3, 4), (4, 1)),
    ):
        assert empty.isnan().all()
    assert not torch.zeros(1000).isnan().any()


def exact(n: int = 1000) -> torch.Tensor:
    return torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_is_allowed_where_eager_is_lucky(dtype: torch.dtype) -> None:
    rounded = exact().to(dtype)
    assert_within_eager_error("x", rounded, rounded, rounded.double())
    assert_within_eager_error("x", rounded, rounded, exact())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_three_times_the_error_is_refused(dtype: torch.dtype) -> None:
    ulp = torch.finfo(dtype).eps * 8
    eager = (exact() + ulp * exact().sign()).to(dtype)
    assert_within_eager_error("x", (exact() - 2 * ulp * exact().sign()).to(dtype), eager, exact())
    with pytest.raises(AssertionError, match=r"x: the root mean square error is .* allowed is"):
        assert_within_eager_error("x", (exact() + 3 * ulp).to(dtype), eager, exact())


def test_one_wrong_element_is_found() -> None:
    eager = exact(100_000).float()
    wrong = eager.clone()
    wrong[777] += 3e-6
    with pytest.raises(AssertionError, match=r"x: the largest error is 3.*worst at \(777,\)"):
        assert_within_eager_error("x", wrong, eager, exact(100_000))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    eager = exact().float()
    actual = eager.clone()
    actual[3] = bad
    with pytest.raises(AssertionError, match="x holds values that are not finite"):
        assert_within_eager_error("x", actual, eager, exact())


def test_another_dtype_or_shape_is_refused() -> None:
    eager = exact().float()
    with pytest.raises(AssertionError, match=r"x is torch.float64, not torch.float32"):
        assert_within_eager_error("x", exact(), eager, exact())
    with pytest.raises(AssertionError, match=r"x has shape \(1, 1000\)"):
        assert_within_eager_error("x", eager[None], eager, exact())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_single_hidden_key_breaks_the_budget(dtype: torch.dtype) -> None:
    """Of 820 pairs one is left out: that is more than rounding, in either dtype."""
    budget = ErrorBudget(random_inputs(40, dtype=dtype), CAUSAL)
    budget.check("eager", partial(eager_attention, mask=CAUSAL))
    wrong = CAUSAL.clone()
    wrong[..., 30, 12] = False
    with pytest.raises(AssertionError, match="wrong out"):
        budget.check("wrong", partial(eager_attention, mask=wrong))


def test_a_wrong_gradient_breaks_the_budget() -> None:
    budget = ErrorBudget(random_inputs(40), CAUSAL)

    def detached(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        late = torch.arange(40)[None, :, None, None] < 39
        return eager_attention(q, torch.where(late, k, k.detach()), v, CAUSAL)

    with pytest.raises(AssertionError, match="detached dk"):
        budget.check("detached", detached)


def test_eager_attention_is_softmax_attention() -> None:
    inputs = random_inputs(40, dtype=torch.float64)
    q, k, v = (x.transpose(1, 2) for x in inputs[:3])
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True
    )
    actual = eager_attention(*inputs[:3], CAUSAL)
    torch.testing.assert_close(actual, expected.transpose(1, 2), rtol=1e-12, atol=1e-12)
    blind = eager_attention(*inputs[:3], torch.zeros_like(CAUSAL))
    assert not blind.any()


@pytest.mark.parametrize("head_dim", [None, 7, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_keys_that_were_read_are_read_off_exactly(
    head_dim: int | None, dtype: torch.dtype
) -> None:
    mask = torch.rand(2, 3, 20, 50, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[0, 0, 4] = False
    read = visible_in_output(
        partial(eager_attention, mask=mask),
        20,
        50,
        batch=2,
        heads=6,
        key_value_heads=3,
        head_dim=head_dim,
        dtype=dtype,
    )
    assert torch.equal(read, mask.repeat_interleave(2, 1))
