"""Attention in plain PyTorch, a chunk of queries at a time over only the key tiles that the chunk
sees.

The portable path: any device, forward and backward, no compiler, memory linear in the sequence. It
is what runs on CPU and for short chunks with a cache.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F

from longgen.attention.tiles import tile_lists
from longgen.layout import PADDING, Layout
from longgen.pattern import SparsePattern

QUERY_CHUNK = 256
KEY_TILE = 64


@lru_cache(maxsize=16)
def _places(layout: Layout, device: torch.device) -> tuple[torch.Tensor, ...]:
    arrays = (*layout.query_places(), *layout.key_places())
    # Shared by training and inference: tensors born in inference mode could not be saved for
    # backward.
    with torch.inference_mode(False):
        return tuple(torch.from_numpy(array).to(device) for array in arrays)


@lru_cache(maxsize=256)
def _chunks(
    pattern: SparsePattern, layout: Layout, row: int, key_head: int, head: int
) -> tuple[tuple[int, ...], ...]:
    """For each query chunk the indices of the key tiles that it sees in one row and head."""
    queries, keys = layout.row(row)
    some, _ = tile_lists(
        pattern, queries, keys[key_head], [head], tile_q=QUERY_CHUNK, tile_k=KEY_TILE
    )
    return tuple(tuple(chunk.nonzero()[:, 0].tolist()) for chunk in some[0])


def _key_columns(
    tiles: tuple[int, ...], num_keys: int, device: torch.device
) -> torch.Tensor | slice:
    if tiles == tuple(range(tiles[0], tiles[-1] + 1)):
        return slice(tiles[0] * KEY_TILE, min((tiles[-1] + 1) * KEY_TILE, num_keys))
    starts = torch.tensor(tiles, device=device) * KEY_TILE
    columns = (starts[:, None] + torch.arange(KEY_TILE, device=device)).flatten()
    return columns[columns < num_keys]


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    pattern: SparsePattern,
    layout: Layout,
    scale: float,
    row: int,
    key_head: int,
    head: int,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attend with heads that see the same: q (B, H, T, D), k and v (B, Hkv, S, D)."""
    q_documents, q_positions, k_documents, k_positions = _places(layout, q.device)
    q_row, k_row = min(row, len(q_documents) - 1), min(row, len(k_documents) - 1)
    q_documents, q_positions = q_documents[q_row], q_positions[q_row]
    k_documents, k_positions = k_documents[k_row, key_head], k_positions[k_row, key_head]
    outputs, sums = [], []
    for index, tiles in enumerate(_chunks(pattern, layout, row, key_head, head)):
        rows = slice(index * QUERY_CHUNK, min((index + 1) * QUERY_CHUNK, q.shape[2]))
        chunk = q[:, :, rows]
        if not tiles:
            outputs.append(torch.zeros_like(chunk))
            sums.append(chunk.new_full(chunk.shape[:-1], float("-inf")))
            continue
        columns = _key_columns(tiles, k.shape[2], q.device)
        documents = q_documents[rows, None]
        mask = (documents == k_documents[None, columns]) & (documents != PADDING)
        mask &= pattern.visible(q_positions[rows, None], k_positions[None, columns], head)
        # A row of padding sees nothing: let it see everything, then blank it, so that no softmax is
        # empty.
        seen = mask.any(-1, keepdim=True)
        out = F.scaled_dot_product_attention(
            chunk,
            k[:, :, columns],
            v[:, :, columns],
            attn_mask=mask | ~seen,
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        outputs.append(out.masked_fill(~seen, 0.0))
        if return_lse:
            keys = k[:, :, columns].repeat_interleave(q.shape[1] // k.shape[1], 1)
            scores = (chunk @ keys.transpose(-1, -2)).to(_at_least_fp32(q.dtype)) * scale
            lse = torch.logsumexp(scores.masked_fill(~(mask | ~seen), float("-inf")), -1)
            sums.append(lse.masked_fill(~seen[..., 0], float("-inf")))
    output, all_sums = torch.cat(outputs, 2), torch.cat(sums, 2) if return_lse else None
    if not any(_chunks(pattern, layout, row, key_head, head)):
        # Nothing was attended to; gradients are zeros all the same, not missing.
        everywhere = torch.ones((), dtype=torch.bool, device=q.device)
        nothing = torch.stack([x.masked_fill(everywhere, 0.0).sum() for x in (q, k, v)]).sum()
        output = output + nothing
        all_sums = None if all_sums is None else all_sums + nothing
    return output, all_sums


def _at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def blocked_attention(
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
        out (B, T, H, D) and, if asked for, the log-sum-exp of the scores (B, H, T), at least fp32.
    """
    if q.device.type == "cpu" and q.dtype in (torch.bfloat16, torch.float16):
        # PyTorch's CPU kernel adds key and value gradients up in the inputs' own precision.
        out, lse = blocked_attention(
            *(x.float() for x in (q, k, v)),
            pattern=pattern,
            layout=layout,
            scale=scale,
            head_offset=head_offset,
            return_lse=return_lse,
        )
        return out.to(q.dtype), lse
    qh, kh, vh = (x.transpose(1, 2) for x in (q, k, v))
    num_key_heads = kh.shape[1]
    group = qh.shape[1] // num_key_heads
    classes = pattern.num_head_classes
    by_head = classes > 1 or layout.num_key_heads > 1
    row_outputs: list[torch.Tensor] = []
    row_sums: list[torch.Tensor] = []
    for row in range(layout.num_rows):
        rows = slice(None) if layout.num_rows == 1 else slice(row, row + 1)
        head_outputs: list[torch.Tensor] = []
        head_sums: list[torch.Tensor] = []
        for head in range(num_key_heads if by_head else 1):
            own = slice(head, head + 1) if by_head else slice(None)
            mine = slice(head * group, (head + 1) * group) if by_head else slice(None)
            out, lse = _attend(
                qh[rows, mine],
                kh[rows, own],
                vh[rows, own],
                pattern=pattern,
                layout=layout,
                scale=scale,
                row=row,
                key_head=head if layout.num_key_heads > 1 else 0,
                head=(head_offset + head) % classes,
                return_lse=return_lse,
            )
            head_outputs.append(out)
            head_sums += [] if lse is None else [lse]
        row_outputs.append(torch.cat(head_outputs, 1) if by_head else head_outputs[0])
        if return_lse:
            row_sums.append(torch.cat(head_sums, 1))
    out = torch.cat(row_outputs) if len(row_outputs) > 1 else row_outputs[0]
    return out.transpose(1, 2), torch.cat(row_sums) if return_lse else None
