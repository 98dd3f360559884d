"""FlexAttention with tile lists built in closed form: the portable GPU path, forward and
backward."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from longgen.attention.tiles import tile_lists
from longgen.errors import UsageError
from longgen.layout import PADDING, Layout
from longgen.pattern import SparsePattern

TILE = 128
# Of a head on a GPU, says its compiler.
SMALLEST_HEAD_DIM = 16
# It sums in fp32, and its compilers take nothing wider.
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

MaskMod = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., Any]:
    # One graph a pattern, length and gradient mode; the default limit of 8 would silently drop to
    # the eager, mask-materialising path after a handful of lengths.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 128)
    torch._dynamo.config.accumulated_recompile_limit = max(
        torch._dynamo.config.accumulated_recompile_limit, 1024
    )
    # fullgraph: past the limit it raises instead of running that path.
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def _mask_mod(
    pattern: SparsePattern, layout: Layout, group: int, head_offset: int, device: torch.device
) -> MaskMod:
    if layout.is_causal and layout.queries[0][0].start == 0:

        def causal(
            b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor
        ) -> torch.Tensor:
            return pattern.visible(q, k, h // group + head_offset)

        return causal

    q_documents, q_positions, k_documents, k_positions = (
        torch.from_numpy(array).to(device)
        for array in (*layout.query_places(), *layout.key_places())
    )
    q_rows, k_rows, k_heads = len(q_documents) > 1, len(k_documents) > 1, k_documents.shape[1] > 1

    def anywhere(
        b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor
    ) -> torch.Tensor:
        q_row, k_row = b * int(q_rows), b * int(k_rows)
        k_head = (h // group) * int(k_heads)
        document = q_documents[q_row, q]
        same = (document == k_documents[k_row, k_head, k]) & (document != PADDING)
        return same & pattern.visible(
            q_positions[q_row, q], k_positions[k_row, k_head, k], h // group + head_offset
        )

    return anywhere


def _lists(tiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn bool (R, H, nq, nk) into counts and column lists with the listed columns first."""
    order = torch.argsort(tiles.to(torch.int8), dim=-1, descending=True, stable=True)
    return tiles.sum(-1, dtype=torch.int32), order.to(torch.int32)


# Few: at 131,072 tokens and 32 heads that differ, one takes about a gigabyte.
@lru_cache(maxsize=4)
def block_mask(
    pattern: SparsePattern,
    layout: Layout,
    num_heads: int,
    num_key_value_heads: int,
    head_offset: int,
    device: torch.device,
) -> BlockMask:
    """Return FlexAttention's block mask for a layout, from closed-form tile lists.

    Layers with the same pattern share one: the result is cached for the layouts in use.
    """
    # Made once and shared by training and inference: tensors born in inference mode could not be
    # saved for backward.
    with torch.inference_mode(False):
        return _build(pattern, layout, num_heads, num_key_value_heads, head_offset, device)


def _build(
    pattern: SparsePattern,
    layout: Layout,
    num_heads: int,
    num_key_value_heads: int,
    head_offset: int,
    device: torch.device,
) -> BlockMask:
    group = num_heads // num_key_value_heads
    by_head = pattern.num_head_classes > 1 or layout.num_key_heads > 1
    somes, wholes = [], []
    for row in range(layout.num_rows):
        queries, keys = layout.row(row)
        if len(keys) == 1:
            heads = [head_offset + h for h in range(num_key_value_heads if by_head else 1)]
            some, whole = tile_lists(pattern, queries, keys[0], heads, device=device)
        else:
            pairs = [
                tile_lists(pattern, queries, axis, [head_offset + h], device=device)
                for h, axis in enumerate(keys)
            ]
            some, whole = (torch.cat(part) for part in zip(*pairs, strict=True))
        somes.append(some.repeat_interleave(group, 0) if by_head else some)
        wholes.append(whole.repeat_interleave(group, 0) if by_head else whole)
    some, whole = torch.stack(somes), torch.stack(wholes)
    return BlockMask.from_kv_blocks(
        *_lists(some & ~whole),
        *_lists(whole),
        BLOCK_SIZE=TILE,
        mask_mod=_mask_mod(pattern, layout, group, head_offset, device),
        seq_lengths=(layout.num_queries, layout.num_keys),
    )


def flex_obstacle(q: torch.Tensor) -> str | None:
    """Say why FlexAttention takes no tensors like q (B, T, H, D), or return None."""
    if q.device.type == "cuda" and q.shape[3] < SMALLEST_HEAD_DIM:
        return (
            f"FlexAttention takes heads of at least {SMALLEST_HEAD_DIM} on a GPU, the tensors have "
            f"{q.shape[3]}"
        )
    if q.dtype not in DTYPES:
        return f"FlexAttention takes {', '.join(map(str, DTYPES))}, the tensors are {q.dtype}"
    return None


def flex_attend(
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
    """Compute attention of q (B, T, H, D) over k, v (B, S, Hkv, D).

    Returns:
        out (B, T, H, D) and, if asked for, the log-sum-exp of the scores (B, H, T) in fp32.

    Raises:
        UsageError: if FlexAttention can't do it: by dtype or head size, and on CPU when gradients
            or the log-sum-exp are needed.
    """
    wants_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    obstacle = flex_obstacle(q)
    if obstacle:
        raise UsageError(f'{obstacle}; use impl="blocked" (or "auto").')
    if q.device.type == "cpu" and wants_grad:
        raise UsageError(
            'FlexAttention computes no gradients on CPU; use impl="blocked" (or "auto") there.'
        )
    if q.device.type == "cpu" and return_lse:
        raise UsageError(
            'FlexAttention returns no log-sum-exp on CPU; use impl="blocked" (or "auto") there.'
        )
    mask = block_mask(pattern, layout, q.shape[2], k.shape[2], head_offset, q.device)
    # The split-KV decoding kernel that short queries would get rejects per-head lists and GQA
    # ratios such as 3.
    options = {"FORCE_USE_FLEX_ATTENTION": True} if q.device.type == "cuda" else None
    result = _compiled()(
        *(x.transpose(1, 2) for x in (q, k, v)),
        block_mask=mask,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
        kernel_options=options,
        return_lse=return_lse,
    )
    out, lse = result if return_lse else (result, None)
    return out.transpose(1, 2), lse
