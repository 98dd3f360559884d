"""The reference: masked softmax in fp32 (or fp64) over the dense mask. It is the specification;
nothing else is."""

from __future__ import annotations

import torch

from longgen.layout import Layout
from longgen.pattern import SparsePattern


def reference_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    pattern: SparsePattern,
    layout: Layout,
    scale: float,
    head_offset: int = 0,
    return_lse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute attention of q (B, T, H, D) over k, v (B, S, Hkv, D) by its definition.

    Scores and softmax are in fp32, or fp64 for fp64 inputs. A query that sees nothing (padding)
    gives zeros.

    Returns:
        out (B, T, H, D) and, if asked for, the log-sum-exp of the scores (B, H, T) in their
        precision.
    """
    group = q.shape[2] // k.shape[2]
    mask = torch.from_numpy(layout.dense_mask(pattern, k.shape[2], head_offset)).to(q.device)
    mask = mask.repeat_interleave(group, 1) if mask.shape[1] > 1 else mask
    dtype = torch.promote_types(q.dtype, torch.float32)
    qh, kh, vh = (x.to(dtype).transpose(1, 2) for x in (q, k, v))
    kh, vh = (x.repeat_interleave(group, 1) for x in (kh, vh))
    scores = (qh @ kh.transpose(-1, -2)) * scale
    scores = scores.masked_fill(~mask, float("-inf"))
    seen = mask.any(-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(~seen, 0.0), -1) * seen
    lse = None
    if return_lse:
        lse = torch.logsumexp(scores.masked_fill(~seen, 0.0), -1)
        lse = lse.masked_fill(~seen[..., 0], float("-inf"))
    return (weights @ vh).to(q.dtype).transpose(1, 2), lse
