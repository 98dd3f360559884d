"""FlashAttention-4's kernels (extra `flash`) under sparse patterns: the fast path on Hopper."""

from __future__ import annotations

from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version

import torch

from longgen.attention.flash.plan import documents_alone, is_plain, tables
from longgen.errors import UsageError
from longgen.layout import Layout
from longgen.pattern import SparsePattern

HEAD_DIMS = (64, 80, 96, 128)
DTYPES = (torch.bfloat16, torch.float16)
# The version whose kernel classes we build on; pyproject.toml pins it too, and a test compares.
FLASH_ATTN_4 = "4.0.0b36"


@lru_cache(maxsize=1)
def _missing() -> str | None:
    """Say why the package can't be used, if so."""
    try:
        found = version("flash-attn-4")
    except PackageNotFoundError:
        return "flash-attn-4 isn't installed; pip install 'longgen[flash]'"
    if found != FLASH_ATTN_4:
        return f"flash-attn-4 is {found} but {FLASH_ATTN_4} is needed; pip install 'longgen[flash]'"
    try:
        import longgen.attention.flash.hopper  # noqa: F401
    except Exception as error:
        return f"flash-attn-4 can't be loaded: {error}"
    return None


@lru_cache(maxsize=8)
def _unfit(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"its kernels run on NVIDIA GPUs, the tensors are on {device}"
    major, minor = torch.cuda.get_device_capability(device)
    if major != 9:
        return (
            f"its kernels are for Hopper GPUs (compute capability 9), "
            f"{torch.cuda.get_device_name(device)} has {major}.{minor}"
        )
    return None


def flash_obstacle(q: torch.Tensor, *, gradients: bool) -> str | None:
    """Say what keeps these kernels from running on q (B, T, H, D), or return None.

    Args:
        q: queries.
        gradients: whether a backward pass will follow.
    """
    unfit = _unfit(q.device)
    if unfit:
        return unfit
    if q.dtype not in DTYPES:
        return f"its kernels take {' or '.join(str(x) for x in DTYPES)}, the tensors are {q.dtype}"
    if q.shape[3] not in HEAD_DIMS:
        return f"its kernels take head sizes {HEAD_DIMS}, the tensors have {q.shape[3]}"
    if gradients and torch.are_deterministic_algorithms_enabled():
        return (
            "its backward pass sums in no fixed order, and deterministic algorithms are asked for"
        )
    return _missing()


def flash_attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    pattern: SparsePattern,
    layout: Layout,
    scale: float,
    head_offset: int = 0,
    return_lse: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute attention of q (B, T, H, D) over k, v (B, S, Hkv, D).

    Returns:
        out (B, T, H, D) and the log-sum-exp of the scores (B, H, T) in fp32, -inf where a query
        sees nothing. Both are differentiable.

    Raises:
        UsageError: if the kernels can't do it; the message says why.
    """
    gradients = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    obstacle = flash_obstacle(q, gradients=gradients)
    if obstacle:
        raise UsageError(
            f'impl="flash" can\'t run: {obstacle}. Use impl="flex", or "auto" to have one chosen.'
        )
    from longgen.attention.flash.hopper import tiles_q
    from longgen.attention.flash.ops import flash_dense, flash_listed

    # Positions in both cases below are smaller than the number of keys.
    if pattern.is_full or pattern.covers(layout.num_keys):
        if is_plain(layout):
            return flash_dense(q, k, v, None, scale)
        bounds = documents_alone(layout)
        if bounds is not None:
            return _documents(q, k, v, tuple(bounds), scale)
    made = tables(
        pattern,
        layout,
        q.shape[0],
        q.shape[2],
        k.shape[2],
        head_offset,
        tiles_q(q.shape[3]),
        q.device,
        gradients,
    )
    return flash_listed(
        *(q, k, v, made.forward, made.backward, made.strided),
        made.mask.encode(),
        made.backward_mask.encode(),
        made.strided_mask.encode() if made.strided_mask else "",
        made.tile_k,
        scale,
    )


def _documents(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: tuple[int, ...], scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend within documents packed into rows that may share their cumulative lengths."""
    from longgen.attention.flash.ops import flash_dense

    batch, length, heads, _ = q.shape
    flat, lse = flash_dense(
        *(x.flatten(0, 1) for x in (q, k, v)), _cumulative(bounds, batch, length, q.device), scale
    )
    return flat.view(q.shape), lse.view(heads, batch, length).transpose(0, 1)


@lru_cache(maxsize=8)
def _cumulative(
    bounds: tuple[int, ...], batch: int, length: int, device: torch.device
) -> torch.Tensor:
    with torch.inference_mode(False):
        rows = [torch.tensor(bounds)]
        if bounds[-1] != batch * length:
            rows = [rows[0][1 if row else 0 :] + row * length for row in range(batch)]
        return torch.cat(rows).to(device, torch.int32)
