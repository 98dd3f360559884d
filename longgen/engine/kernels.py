"""Attention of one query a sequence to keys that lie in pages.

Bound by memory: on an NVIDIA GPU a Triton kernel splits each sequence's keys over programs and a
second one puts the parts together; elsewhere plain PyTorch does it.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch

_HAS_TRITON = importlib.util.find_spec("triton") is not None


def decode_attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    block_tables: torch.Tensor,
    *,
    scale: float,
    lengths: torch.Tensor | None = None,
    visible: torch.Tensor | None = None,
    num_splits: int | None = None,
) -> torch.Tensor:
    """Attend with one query a sequence.

    Args:
        q: (N, H, D).
        keys: (pages, P, Hkv, D); H is a multiple of Hkv.
        values: (pages, P, Hkv, D).
        block_tables: each sequence's pages in order, (N, most), integers. A slot is a sequence's
            only page.
        scale: factor on the scores.
        lengths: keys of each sequence, from its first page on, (N,); None if `visible` says all.
        visible: bool (N, heads, most * P) with heads 1 or Hkv: keys that are seen.
        num_splits: parts that a sequence's keys are cut into; None chooses.

    Returns:
        (N, H, D) in q's dtype. A query that sees nothing gives zeros.
    """
    if use_triton(q.device):
        from longgen.engine.triton_decode import paged_decode

        return paged_decode(q, keys, values, block_tables, scale, lengths, visible, num_splits)
    return _plain(q, keys, values, block_tables, scale, lengths, visible)


def use_triton(device: torch.device) -> bool:
    """Whether the Triton kernel can run: on NVIDIA GPUs, or under Triton's interpreter."""
    return _HAS_TRITON and (device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1")


def _plain(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    block_tables: torch.Tensor,
    scale: float,
    lengths: torch.Tensor | None,
    visible: torch.Tensor | None,
) -> torch.Tensor:
    number, num_heads, _ = q.shape
    num_key_heads = keys.shape[2]
    dtype = torch.promote_types(q.dtype, torch.float32)
    k, v = (x[block_tables.long()].flatten(1, 2).to(dtype) for x in (keys, values))
    mask: Any = torch.ones(1, 1, k.shape[1], dtype=torch.bool, device=q.device)
    if lengths is not None:
        mask = mask & (torch.arange(k.shape[1], device=q.device) < lengths[:, None, None])
    if visible is not None:
        mask = mask & visible
    grouped = q.to(dtype).view(number, num_key_heads, num_heads // num_key_heads, -1)
    scores = torch.einsum("nhgd,nshd->nhgs", grouped, k) * scale
    scores = scores.masked_fill(~mask[:, :, None], float("-inf"))
    seen = mask.any(-1)[:, :, None, None]
    weights = torch.softmax(scores.masked_fill(~seen, 0.0), -1) * seen
    return torch.einsum("nhgs,nshd->nhgd", weights, v).reshape(q.shape).to(q.dtype)
