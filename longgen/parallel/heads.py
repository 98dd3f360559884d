"""Full layers by all-to-all: each rank gets every token of some heads (DeepSpeed Ulysses).

Any attention kernel can be used unchanged, and all ranks have the same work. A rank needs the
key/value heads of its query heads; where ranks outnumber them, several get the same one.
"""

from __future__ import annotations

import torch

from longgen.errors import UsageError
from longgen.parallel.collectives import swap
from longgen.parallel.group import ContextGroup


def heads_obstacle(num_heads: int, num_key_value_heads: int, size: int) -> str | None:
    """Return why `size` ranks cannot share the heads, None if they can.

    Query heads must divide by the ranks, and each rank's must belong to whole key/value heads, or
    to one.
    """
    if num_heads % size:
        return f"{num_heads} query heads do not divide by {size} ranks"
    if num_key_value_heads % size and size % num_key_value_heads:
        return (
            f"{num_key_value_heads} key/value heads and {size} ranks are no multiple of each other"
        )
    return None


def heads_per_rank(num_heads: int, num_key_value_heads: int, size: int) -> tuple[int, int]:
    """Return how many query and key/value heads each of `size` ranks gets.

    Raises:
        UsageError: if they do not divide.
    """
    obstacle = heads_obstacle(num_heads, num_key_value_heads, size)
    if obstacle:
        raise UsageError(
            f'Full layers cannot be spread over heads: {obstacle}. Use full_mode="ranges" or '
            '"auto", or another context_parallel.'
        )
    return num_heads // size, max(num_key_value_heads // size, 1)


def head_offset(num_key_value_heads: int, group: ContextGroup) -> int:
    """Return the global index of the first key/value head that this rank gets."""
    return group.rank * num_key_value_heads // group.size


def scatter_heads(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, group: ContextGroup
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Turn a rank's tokens of all heads into all tokens of its heads.

    Args:
        q: queries (B, T, H, D) of this rank's tokens.
        k: keys (B, T, Hkv, D).
        v: values (B, T, Hkv, D).
        group: the ranks.

    Returns:
        The same three, (B, size * T, heads of this rank, D); see `heads_per_rank`.

    Raises:
        UsageError: if the heads do not divide.
    """
    batch, length, num_heads, head_dim = q.shape
    queries, keys = heads_per_rank(num_heads, k.shape[2], group.size)
    copies = group.size * keys // k.shape[2]

    parts = [q.reshape(batch, length, group.size, queries, head_dim)]
    for states in (k, v):
        # The gradients of copies are added up by `expand`.
        copied = states[:, :, :, None].expand(-1, -1, -1, copies, -1)
        parts.append(copied.reshape(batch, length, group.size, keys, head_dim))
    # One message for all three.
    received = swap(torch.cat(parts, 3).permute(2, 0, 1, 3, 4), group.process_group)
    whole = received.transpose(0, 1).reshape(batch, group.size * length, -1, head_dim)
    q, k, v = whole.split([queries, keys, keys], 2)
    return q, k, v


def gather_heads(out: torch.Tensor, group: ContextGroup) -> torch.Tensor:
    """Turn all tokens of a rank's heads (B, size * T, heads, D) into its tokens of all heads (B,
    T, size * heads, D)."""
    batch, total, heads, head_dim = out.shape
    parts = out.reshape(batch, group.size, total // group.size, heads, head_dim)
    received = swap(parts.transpose(0, 1), group.process_group)
    return received.permute(1, 2, 0, 3, 4).reshape(batch, -1, group.size * heads, head_dim)


def heads_sent_bytes(
    batch: int,
    length: int,
    num_heads: int,
    num_key_value_heads: int,
    head_dim: int,
    size: int,
    bytes_per_element: int,
) -> int:
    """Return the bytes that a rank with `length` tokens a row sends to others in one layer's
    forward pass; the backward pass sends as many.

    Queries, keys and values of the other ranks' heads go out, then its heads' output for the other
    ranks' tokens.
    """
    queries, keys = heads_per_rank(num_heads, num_key_value_heads, size)
    return (size - 1) * batch * length * (2 * queries + 2 * keys) * head_dim * bytes_per_element
