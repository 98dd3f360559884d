"""How wrong attention may be, and what to feed it: budgets and inputs for tests and benchmarks.

Nothing here has a tuned tolerance. An implementation is held to the error that plain PyTorch makes
in the same dtype, both measured against fp64; and which keys it reads is checked exactly
(`visible_in_output`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Inputs(NamedTuple):
    """Hold queries (B, T, H, D), keys and values (B, S, Hkv, D) and the output's gradient."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    grad: torch.Tensor


def random_inputs(
    num_queries: int,
    num_keys: int | None = None,
    *,
    batch: int = 1,
    heads: int = 4,
    key_value_heads: int = 2,
    head_dim: int = 64,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Inputs:
    """Draw standard normal inputs; the same seed gives the same numbers on every device."""
    num_keys = num_queries if num_keys is None else num_keys
    generator = torch.Generator().manual_seed(seed)

    def draw(length: int, num_heads: int) -> torch.Tensor:
        values = torch.randn(batch, length, num_heads, head_dim, generator=generator)
        return values.to(device, dtype)

    return Inputs(
        draw(num_queries, heads),
        draw(num_keys, key_value_heads),
        draw(num_keys, key_value_heads),
        draw(num_queries, heads),
    )


def eager_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor,
    scale: float | None = None,
) -> torch.Tensor:
    """Compute masked softmax attention with every step in the inputs' own dtype.

    In fp64 it is the truth that others are measured by, in a lower dtype the error that they are
    allowed.

    Args:
        q: (B, T, H, D).
        k: (B, S, Hkv, D).
        v: (B, S, Hkv, D).
        mask: bool (B or 1, Hkv or 1, T, S), True where a query sees a key.
        scale: factor on the scores; None is D ** -0.5.

    Returns:
        (B, T, H, D); zeros where a query sees nothing.
    """
    group = q.shape[2] // k.shape[2]
    mask = mask.repeat_interleave(group, 1) if mask.shape[1] > 1 else mask
    qh = q.transpose(1, 2)
    kh, vh = (x.transpose(1, 2).repeat_interleave(group, 1) for x in (k, v))
    scores = (qh @ kh.transpose(-1, -2)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    # A finite floor: a row that sees nothing must not turn into NaN before it is blanked.
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, -1).masked_fill(~mask, 0.0)
    return (weights @ vh).transpose(1, 2)


def assert_within_eager_error(
    name: str,
    actual: torch.Tensor,
    eager: torch.Tensor,
    exact: torch.Tensor,
    *,
    largest: bool = True,
    floor: float = 0.0,
) -> None:
    """Assert that `actual` is at most twice as wrong as the eager computation in the same dtype.

    Half an ulp comes on top, of the exact values in the same norm: what rounding a perfect result
    to this dtype costs.

    Args:
        name: what is compared, for the message.
        actual: the result under test.
        eager: plain PyTorch's result in the same dtype.
        exact: the result in fp64.
        largest: whether the largest error is held to it, as the root mean square always is.
        floor: error allowed even where the exact values are zero.
    """
    assert actual.dtype == eager.dtype, f"{name} is {actual.dtype}, not {eager.dtype}"
    assert actual.shape == eager.shape == exact.shape, f"{name} has shape {tuple(actual.shape)}"
    assert bool(torch.isfinite(actual).all()), f"{name} holds values that are not finite"
    if not exact.numel():
        return
    half_ulp = 0.5 * torch.finfo(actual.dtype).eps
    wrong, allowed = ((x.to(exact.dtype) - exact).abs() for x in (actual, eager))
    norms: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "root mean square": _root_mean_square
    }
    if largest:
        norms["largest"] = torch.max
    for norm, measure in norms.items():
        rounding = half_ulp * float(measure(exact.abs()))
        error, budget = float(measure(wrong)), 2 * float(measure(allowed)) + rounding + floor
        worst = tuple(int(i) for i in np.unravel_index(int(wrong.argmax()), wrong.shape))
        assert error <= budget, (
            f"{name}: the {norm} error is {error:.3e}, allowed is {budget:.3e} "
            f"(twice eager's {float(measure(allowed)):.3e}, and rounding); worst at {worst}"
        )


def _root_mean_square(x: torch.Tensor) -> torch.Tensor:
    return x.square().mean().sqrt()


