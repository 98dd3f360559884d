"""Layers and steps that need no mask of ours: PyTorch's fused attention with the fastest backend of
the card."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

logger = logging.getLogger(__name__)

_FEW_QUERIES = 256


@lru_cache(maxsize=16)
def _backends(device: torch.device, dtype: torch.dtype, is_causal: bool) -> tuple[SDPBackend, ...]:
    """Return the backends to try, fastest first. None of them materialises a mask but the last of
    fp32, and the only one of fp64."""
    major = torch.cuda.get_device_capability(device)[0]
    order = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    if dtype == torch.float64:
        order = [SDPBackend.MATH]
    elif dtype == torch.float32:
        order = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    elif major >= 9 and is_causal:
        # Not for single queries against a growing cache: cuDNN plans anew for every new length.
        order.insert(0, SDPBackend.CUDNN_ATTENTION)
    logger.info(
        "dense attention on %s: %s",
        torch.cuda.get_device_name(device),
        ", ".join(backend.name for backend in order),
    )
    return tuple(order)


def _kernel(q: torch.Tensor, is_causal: bool) -> AbstractContextManager[None]:
    if q.device.type != "cuda":
        return nullcontext()
    if q.dtype == torch.float32 and q.shape[1] <= _FEW_QUERIES:
        # The fused fp32 kernel takes exp to a few ulp: up to five times plain PyTorch's error where
        # few keys are summed. The scores of few queries may be kept.
        return sdpa_kernel(SDPBackend.MATH)
    return sdpa_kernel(list(_backends(q.device, q.dtype, is_causal)), set_priority=True)


def dense_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, is_causal: bool, scale: float
) -> torch.Tensor:
    """Attend causally within one document, or (`is_causal` False) to every key.

    Args:
        q: (B, T, H, D).
        k: (B, S, Hkv, D), with S == T if causal.
        v: (B, S, Hkv, D).
        is_causal: whether query t sees keys 0..t only.
        scale: factor on the scores.

    Returns:
        (B, T, H, D).
    """
    qh, kh, vh = (x.transpose(1, 2) for x in (q, k, v))
    group = qh.shape[1] // kh.shape[1]
    if group > 1 and q.dtype == torch.float32 and q.device.type == "cuda":
        # The only fused fp32 kernel has no grouped heads.
        kh, vh = (x.repeat_interleave(group, 1) for x in (kh, vh))
        group = 1
    is_causal = is_causal and q.shape[1] > 1
    with _kernel(q, is_causal):
        out = F.scaled_dot_product_attention(
            qh, kh, vh, is_causal=is_causal, scale=scale, enable_gqa=group > 1
        )
    return out.transpose(1, 2)
