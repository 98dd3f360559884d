"""The part of a row that one rank holds."""

from __future__ import annotations

import torch

from longgen.errors import UsageError

# What a training row holds for each token.
_PER_TOKEN = ("input_ids", "position_ids", "shift_labels")


def check_divides(length: int, size: int) -> None:
    """Refuse a sequence of `length` tokens that `size` ranks cannot share equally.

    Raises:
        UsageError: with the nearest length that they can.
    """
    if length % size:
        raise UsageError(
            f"A sequence of {length:,} tokens cannot be cut into {size} equal parts; make it "
            f"{-(-length // size) * size:,} tokens (padding counts as a document of its own), or "
            "change context_parallel."
        )


def shard(batch: dict[str, torch.Tensor], rank: int, size: int) -> dict[str, torch.Tensor]:
    """Return one rank's part of a row or a batch of rows.

    Args:
        batch: `input_ids`, `position_ids` and `shift_labels`, each (..., T). Labels must be shifted
            already: that of a shard's last token is in the next shard.
        rank: the rank in its context-parallel group.
        size: ranks in the group.

    Returns:
        The same keys, (..., T / size). Positions stay those in the whole document.

    Raises:
        UsageError: if T does not divide by `size`, or there is another key.
    """
    unknown = sorted(set(batch) - set(_PER_TOKEN))
    if unknown or "position_ids" not in batch:
        raise UsageError(
            f"A batch with {sorted(batch)} cannot be cut into shards; give input_ids, "
            "position_ids and shift_labels."
        )
    length = batch["position_ids"].shape[-1]
    check_divides(length, size)
    own = slice(rank * (length // size), (rank + 1) * (length // size))
    return {key: values[..., own] for key, values in batch.items()}
