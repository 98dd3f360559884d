"""The parts of a decoder layer for one token, as few as there can be.

They are bound by reading weights, and little happens in between: norms, rotary embedding, a gate,
residuals. A kernel for each of these leaves the memory idle at every launch; here norms go into the
product behind them, gate and residual into the one before, and what is rotated is stored at once.
On NVIDIA GPUs these are Triton kernels, elsewhere plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from longgen.engine.kernels import Places, decode_attention, store_tokens, use_triton


class Norm(NamedTuple):
    """Hold an RMS norm: its weight (K,) and what is added to the mean square."""

    weight: torch.Tensor
    eps: float

    @classmethod
    def of(cls, module: torch.nn.Module) -> Norm:
        """Read transformers' module."""
        return cls(module.weight, module.variance_epsilon)  # type: ignore[arg-type]

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """Norm x (..., K), in its own dtype."""
        y = x.float() if x.dtype.itemsize < 4 else x
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


class Rotary(NamedTuple):
    """Hold what turns the heads of one token a sequence: cos and sin of their positions, (N, D), as
    transformers' rotary embedding gives them, and the norms of query and key heads before that;
    there are both or none."""

    cos: torch.Tensor
    sin: torch.Tensor
    q_norm: Norm | None = None
    k_norm: Norm | None = None

    def apply(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotate q (N, H, D) and k (N, Hkv, D)."""
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm.apply(q), self.k_norm.apply(k)
        cos, sin = self.cos[:, None], self.sin[:, None]
        return q * cos + _rotate_half(q) * sin, k * cos + _rotate_half(k) * sin


class Seen(NamedTuple):
    """Hold what one token of each of N sequences sees, as `kernels.decode_attention` takes it;
    `held` is how much of each page counts, None all of it."""

    tables: torch.Tensor
    held: int | None = None
    lengths: torch.Tensor | None = None
    visible: torch.Tensor | None = None
    arrivals: torch.Tensor | None = None

    def attend(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        *,
        scale: float,
        scales: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attend with q (N, H, D) to whole pages of keys and values: `kernels.decode_attention`."""
        return decode_attention(
            q,
            keys[:, : self.held],
            values[:, : self.held],
            self.tables,
            scale=scale,
            lengths=self.lengths,
            visible=self.visible,
            scales=scales,
            arrivals=self.arrivals,
        )


def project(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None] = (),
    *,
    norm: Norm | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Multiply one token with up to three matrices, whose results lie end to end.

    Args:
        x: (1, K).
        weights: each (rows, K), contiguous.
        biases: each (rows,) or None, as many as weights; nothing is all None.
        norm: of x, first.
        residual: what is added to the result, (1, all rows).

    Returns:
        (1, all rows) in x's dtype.
    """
    biases = biases or [None] * len(weights)
    if use_triton(x.device):
        from longgen.engine.triton_linear import matvec

        return matvec(x, weights, biases, norm=norm, residual=residual)
    x = x if norm is None else norm.apply(x)
    out = torch.cat([F.linear(x, w, b) for w, b in zip(weights, biases, strict=True)], 1)
    return out if residual is None else residual + out


def project_gated(
    x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, *, norm: Norm
) -> torch.Tensor:
    """Compute silu(gate x) * (up x) of one normed token.

    Args:
        x: (1, K).
        gate: (rows, K), contiguous.
        up: (rows, K), contiguous.
        norm: of x, first.

    Returns:
        (1, rows) in x's dtype.
    """
    if use_triton(x.device):
        from longgen.engine.triton_linear import matvec

        return matvec(x, (gate, up), (None, None), norm=norm, gated=True)
    x = norm.apply(x)
    return F.silu(F.linear(x, gate)) * F.linear(x, up)


def rotate_and_attend(
    keys: torch.Tensor,
    values: torch.Tensor,
    qkv: torch.Tensor,
    rotary: Rotary,
    *,
    num_heads: int,
    places: Places,
    seen: Seen,
    scale: float,
    scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rotate queries and keys of one token a sequence, store keys and values, and attend.

    Args:
        keys: (pages, P, Hkv, D), written to.
        values: (pages, P, Hkv, D), written to.
        qkv: queries, keys and values end to end, (N, (H + 2 Hkv) D).
        rotary: what queries and keys are turned by.
        num_heads: H.
        places: where the new tokens go. Rows of no sequence have places that none sees.
        seen: what they see, themselves included: if it has lengths, the last place that these count
            is the one that `places` says.
        scale: factor on the scores.
        scales: factors (2, Hkv) of an e4m3 cache.

    Returns:
        (N, H, D) in the dtype of `qkv`.
    """
    if use_triton(qkv.device):
        from longgen.engine import triton_decode

        return triton_decode.rotate_and_attend(
            keys, values, qkv, rotary, num_heads, places, seen, scale, scales
        )
    num_key_heads, head_dim = keys.shape[2:]
    heads = qkv.view(len(qkv), -1, head_dim)
    q, k, v = heads.split((num_heads, num_key_heads, num_key_heads), 1)
    q, k = rotary.apply(q, k)
    store_tokens(keys, values, k, v, **places._asdict(), scales=scales)
    return seen.attend(q, keys, values, scale=scale, scales=scales)


def _rotate_half(x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)
