"""Split-KV decoding in Triton: many programs a sequence, whose parts are then put together.

Launches cost as much as the work of one sequence. So a single part is the result, and parts of few
keys are put together by whichever program is last to arrive; only many parts take a second launch.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from longgen.engine.kernels import Places, launch_options
from longgen.engine.linear import Rotary, Seen
from longgen.engine.splits import FEW_KEYS, choose_splits
from longgen.engine.triton_store import angles, put, rotate_and_store, rotated


class Tuning(NamedTuple):
    """Hold the keys that a program reads at a time, its warps, the blocks that it has under way,
    and programs a multiprocessor: as many as run at a time on a Hopper GPU, or a multiple."""

    block: int
    num_warps: int
    num_stages: int
    programs: int


# Of keys in one block, at most.
BLOCK_BYTES = 1 << 15
# For queries that have their keys alone or share them, for e4m3, and for few keys: the fastest of
# 33 to 190 combinations each for 131,072 keys, or the 2,112 of a sparse layer, on an H100
# (docs/experiments.md).
ALONE, SHARED, EIGHT_BITS = Tuning(128, 8, 3, 8), Tuning(64, 4, 3, 4), Tuning(128, 8, 2, 9)
FEW_ALONE, FEW_SHARED, FEW_EIGHT_BITS = (
    Tuning(32, 4, 2, 4),
    Tuning(32, 2, 4, 8),
    Tuning(32, 4, 3, 4),
)
# The most parts that the last program puts together by itself, and the numbers it holds at a time.
JOIN_SPLITS = 32
JOIN_NUMBERS = 8192
# Keys that a program of a full layer, or one of a sparse layer, has fetched before it may begin.
AHEAD_KEYS, FEW_AHEAD_KEYS = 0, 32
# The smallest side of a tile that tensor cores take.
MIN_SIDE = 16
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def _fetch(pointers: tl.tensor, sizes: tl.tensor) -> None:
    """Have so many bytes (multiples of 16, or none) brought to the second-level cache."""
    tl.inline_asm_elementwise(
        """
        {
            .reg .pred some;
            setp.ne.s32 some, $2, 0;
            @some cp.async.bulk.prefetch.L2.global [$1], $2;
            mov.u32 $0, 0;
        }
        """,
        "=r,l,r",
        [pointers.to(tl.int64), sizes],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _in_half(pairs: tl.tensor, WHICH: tl.constexpr) -> tl.tensor:
    """Turn the first or the second e4m3 of each pair to fp16."""
    if INTERPRETED:
        bits = (pairs >> (8 * WHICH)).to(tl.uint8)
        return bits.to(tl.float8e4nv, bitcast=True).to(tl.float16)
    ORDER: tl.constexpr = "0x4431" if WHICH else "0x4420"
    return tl.inline_asm_elementwise(
        """
        {
            .reg .b32 both;
            .reg .b16 two, rest;
            prmt.b32 both, $1, 0, """
        + ORDER
        + """;
            mov.b32 {two, rest}, both;
            cvt.rn.f16x2.e4m3x2 $0, two;
        }
        """,
        "=r,r",
        [pairs],
        dtype=tl.float16,
        is_pure=True,
        pack=2,
    )


@triton.jit
def _part(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    table_ptr: tl.tensor,
    length_ptr: tl.tensor,
    visible_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    out_ptr: tl.tensor,
    stats_ptr: tl.tensor,
    result_ptr: tl.tensor,
    arrivals_ptr: tl.tensor,
    entry_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    q_norm_ptr: tl.tensor,
    k_norm_ptr: tl.tensor,
    scale_log2: tl.tensor,
    eps: tl.tensor,
    q_row: tl.tensor,
    q_head: tl.tensor,
    entry_row: tl.tensor,
    entry_head: tl.tensor,
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
    MEMBERS: tl.constexpr,
    SPLIT_TILE: tl.constexpr,
    JOIN_TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    ONE_PAGE: tl.constexpr,
    EVEN_PAGES: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    HAS_VISIBLE: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    WHOLE: tl.constexpr,
    JOINS: tl.constexpr,
    HAS_NEW: tl.constexpr,
    HAS_NORM: tl.constexpr,
    PAIRS: tl.constexpr,
    AHEAD: tl.constexpr,
    OVERLAPS: tl.constexpr,
) -> None:
    """One sequence, one key head, one part of its keys: unnormalised output, maximum and sum.

    EVEN_PAGES: pages are whole blocks. WHOLE: the part is all, and the result is written. JOINS:
    the last part to be done puts all together. HAS_NEW: `q_ptr` has the new token's queries, keys
    and values, not rotated; the part that its key belongs to stores it. PAIRS: keys are e4m3 and
    queries have 16 bits. AHEAD: how many of its keys a part has fetched while the kernel ahead
    still runs.

    Tensor cores don't multiply e4m3 with 16 bits. It fits into fp16, to which the GPU turns two at
    a time (to bf16 it takes many instructions), and so do queries once their size is taken out.
    Only 16 bits at once are quick to load transposed: pairs, which are then taken apart.
    """
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

    table_at = table_ptr + row * table_stride
    if ONE_PAGE:
        # Once: in the loop, keys would wait for it.
        only_page = tl.load(table_at).to(tl.int64) * page_stride + head * head_stride
    if AHEAD > 0:
        # Tokens that came before are there, whatever the kernel ahead does.
        ahead = first + tl.arange(0, AHEAD)
        if ONE_PAGE:
            ahead_at = only_page + ahead * token_stride
        else:
            pages = tl.load(table_at + ahead // page_size, mask=ahead < last, other=0).to(tl.int64)
            ahead_at = pages * page_stride + head * head_stride + (ahead % page_size) * token_stride
        width = k_ptr.dtype.element_ty.primitive_bitwidth // 8
        size = tl.where(ahead < last, HEAD_DIM * width, 0)
        _fetch(k_ptr + ahead_at, size)
        _fetch(v_ptr + ahead_at, size)
    if OVERLAPS:
        # In this order: what follows begins once all before the kernel ahead is done, and may read
        # of that before it waits.
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    value_scale = 1.0
    if HAS_SCALES:
        scale_log2 *= tl.load(scales_ptr + head)
        value_scale = tl.load(scales_ptr + num_key_heads + head)

    group = tl.arange(0, GROUP_TILE)
    dim = tl.arange(0, DIM_TILE)
    in_dim = dim < HEAD_DIM
    q_mask = (group[:, None] < GROUP) & in_dim[None, :]
    q_at = q_ptr + row * q_row + (head * GROUP + group)[:, None] * q_head
    if HAS_NEW:
        cos, sin = angles(cos_ptr, sin_ptr, row, dim, in_dim, HEAD_DIM)
        q = rotated(q_at, q_norm_ptr, cos, sin, eps, dim, q_mask, HEAD_DIM, HAS_NORM)
        q = q.to(q_ptr.dtype.element_ty)
        if HAS_LENGTHS:
            new = length - 1
        else:
            new = tl.load(entry_ptr + row * entry_row + head * entry_head).to(tl.int32)
        if (new >= first) & (new < last):
            if ONE_PAGE:
                new_page, entry = only_page, new
            else:
                new_page = tl.load(table_at + new // page_size).to(tl.int64) * page_stride
                new_page, entry = new_page + head * head_stride, new % page_size
            own = q_ptr + row * q_row + (num_key_heads * GROUP + head) * q_head
            new_k = rotated(own, k_norm_ptr, cos, sin, eps, dim, in_dim, HEAD_DIM, HAS_NORM)
            new_v = tl.load(own + num_key_heads * q_head + dim, mask=in_dim, other=0.0)
            STORED: tl.constexpr = tl.uint8 if HAS_SCALES else k_ptr.dtype.element_ty
            put(
                new_k.to(q.dtype),
                new_v,
                k_ptr.to(tl.pointer_type(STORED), bitcast=True),
                v_ptr.to(tl.pointer_type(STORED), bitcast=True),
                new_page,
                entry,
                entry,
                token_stride,
                scales_ptr,
                head,
                dim,
                in_dim,
                False,
                HAS_SCALES,
            )
            # Other threads read it with its block.
            tl.debug_barrier()
    else:
        q = tl.load(q_at + dim[None, :], mask=q_mask, other=0.0)
    out = tl.zeros((GROUP_TILE, DIM_TILE), tl.float32)
    if PAIRS:
        size = tl.max(tl.abs(q.to(tl.float32)), 1)
        size = tl.where(size == 0.0, 1.0, size)
        q = (q.to(tl.float32) / size[:, None]).to(tl.float16)
        q_first, q_second = tl.split(tl.reshape(q, (GROUP_TILE, DIM_TILE // 2, 2)))
        k_pairs = k_ptr.to(tl.pointer_type(tl.uint16), bitcast=True)
        v_pairs = v_ptr.to(tl.pointer_type(tl.uint16), bitcast=True)
        pair_dim = tl.arange(0, DIM_TILE // 2)
        out_first = tl.zeros((GROUP_TILE, DIM_TILE // 2), tl.float32)
        out_second = tl.zeros((GROUP_TILE, DIM_TILE // 2), tl.float32)
    highest = tl.full((GROUP_TILE,), float("-inf"), tl.float32)
    total = tl.zeros((GROUP_TILE,), tl.float32)
    for start in range(first, last, BLOCK):
        token = start + tl.arange(0, BLOCK)
        exists = token < last
        if ONE_PAGE:
            place = only_page + token * token_stride
        else:
            if EVEN_PAGES:
                page = tl.load(table_at + start // page_size).to(tl.int64)
            else:
                page = tl.load(table_at + token // page_size, mask=exists, other=0).to(tl.int64)
            place = page * page_stride + head * head_stride + (token % page_size) * token_stride
        if PAIRS:
            mask = exists[:, None] & (pair_dim < HEAD_DIM // 2)[None, :]
            pairs_at = (place // 2)[:, None] + pair_dim[None, :]
            k = tl.load(k_pairs + pairs_at, mask=mask, other=0)
            v = tl.load(v_pairs + pairs_at, mask=mask, other=0)
        else:
            mask = exists[:, None] & in_dim[None, :]
            k = tl.load(k_ptr + place[:, None] + dim[None, :], mask=mask, other=0.0).to(q.dtype)
            v = tl.load(v_ptr + place[:, None] + dim[None, :], mask=mask, other=0.0).to(q.dtype)
        seen = exists
        if HAS_VISIBLE:
            at = row * visible_row + head * visible_head + token
            seen = seen & (tl.load(visible_ptr + at, mask=exists, other=0) != 0)
        if PAIRS:
            scores = tl.dot(q_first, tl.trans(_in_half(k, 0)))
            scores = tl.dot(q_second, tl.trans(_in_half(k, 1)), scores)
            scores *= scale_log2 * size[:, None]
        else:
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
        scores = tl.where(seen[None, :], scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        # A part that has seen nothing yet must not subtract infinity from itself.
        safe = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        weights = tl.exp2(scores - safe[:, None])
        shrink = tl.exp2(highest - safe)
        total = total * shrink + tl.sum(weights, 1)
        if PAIRS:
            halves = weights.to(tl.float16)
            out_first = tl.dot(halves, _in_half(v, 0), out_first * shrink[:, None])
            out_second = tl.dot(halves, _in_half(v, 1), out_second * shrink[:, None])
        else:
            out = out * shrink[:, None] + tl.dot(weights.to(q.dtype), v, input_precision="ieee")
        highest = new_highest
    if PAIRS:
        out = tl.interleave(out_first, out_second)

    pair = row * num_key_heads + head
    if WHOLE:
        result = out * (value_scale / tl.where(total == 0.0, 1.0, total))[:, None]
        result_at = (pair * GROUP + group)[:, None] * HEAD_DIM + dim[None, :]
        tl.store(result_ptr + result_at, result.to(result_ptr.dtype.element_ty), mask=q_mask)
    else:
        part = pair * num_splits + split
        out_at = (part * GROUP + group)[:, None] * HEAD_DIM + dim[None, :]
        tl.store(out_ptr + out_at, out, mask=q_mask)
        stats_at = stats_ptr + (part * GROUP + group) * 2
        tl.store(stats_at, highest, mask=group < GROUP)
        tl.store(stats_at + 1, total, mask=group < GROUP)
    if JOINS:
        # All threads have written before one of them says so.
        tl.debug_barrier()
        arrived = tl.atomic_add(arrivals_ptr + pair, 1, sem="acq_rel", scope="gpu")
        if arrived == num_splits - 1:
            _join(
                out_ptr,
                stats_ptr,
                result_ptr,
                pair,
                num_splits,
                value_scale,
                GROUP,
                HEAD_DIM,
                DIM_TILE,
                MEMBERS,
                SPLIT_TILE,
                JOIN_TILE,
            )
            # For the next launch: nobody else counts any more.
            tl.store(arrivals_ptr + pair, 0)


@triton.jit
def _join(
    out_ptr: tl.tensor,
    stats_ptr: tl.tensor,
    result_ptr: tl.tensor,
    pair: tl.tensor,
    num_splits: tl.tensor,
    value_scale: tl.tensor,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_TILE: tl.constexpr,
    MEMBERS: tl.constexpr,
    SPLIT_TILE: tl.constexpr,
    JOIN_TILE: tl.constexpr,
) -> None:
    """Weigh the parts of all queries of one sequence and key head by what they summed up."""
    member, dim = tl.arange(0, MEMBERS), tl.arange(0, DIM_TILE)
    split = tl.arange(0, SPLIT_TILE)
    exists = (split < num_splits)[:, None] & (member < GROUP)[None, :]
    stats_at = stats_ptr + ((pair * num_splits + split)[:, None] * GROUP + member[None, :]) * 2
    # From the second-level cache, where the other processors' stores are.
    highest = tl.load(stats_at, mask=exists, other=float("-inf"), cache_modifier=".cg")
    total = tl.load(stats_at + 1, mask=exists, other=0.0, cache_modifier=".cg")
    most = tl.max(highest, 0)
    most = tl.where(most == float("-inf"), 0.0, most)
    whole = tl.sum(total * tl.exp2(highest - most[None, :]), 0)
    result = tl.zeros((MEMBERS, DIM_TILE), tl.float32)
    # A few parts at a time, so that they fit into registers, of all queries at once: nothing waits
    # for anything else.
    for begin in tl.static_range(0, SPLIT_TILE, JOIN_TILE):
        some = begin + tl.arange(0, JOIN_TILE)
        exists = (some < num_splits)[:, None] & (member < GROUP)[None, :]
        part = (pair * num_splits + some)[:, None] * GROUP + member[None, :]
        highest = tl.load(
            stats_ptr + part * 2, mask=exists, other=float("-inf"), cache_modifier=".cg"
        )
        parts = tl.load(
            out_ptr + part[:, :, None] * HEAD_DIM + dim[None, None, :],
            mask=exists[:, :, None] & (dim < HEAD_DIM)[None, None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        result += tl.sum(parts * tl.exp2(highest - most[None, :])[:, :, None], 0)
    result *= (value_scale / tl.where(whole == 0.0, 1.0, whole))[:, None]
    at = (pair * GROUP + member)[:, None] * HEAD_DIM + dim[None, :]
    mask = (member < GROUP)[:, None] & (dim < HEAD_DIM)[None, :]
    tl.store(result_ptr + at, result.to(result_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _together(
    out_ptr: tl.tensor,
    stats_ptr: tl.tensor,
    result_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    num_splits: tl.tensor,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_TILE: tl.constexpr,
    SPLIT_TILE: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    OVERLAPS: tl.constexpr,
) -> None:
    """Weigh the parts of one query by what they summed up."""
    if OVERLAPS:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
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
    if HAS_SCALES:
        result *= tl.load(scales_ptr + num_key_heads + key_head)
    at = (row * tl.num_programs(1) + head) * HEAD_DIM + dim
    tl.store(result_ptr + at, result.to(result_ptr.dtype.element_ty), mask=dim < HEAD_DIM)


def _tuning(group: int, dim_tile: int, size: int, capacity: int) -> Tuning:
    """Return what is best for `group` queries a key head, and at most `capacity` keys of `dim_tile`
    numbers of `size` bytes."""
    few = capacity <= FEW_KEYS
    if size == 1:
        tuning = FEW_EIGHT_BITS if few else EIGHT_BITS
    elif group > 1:
        tuning = FEW_SHARED if few else SHARED
    else:
        tuning = FEW_ALONE if few else ALONE
    # Blocks under way must fit into shared memory.
    return tuning._replace(block=min(tuning.block, max(MIN_SIDE, BLOCK_BYTES // dim_tile // size)))


def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4  # of Triton's interpreter
    return torch.cuda.get_device_properties(device).multi_processor_count


def paged_decode(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    block_tables: torch.Tensor,
    scale: float,
    lengths: torch.Tensor | None,
    visible: torch.Tensor | None,
    num_splits: int | None = None,
    *,
    scales: torch.Tensor | None = None,
    arrivals: torch.Tensor | None = None,
    block: int | None = None,
    num_warps: int | None = None,
    num_stages: int | None = None,
    join_splits: int | None = None,
    overlaps: bool | None = None,
    rotary: Rotary | None = None,
    entries: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `kernels.decode_attention`.

    What follows changes the time that it takes, and the result only by rounding; None takes the
    constants of this module.

    Args:
        num_splits: parts that a sequence's keys are cut into.
        block: keys that a program reads at a time, a power of two of at least 16.
        num_warps: warps of a program.
        num_stages: blocks that a program has under way.
        join_splits: with `arrivals`, the most parts that the last program puts together; more take
            a second launch.
        overlaps: whether kernels may begin before the one ahead is done; None asks the device.
        rotary: given by `rotate_and_attend`: what turns queries and keys.
        entries: given by `rotate_and_attend`: the places of the new keys, (N, heads), if these are
            not the last that `lengths` count.
    """
    launch = launch_options(q.device, overlaps)
    number, num_heads, head_dim = q.shape
    page_size, num_key_heads = keys.shape[1:3]
    group = num_heads // num_key_heads
    capacity = block_tables.shape[1] * page_size
    dim_tile = max(triton.next_power_of_2(head_dim), MIN_SIDE)
    tuning = _tuning(group, dim_tile, keys.element_size(), capacity)
    pairs = number * num_key_heads
    splits = num_splits or choose_splits(
        pairs, capacity, programs=tuning.programs, processors=_processors(q.device)
    )
    most = JOIN_SPLITS if join_splits is None else join_splits
    joins = arrivals is not None and 1 < splits <= most
    # The kernels have one set of strides for both, and go by rows.
    assert keys.stride() == values.stride() and keys.stride(3) == 1
    assert page_size * keys.stride(1) < 2**31, "places within a page are 32 bit numbers"
    assert scales is None or scales.is_contiguous()
    assert arrivals is None or arrivals.is_contiguous()
    q = q if q.stride(2) == 1 else q.contiguous()
    # Read before the kernel ahead is done, which must not be one that copies them.
    tables = block_tables
    assert tables.stride(1) == 1 or tables.shape[1] == 1
    seen = visible if visible is None or visible.stride(2) == 1 else visible.contiguous()
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    parts = stats = out
    if splits > 1:
        shape = number, num_key_heads, splits, group
        parts = torch.empty(*shape, head_dim, dtype=torch.float32, device=q.device)
        stats = torch.empty(*shape, 2, dtype=torch.float32, device=q.device)
    block = tuning.block if block is None else block
    split_tile = triton.next_power_of_2(splits)
    members = triton.next_power_of_2(group)
    factors = scales if scales is not None else tables
    places = entries if entries is not None else tables
    norms = (None, None) if rotary is None else (rotary.q_norm, rotary.k_norm)
    ahead = 0
    if launch["OVERLAPS"] and rotary is not None and head_dim * keys.element_size() % 16 == 0:
        ahead = FEW_AHEAD_KEYS if capacity <= FEW_KEYS else AHEAD_KEYS
    _part[(number, num_key_heads, splits)](
        q,
        keys,
        values,
        tables,
        lengths if lengths is not None else tables,
        seen if seen is not None else tables,
        factors,
        parts,
        stats,
        out,
        arrivals if joins else tables,
        places,
        q if rotary is None else rotary.cos,
        q if rotary is None else rotary.sin,
        q if norms[0] is None else norms[0].weight,
        q if norms[1] is None else norms[1].weight,
        scale * 1.4426950408889634,
        0.0 if norms[0] is None else norms[0].eps,
        q.stride(0),
        q.stride(1),
        places.stride(0),
        places.stride(1) if places.shape[1] > 1 else 0,
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
        GROUP_TILE=max(members, MIN_SIDE),
        HEAD_DIM=head_dim,
        DIM_TILE=dim_tile,
        MEMBERS=members,
        # Nothing else is compiled for each number of parts.
        SPLIT_TILE=split_tile if joins else 1,
        JOIN_TILE=min(split_tile, max(1, JOIN_NUMBERS // (members * dim_tile))) if joins else 1,
        BLOCK=block,
        ONE_PAGE=block_tables.shape[1] == 1,
        EVEN_PAGES=page_size % block == 0,
        HAS_LENGTHS=lengths is not None,
        HAS_VISIBLE=seen is not None,
        HAS_SCALES=scales is not None,
        WHOLE=splits == 1,
        JOINS=joins,
        HAS_NEW=rotary is not None,
        HAS_NORM=norms[0] is not None,
        PAIRS=keys.dtype == torch.float8_e4m3fn
        and q.element_size() == 2
        and head_dim % 2 == 0
        and dim_tile >= 2 * MIN_SIDE,
        AHEAD=ahead,
        num_warps=tuning.num_warps if num_warps is None else num_warps,
        num_stages=tuning.num_stages if num_stages is None else num_stages,
        **launch,
    )
    if joins or splits == 1:
        return out
    _together[(number, num_heads)](
        parts,
        stats,
        out,
        factors,
        splits,
        GROUP=group,
        HEAD_DIM=head_dim,
        DIM_TILE=dim_tile,
        SPLIT_TILE=split_tile,
        HAS_SCALES=scales is not None,
        **launch,
    )
    return out


def rotate_and_attend(
    keys: torch.Tensor,
    values: torch.Tensor,
    qkv: torch.Tensor,
    rotary: Rotary,
    num_heads: int,
    places: Places,
    seen: Seen,
    scale: float,
    scales: torch.Tensor | None,
    overlaps: bool | None = None,
    num_splits: int | None = None,
) -> torch.Tensor:
    """See `linear.rotate_and_attend`; the rest is `paged_decode`'s."""
    turns: Rotary | None = None
    entries: torch.Tensor | None = None
    if places.moved is not None:
        # What moves may belong to another program: all must be there before any of them reads.
        q = rotate_and_store(
            keys, values, qkv, rotary, num_heads, places, scales, overlaps=overlaps
        )
    else:
        assert qkv.is_contiguous() and rotary.cos.is_contiguous() and rotary.sin.is_contiguous()
        assert scales is not None or qkv.dtype == keys.dtype
        q = qkv.view(len(qkv), -1, keys.shape[3])[:, :num_heads]
        turns = rotary
        entries = places.entries if seen.lengths is None else None
    return paged_decode(
        q,
        keys[:, : seen.held],
        values[:, : seen.held],
        seen.tables,
        scale,
        seen.lengths,
        seen.visible,
        num_splits,
        scales=scales,
        arrivals=seen.arrivals,
        overlaps=overlaps,
        rotary=turns,
        entries=entries,
    )
