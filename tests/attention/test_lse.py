"""The log-sum-exp of the scores, from every implementation that runs on CPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from longgen.attention import attention
from longgen.attention.testing import random_inputs
from longgen.errors import UsageError
from longgen.layout import Layout, cached, contiguous, padded
from longgen.pattern import SparsePattern

LayoutMask = Callable[..., torch.Tensor]

FULL = SparsePattern.full()
STRIDED = SparsePattern.block_sparse(block_size=16, stride_blocks=3)
SINK = SparsePattern(block_size=16, sink_blocks=1, local_blocks=2)
PATTERNS = {"full": FULL, "sink": SINK, "strided": STRIDED}
LAYOUTS = {
    "plain": Layout.causal(300),
    "offset": Layout.causal(70, 300),
    "one_query": Layout.causal(1, 300),
    "packed": Layout.packed([0, 40, 300]),
    # Rows with queries that see nothing.
    "left_padded": Layout.of_rows(padded(300, 0, n) for n in (0, 40, 300)),
    "cached": Layout(
        (contiguous(40, 300),),
        (tuple(cached(FULL, 300, 0, 0) + contiguous(40, 300) for _ in range(2)),),
    ),
}
IMPLS = ("reference", "blocked", "auto")
SCALE = 0.2


def by_the_oracle(
    q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor, scale: float
) -> torch.Tensor:
    """Return logsumexp over visible keys in fp64 (B, H, T)."""
    group = q.shape[2] // k.shape[2]
    keys = k.double().repeat_interleave(group, 2)
    scores = torch.einsum("bthd,bshd->bhts", q.double(), keys) * scale
    hidden = ~mask.repeat_interleave(group, 1)
    return torch.logsumexp(scores.masked_fill(hidden, float("-inf")), -1)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["fp64", "fp32", "bf16"]
)
def test_logsumexp_of_the_visible(
    layout_mask: LayoutMask, dtype: torch.dtype, name: str, kind: str, impl: str
) -> None:
    pattern, layout = PATTERNS[name], LAYOUTS[kind]
    q, k, v, _ = random_inputs(
        layout.num_queries, layout.num_keys, batch=3, heads=6, head_dim=16, dtype=dtype
    )
    options = {"pattern": pattern, "layout": layout, "scale": SCALE, "head_offset": 1}
    out, lse = attention(q, k, v, **options, impl=impl, return_lse=True)
    expected = by_the_oracle(q, k, layout_mask(pattern, layout, 2, 1), SCALE)
    assert lse.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.equal(lse == float("-inf"), expected == float("-inf"))
    assert bool((lse == float("-inf")).any()) == (kind == "left_padded")
    # Some hundred roundings of scores that are ten at most.
    bound = 1e-12 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(lse.double(), expected, rtol=bound, atol=bound)
    without = attention(q, k, v, **options, impl=impl)
    assert isinstance(without, torch.Tensor) and without.shape == out.shape
    # Without it "auto" is free to take PyTorch's own kernels.
    assert impl == "auto" or torch.equal(without, out)


def test_flex_on_cpu_keeps_it_to_itself() -> None:
    with pytest.raises(UsageError) as error:
        attention(*random_inputs(50)[:3], pattern=STRIDED, impl="flex", return_lse=True)
    assert str(error.value) == (
        'FlexAttention returns no log-sum-exp on CPU; use impl="blocked" (or "auto") there.'
    )


@pytest.mark.parametrize("impl", ["blocked", "auto"])
@pytest.mark.parametrize("kind", ["plain", "left_padded"])
def test_it_has_gradients(kind: str, impl: str) -> None:
    found = []
    for name in (impl, "reference"):
        inputs = random_inputs(300, batch=3, head_dim=16, dtype=torch.float64)[:3]
        q, k, v = (x.requires_grad_() for x in inputs)
        out, lse = attention(
            q, k, v, pattern=STRIDED, layout=LAYOUTS[kind], impl=name, return_lse=True
        )
        loss = out.sin().sum() + lse[lse > float("-inf")].cos().sum()
        found.append(torch.autograd.grad(loss, (q, k, v)))
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


def test_parts_of_one_attention_can_be_put_together() -> None:
    """Two halves of the keys, merged by their log-sum-exp, give the whole."""
    q, k, v, _ = random_inputs(64, 300, dtype=torch.float64)
    whole = attention(q, k, v, layout=Layout.causal(64, 300), impl="reference")
    first, second = Layout((contiguous(64, 236),), ((contiguous(150),),)), contiguous(150, 150)
    parts = [
        attention(q, k[:, :150], v[:, :150], layout=first, return_lse=True),
        attention(
            q,
            k[:, 150:],
            v[:, 150:],
            layout=Layout((contiguous(64, 236),), ((second,),)),
            return_lse=True,
        ),
    ]
    weights = torch.stack([lse for _, lse in parts]).softmax(0).transpose(2, 3)[..., None]
    merged = sum(weight * out for weight, (out, _) in zip(weights, parts, strict=True))
    torch.testing.assert_close(merged, whole, rtol=1e-12, atol=1e-12)
