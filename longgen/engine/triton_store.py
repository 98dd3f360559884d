"""Storing the new tokens of a layer in Triton: keys and values, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# The largest number of e4m3.
LARGEST = tl.constexpr(448.0)


@triton.jit
def _to_e4m3(x: tl.tensor, scale: tl.tensor) -> tl.tensor:
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
    place = page + entry * token_stride + dim
    if HAS_MOVED:
        moved = tl.load(moved_ptr + row * moved_row + head * moved_head)
        elsewhere = page + moved * token_stride + dim
        leaves = mask & (moved != entry)
        old_k = tl.load(keys_ptr + place, mask=leaves)
        old_v = tl.load(values_ptr + place, mask=leaves)
        tl.store(keys_ptr + elsewhere, old_k, mask=leaves)
        tl.store(values_ptr + elsewhere, old_v, mask=leaves)
        # Another thread may write what this one reads.
        tl.debug_barrier()
    if HAS_SCALES:
        k = _to_e4m3(k, tl.load(scales_ptr + head))
        v = _to_e4m3(v, tl.load(scales_ptr + tl.num_programs(1) + head))
    tl.store(keys_ptr + place, k, mask=mask)
    tl.store(values_ptr + place, v, mask=mask)


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
    # The kernel has one set of strides for both.
    assert keys.stride() == values.stride() and keys.stride(3) == 1
    if scales is None:
        assert k.dtype == v.dtype == keys.dtype
    else:
        assert keys.dtype == torch.float8_e4m3fn and scales.is_contiguous()
    k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (k, v))
    # Eight bits are moved as they are; not every device's Triton knows e4m3.
    keys, values, k, v = (
        x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x for x in (keys, values, k, v)
    )
    goes = entries if moved is None else moved
    _store[(number, num_heads)](
        k,
        v,
        keys,
        values,
        pages,
        entries,
        goes,
        scales if scales is not None else entries,
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        keys.stride(0),
        keys.stride(1),
        keys.stride(2),
        pages.stride(0),
        entries.stride(0),
        entries.stride(1) if entries.shape[1] > 1 else 0,
        goes.stride(0),
        goes.stride(1) if goes.shape[1] > 1 else 0,
        HEAD_DIM=head_dim,
        DIM_TILE=triton.next_power_of_2(head_dim),
        HAS_MOVED=moved is not None,
        HAS_SCALES=scales is not None,
        num_warps=1,
    )