def with_gradients(attend: Attend, inputs: Inputs) -> dict[str, torch.Tensor]:
    """Run `attend(q, k, v)` forward and backward; return "out", "dq", "dk" and "dv"."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs[:3]]
    out = attend(*leaves)
    grads = torch.autograd.grad(out, leaves, inputs.grad)
    return {"out": out.detach(), **dict(zip(("dq", "dk", "dv"), grads, strict=True))}


class ErrorBudget:
    """Hold what attention under a mask gives in truth (fp64) and in eager PyTorch.

    Outputs are held to the budget in their root mean square and in their largest error, gradients
    in the root mean square. A fused backward pass rounds partial sums, and differences
    grad . v - grad . out of numbers that plain autograd rounds alike; on the few elements where
    such terms nearly cancel, eager's error is smaller, but not because it is more precise.
    """

    def __init__(
        self,
        inputs: Inputs,
        mask: torch.Tensor,
        *,
        scale: float | None = None,
        gradients: bool = True,
    ) -> None:
        """Compute both.

        Args:
            inputs: what implementations will be run on.
            mask: bool (B or 1, Hkv or 1, T, S), True where a query sees a key.
            scale: factor on the scores; None is D ** -0.5.
            gradients: whether to compare gradients too.
        """
        self.inputs, self.gradients = inputs, gradients
        doubles = Inputs(*(x.double() for x in inputs))
        self.eager, self.exact = (
            self._run(lambda q, k, v: eager_attention(q, k, v, mask, scale), x)
            for x in (inputs, doubles)
        )
        # A lone visible key has weight 1 whatever its score: eager's gradients of q and k can be
        # exactly zero. Others differ from it by the rounding of grad . v, times the other factor.
        self.floor = 0.0
        if bool((mask.sum(-1) <= 1).all()):
            q, k, v, grad = (float(x.norm(dim=-1).max()) for x in doubles)
            factor = inputs.q.shape[-1] ** -0.5 if scale is None else scale
            self.floor = torch.finfo(inputs.q.dtype).eps * factor * grad * v * max(q, k)

    def _run(self, attend: Attend, inputs: Inputs) -> dict[str, torch.Tensor]:
        if self.gradients:
            return with_gradients(attend, inputs)
        with torch.no_grad():
            return {"out": attend(*inputs[:3])}

    def check(self, name: str, attend: Attend) -> None:
        """Run `attend(q, k, v)` and assert that it stays within the budget."""
        for key, value in self._run(attend, self.inputs).items():
            assert_within_eager_error(
                f"{name} {key}",
                value,
                self.eager[key],
                self.exact[key],
                largest=key == "out",
                floor=self.floor if key in ("dq", "dk") else 0.0,
            )


def visible_in_output(
    attend: Attend,
    num_queries: int,
    num_keys: int,
    *,
    batch: int = 1,
    heads: int = 1,
    key_value_heads: int = 1,
    head_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    requires_grad: bool = False,
) -> torch.Tensor:
    """Read off an implementation which keys each query sees: bool (B, H, T, S), exact in any dtype.

    Zero queries weigh all the keys they see alike, and values that are rows of the identity then
    put each weight in a column of its own. Keys that are not seen give exact zeros.

    Args:
        attend: the implementation under test.
        num_queries: T.
        num_keys: S.
        batch: B.
        heads: H.
        key_value_heads: Hkv.
        head_dim: D; None takes S, so that one run suffices. Otherwise ceil(S / D) runs look at D
            keys each.
        dtype: of the inputs.
        device: of the inputs.
        requires_grad: whether inputs require gradients, to reuse what was compiled for training.
    """
    head_dim = head_dim or num_keys
    q = torch.zeros(batch, num_queries, heads, head_dim, dtype=dtype, device=device)
    k = torch.zeros(batch, num_keys, key_value_heads, head_dim, dtype=dtype, device=device)
    slabs = []
    for start in range(0, num_keys, head_dim):
        width = min(head_dim, num_keys - start)
        v = torch.zeros_like(k)
        rows = torch.eye(width, head_dim, dtype=dtype, device=device)
        v[:, start : start + width] = rows[:, None]
        leaves = [x.detach().requires_grad_(requires_grad) for x in (q, k, v)]
        slabs.append(attend(*leaves).detach()[..., :width] != 0)
    return torch.cat(slabs, -1).transpose(1, 2)
