"""Split-KV decoding in Triton: many programs a sequence, and one that puts their parts together."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Keys that a program reads at a time; the smallest side of a tile that tensor cores take.
BLOCK_N = 64
MIN_SIDE = 16


@triton.jit
def _part(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    table_ptr: tl.tensor,
    length_ptr: tl.tensor,
    visible_ptr: tl.tensor,
    out_ptr: tl.tensor,
    stats_ptr: tl.tensor,
    scale_log2: tl.tensor,
    q_row: tl.tensor,
    q_head: tl.tensor,
    page_stride: tl.tensor,
    token_stride: tl.tensor,
    head_stride: tl.tensor,
    table_stride: tl.tensor,
    visible_row: tl.tensor,
    visible_head: tl.tensor,
    capacity: tl.tensor,
    page_size: tl.tensor,
    num_splits: tl.tensor,
    GROUP: tl.constexpr,
    GROUP_TILE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    HAS_VISIBLE: tl.constexpr,
) -> None:
    """One sequence, one key head, one part of its keys: unnormalised output, maximum and sum."""
    row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_key_heads = tl.num_programs(1)
    length = capacity
    if HAS_LENGTHS:
        length = tl.minimum(tl.load(length_ptr + row).to(tl.int32), capacity)
    # Whole blocks a part, so that no block is read twice.
    blocks = tl.cdiv(length, BLOCK)
    share = tl.cdiv(blocks, num_splits)
    first = split * share * BLOCK
    last = tl.minimum(first + share * BLOCK, length)

    group = tl.arange(0, GROUP_TILE)
    dim = tl.arange(0, DIM_TILE)
    in_dim = dim < HEAD_DIM
    q_mask = (group[:, None] < GROUP) & in_dim[None, :]
    q = tl.load(
        q_ptr + row * q_row + (head * GROUP + group)[:, None] * q_head + dim[None, :],
        mask=q_mask,
        other=0.0,
    )
    highest = tl.full((GROUP_TILE,), float("-inf"), tl.float32)
    total = tl.zeros((GROUP_TILE,), tl.float32)
    out = tl.zeros((GROUP_TILE, DIM_TILE), tl.float32)
    for start in range(first, last, BLOCK):
        token = start + tl.arange(0, BLOCK)
        exists = token < last
        page = tl.load(table_ptr + row * table_stride + token // page_size, mask=exists, other=0)
        place = page.to(tl.int64) * page_stride + (token % page_size) * token_stride
        place += head * head_stride
        mask = exists[:, None] & in_dim[None, :]
        k = tl.load(k_ptr + place[:, None] + dim[None, :], mask=mask, other=0.0).to(q.dtype)
        v = tl.load(v_ptr + place[:, None] + dim[None, :], mask=mask, other=0.0).to(q.dtype)
        seen = exists
        if HAS_VISIBLE:
            at = row * visible_row + head * visible_head + token
            seen = seen & (tl.load(visible_ptr + at, mask=exists, other=0) != 0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
        scores = tl.where(seen[None, :], scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        # A part that has seen nothing yet must not subtract infinity from itself.
        safe = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        weights = tl.exp2(scores - safe[:, None])
        shrink = tl.exp2(highest - safe)
        total = total * shrink + tl.sum(weights, 1)
        out = out * shrink[:, None] + tl.dot(weights.to(q.dtype), v, input_precision="ieee")
        highest = new_highest

    part = (row * num_key_heads + head) * num_splits + split
    out_at = (part * GROUP + group)[:, None] * HEAD_DIM + dim[None, :]
    tl.store(out_ptr + out_at, out, mask=q_mask)
    stats_at = stats_ptr + (part * GROUP + group) * 2
    tl.store(stats_at, highest, mask=group < GROUP)
    tl.store(stats_at + 1, total, mask=group < GROUP)


@triton.jit
def _together(
    out_ptr: tl.tensor,
    stats_ptr: tl.tensor,
    result_ptr: tl.tensor,
    num_splits: tl.tensor,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_TILE: tl.constexpr,
    SPLIT_TILE: tl.constexpr,
) -> None:
    """Weigh the parts of one query by what they summed up."""
    row, head = tl.program_id(0), tl.program_id(1)
    key_head, member = head // GROUP, head % GROUP
    num_key_heads = tl.num_programs(1) // GROUP
    split = tl.arange(0, SPLIT_TILE)
    dim = tl.arange(0, DIM_TILE)
    part = ((row * num_key_heads + key_head) * num_splits + split) * GROUP + member
    exists = split < num_splits
    highest = tl.load(stats_ptr + part * 2, mask=exists, other=float("-inf"))
    total = tl.load(stats_ptr + part * 2 + 1, mask=exists, other=0.0)
    most = tl.max(highest, 0)
    weight = tl.exp2(highest - tl.where(most == float("-inf"), 0.0, most))
    mask = exists[:, None] & (dim < HEAD_DIM)[None, :]
    parts = tl.load(out_ptr + part[:, None] * HEAD_DIM + dim[None, :], mask=mask, other=0.0)
    whole = tl.sum(total * weight, 0)
    result = tl.sum(parts * weight[:, None], 0) / tl.where(whole == 0.0, 1.0, whole)
    at = (row * tl.num_programs(1) + head) * HEAD_DIM + dim
    tl.store(result_ptr + at, result.to(result_ptr.dtype.element_ty), mask=dim < HEAD_DIM)


def _splits(programs: int, capacity: int, device: torch.device) -> int:
    """Cut keys into so many parts that two programs a multiprocessor have work."""
    processors = (
        torch.cuda.get_device_properties(device).multi_processor_count
        if device.type == "cuda"
        else 4
    )
    return max(1, min(-(-2 * processors // programs), -(-capacity // (4 * BLOCK_N)), 128))


def paged_decode(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    block_tables: torch.Tensor,
    scale: float,
    lengths: torch.Tensor | None,
    visible: torch.Tensor | None,
    num_splits: int | None = None,
) -> torch.Tensor:
    """See `kernels.decode_attention`."""
    number, num_heads, head_dim = q.shape
    page_size, num_key_heads = keys.shape[1:3]
    group = num_heads // num_key_heads
    capacity = block_tables.shape[1] * page_size
    splits = num_splits or _splits(number * num_key_heads, capacity, q.device)
    q = q if q.stride(2) == 1 else q.contiguous()
    tables = block_tables if block_tables.stride(1) == 1 else block_tables.contiguous()
    seen = visible if visible is None or visible.stride(2) == 1 else visible.contiguous()
    parts = torch.empty(
        number, num_key_heads, splits, group, head_dim, dtype=torch.float32, device=q.device
    )
    stats = torch.empty(*parts.shape[:-1], 2, dtype=torch.float32, device=q.device)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dim_tile = max(triton.next_power_of_2(head_dim), MIN_SIDE)
    _part[(number, num_key_heads, splits)](
        q,
        keys,
        values,
        tables,
        lengths if lengths is not None else tables,
        seen if seen is not None else tables,
        parts,
        stats,
        scale * 1.4426950408889634,
        q.stride(0),
        q.stride(1),
        keys.stride(0),
        keys.stride(1),
        keys.stride(2),
        tables.stride(0),
        seen.stride(0) if seen is not None else 0,
        seen.stride(1) if seen is not None and seen.shape[1] > 1 else 0,
        capacity,
        page_size,
        splits,
        GROUP=group,
        GROUP_TILE=max(triton.next_power_of_2(group), MIN_SIDE),
        HEAD_DIM=head_dim,
        DIM_TILE=dim_tile,
        BLOCK=BLOCK_N,
        HAS_LENGTHS=lengths is not None,
        HAS_VISIBLE=seen is not None,
    )
    _together[(number, num_heads)](
        parts,
        stats,
        out,
        splits,
        GROUP=group,
        HEAD_DIM=head_dim,
        DIM_TILE=dim_tile,
        SPLIT_TILE=triton.next_power_of_2(splits),
    )
    return out
