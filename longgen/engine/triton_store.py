"""Storing the new tokens of a layer in Triton: keys and values, in one launch."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from longgen.engine.kernels import Places, launch_options
from longgen.engine.linear import Rotary

# The largest number of e4m3.
LARGEST = tl.constexpr(448.0)


@triton.jit
def to_e4m3(x: tl.tensor, scale: tl.tensor) -> tl.tensor:
    """Scale, clamp and round to the bits of e4m3, as `EngineCache.encode` does.

    In integers, so that every device rounds alike: to nearest, ties to even, NaN stays NaN.
    """
    # Rounded like PyTorch's division, which `/` of floats isn't.
    x = tl.div_rn(x.to(tl.float32), tl.zeros_like(x).to(tl.float32) + scale)
    x = tl.clamp(x, -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL)
    bits = x.to(tl.uint32, bitcast=True)
    sign = (bits >> 24) & 0x80
    bits = bits & 0x7FFFFFFF
    # Below 2^-6 steps are fixed at 2^-9: the last place of 2^14, to which the addition rounds.
    small = bits < (121 << 23)
    fixed = (tl.where(small, bits, 0).to(tl.float32, bitcast=True) + 16384.0).to(
        tl.uint32, bitcast=True
    ) - (141 << 23)
    # Three bits of 23 remain; e4m3 counts exponents from 7, floats from 127.
    rounded = bits + 0x7FFFF + ((bits >> 20) & 1)
    normal = (rounded >> 20) - (120 << 3)
    found = tl.where(small, fixed, normal)
    return (sign | tl.where(bits > 0x7F800000, 0x7F, found)).to(tl.uint8)


@triton.jit
def put(
    k: tl.tensor,
    v: tl.tensor,
    keys_ptr: tl.tensor,
    values_ptr: tl.tensor,
    page: tl.tensor,
    entry: tl.tensor,
    moved: tl.tensor,
    token_stride: tl.tensor,
    scales_ptr: tl.tensor,
    head: tl.tensor,
    dim: tl.tensor,
    mask: tl.tensor,
    HAS_MOVED: tl.constexpr,
    HAS_SCALES: tl.constexpr,
) -> None:
    """Store a key and a value of one head at an entry of a page; what stood there moves first."""
    place = page + entry * token_stride + dim
    if HAS_MOVED:
        elsewhere = page + moved * token_stride + dim
        leaves = mask & (moved != entry)
        old_k = tl.load(keys_ptr + place, mask=leaves)
        old_v = tl.load(values_ptr + place, mask=leaves)
        tl.store(keys_ptr + elsewhere, old_k, mask=leaves)
        tl.store(values_ptr + elsewhere, old_v, mask=leaves)
        # Another thread may write what this one reads.
        tl.debug_barrier()
    if HAS_SCALES:
        k = to_e4m3(k, tl.load(scales_ptr + head))
        v = to_e4m3(v, tl.load(scales_ptr + tl.num_programs(1) + head))
    tl.store(keys_ptr + place, k, mask=mask)
    tl.store(values_ptr + place, v, mask=mask)


@triton.jit
def _store(
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    keys_ptr: tl.tensor,
    values_ptr: tl.tensor,
    page_ptr: tl.tensor,
    entry_ptr: tl.tensor,
    moved_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    k_row: tl.tensor,
    k_head: tl.tensor,
    v_row: tl.tensor,
    v_head: tl.tensor,
    page_stride: tl.tensor,
    token_stride: tl.tensor,
    head_stride: tl.tensor,
    page_row: tl.tensor,
    entry_row: tl.tensor,
    entry_head: tl.tensor,
    moved_row: tl.tensor,
    moved_head: tl.tensor,
    HEAD_DIM: tl.constexpr,
    DIM_TILE: tl.constexpr,
    HAS_MOVED: tl.constexpr,
    HAS_SCALES: tl.constexpr,
) -> None:
    """Store one key and one value of one sequence and head."""
    row, head = tl.program_id(0), tl.program_id(1)
    dim = tl.arange(0, DIM_TILE)
    mask = dim < HEAD_DIM
    k = tl.load(k_ptr + row * k_row + head * k_head + dim, mask=mask)
    v = tl.load(v_ptr + row * v_row + head * v_head + dim, mask=mask)
    page = tl.load(page_ptr + row * page_row).to(tl.int64) * page_stride + head * head_stride
    entry = tl.load(entry_ptr + row * entry_row + head * entry_head)
    moved = entry
    if HAS_MOVED:
        moved = tl.load(moved_ptr + row * moved_row + head * moved_head)
    put(
        k,
        v,
        keys_ptr,
        values_ptr,
        page,
        entry,
        moved,
        token_stride,
        scales_ptr,
        head,
        dim,
        mask,
        HAS_MOVED,
        HAS_SCALES,
    )


@triton.jit
def angles(
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    row: tl.tensor,
    dim: tl.tensor,
    mask: tl.tensor,
    HEAD_DIM: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Load cos and sin of one token; sin with the sign of what it is multiplied with."""
    cos = tl.load(cos_ptr + row * HEAD_DIM + dim, mask=mask, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + row * HEAD_DIM + dim, mask=mask, other=0.0).to(tl.float32)
    return cos, tl.where(dim < HEAD_DIM // 2, -sin, sin)


@triton.jit
def rotated(
    x_ptr: tl.tensor,
    norm_ptr: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    eps: tl.tensor,
    dim: tl.tensor,
    mask: tl.tensor,
    HEAD_DIM: tl.constexpr,
    HAS_NORM: tl.constexpr,
) -> tl.tensor:
    """Norm and rotate one head, or a tile of them if `x_ptr` is (heads, 1), in fp32."""
    partner = tl.where(dim < HEAD_DIM // 2, dim + HEAD_DIM // 2, dim - HEAD_DIM // 2)
    x = tl.load(x_ptr + dim, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(x_ptr + partner, mask=mask, other=0.0).to(tl.float32)
    if HAS_NORM:
        in_dim = dim < HEAD_DIM
        factor = tl.rsqrt(tl.sum(x * x, -1, keep_dims=True) / HEAD_DIM + eps)
        x *= factor * tl.load(norm_ptr + dim, mask=in_dim, other=0.0).to(tl.float32)
        y *= factor * tl.load(norm_ptr + partner, mask=in_dim, other=0.0).to(tl.float32)
    return x * cos + y * sin


@triton.jit
def _rotate_and_store(
    qkv_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    q_norm_ptr: tl.tensor,
    k_norm_ptr: tl.tensor,
    q_ptr: tl.tensor,
    keys_ptr: tl.tensor,
    values_ptr: tl.tensor,
    page_ptr: tl.tensor,
    entry_ptr: tl.tensor,
    moved_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    eps: tl.tensor,
    page_stride: tl.tensor,
    token_stride: tl.tensor,
    head_stride: tl.tensor,
    page_row: tl.tensor,
    entry_row: tl.tensor,
    entry_head: tl.tensor,
    moved_row: tl.tensor,
    moved_head: tl.tensor,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_TILE: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_MOVED: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    OVERLAPS: tl.constexpr,
) -> None:
    """Rotate the queries and the key of one sequence and key head; store the key and the value."""
    if OVERLAPS:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row, head = tl.program_id(0), tl.program_id(1)
    num_key_heads = tl.num_programs(1)
    num_heads = GROUP * num_key_heads
    dim = tl.arange(0, DIM_TILE)
    mask = dim < HEAD_DIM
    cos, sin = angles(cos_ptr, sin_ptr, row, dim, mask, HEAD_DIM)
    own = qkv_ptr + row * (num_heads + 2 * num_key_heads) * HEAD_DIM
    for member in tl.static_range(0, GROUP):
        q_head = head * GROUP + member
        q = rotated(
            own + q_head * HEAD_DIM, q_norm_ptr, cos, sin, eps, dim, mask, HEAD_DIM, HAS_NORM
        )
        q_at = q_ptr + (row * num_heads + q_head) * HEAD_DIM + dim
        tl.store(q_at, q.to(q_ptr.dtype.element_ty), mask=mask)
    k_at = own + (num_heads + head) * HEAD_DIM
    k = rotated(k_at, k_norm_ptr, cos, sin, eps, dim, mask, HEAD_DIM, HAS_NORM)
    v = tl.load(k_at + num_key_heads * HEAD_DIM + dim, mask=mask)
    page = tl.load(page_ptr + row * page_row).to(tl.int64) * page_stride + head * head_stride
    entry = tl.load(entry_ptr + row * entry_row + head * entry_head)
    moved = entry
    if HAS_MOVED:
        moved = tl.load(moved_ptr + row * moved_row + head * moved_head)
    put(
        k.to(qkv_ptr.dtype.element_ty),
        v,
        keys_ptr,
        values_ptr,
        page,
        entry,
        moved,
        token_stride,
        scales_ptr,
        head,
        dim,
        mask,
        HAS_MOVED,
        HAS_SCALES,
    )


class _Target(NamedTuple):
    """Hold what both kernels take to write to the cache."""

    keys: torch.Tensor
    values: torch.Tensor
    moved: torch.Tensor
    strides: tuple[int, ...]


def _target(
    keys: torch.Tensor,
    values: torch.Tensor,
    pages: torch.Tensor,
    entries: torch.Tensor,
    moved: torch.Tensor | None,
    scales: torch.Tensor | None,
) -> _Target:
    # The kernels have one set of strides for both.
    assert keys.stride() == values.stride() and keys.stride(3) == 1
    if scales is not None:
        assert keys.dtype == torch.float8_e4m3fn and scales.is_contiguous()
    goes = entries if moved is None else moved
    strides = (
        *keys.stride()[:3],
        pages.stride(0),
        entries.stride(0),
        entries.stride(1) if entries.shape[1] > 1 else 0,
        goes.stride(0),
        goes.stride(1) if goes.shape[1] > 1 else 0,
    )
    return _Target(_bits(keys), _bits(values), goes, strides)


def _bits(x: torch.Tensor) -> torch.Tensor:
    """Eight bits are moved as they are; not every device's Triton knows e4m3."""
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x


def paged_store(
    keys: torch.Tensor,
    values: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pages: torch.Tensor,
    entries: torch.Tensor,
    moved: torch.Tensor | None,
    scales: torch.Tensor | None,
) -> None:
    """See `kernels.store_tokens`."""
    number, num_heads, head_dim = k.shape
    target = _target(keys, values, pages, entries, moved, scales)
    assert scales is not None or k.dtype == v.dtype == keys.dtype
    k, v = (_bits(x if x.stride(2) == 1 else x.contiguous()) for x in (k, v))
    _store[(number, num_heads)](
        k,
        v,
        target.keys,
        target.values,
        pages,
        entries,
        target.moved,
        scales if scales is not None else entries,
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        *target.strides,
        HEAD_DIM=head_dim,
        DIM_TILE=triton.next_power_of_2(head_dim),
        HAS_MOVED=moved is not None,
        HAS_SCALES=scales is not None,
        num_warps=1,
    )


def rotate_and_store(
    keys: torch.Tensor,
    values: torch.Tensor,
    qkv: torch.Tensor,
    rotary: Rotary,
    num_heads: int,
    places: Places,
    scales: torch.Tensor | None,
    overlaps: bool | None = None,
) -> torch.Tensor:
    """Rotate and store one token a sequence; see `linear.rotate_and_attend`.

    Args:
        overlaps: whether kernels may begin before the one ahead is done; None asks the device.

    Returns:
        The queries, rotated, (N, H, D).
    """
    number, num_key_heads, head_dim = len(qkv), keys.shape[2], keys.shape[3]
    cos, sin, q_norm, k_norm = rotary
    target = _target(keys, values, *places, scales)
    assert scales is not None or qkv.dtype == keys.dtype
    assert qkv.is_contiguous() and cos.is_contiguous() and sin.is_contiguous()
    q = torch.empty(number, num_heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    _rotate_and_store[(number, num_key_heads)](
        qkv,
        cos,
        sin,
        qkv if q_norm is None else q_norm.weight,
        qkv if k_norm is None else k_norm.weight,
        q,
        target.keys,
        target.values,
        places.pages,
        places.entries,
        target.moved,
        scales if scales is not None else cos,
        0.0 if q_norm is None else q_norm.eps,
        *target.strides,
        GROUP=num_heads // num_key_heads,
        HEAD_DIM=head_dim,
        DIM_TILE=triton.next_power_of_2(head_dim),
        HAS_NORM=q_norm is not None,
        HAS_MOVED=places.moved is not None,
        HAS_SCALES=scales is not None,
        num_warps=1,
        **launch_options(qkv.device, overlaps),
    )
    return q
