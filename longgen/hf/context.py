"""A model whose process holds a part of every row: its layouts, its loss, and what it cannot do."""

from __future__ import annotations

from typing import Any

import torch

from longgen.errors import UsageError
from longgen.hf.head import IGNORE_INDEX
from longgen.layout import Axis, contiguous, from_position_ids
from longgen.parallel import ContextGroup, ContextLayouts
from longgen.plan import LayerPlan


def context_layouts(
    plan: LayerPlan,
    group: ContextGroup,
    tokens: torch.Tensor,
    position_ids: torch.Tensor | None,
) -> tuple[ContextLayouts, torch.Tensor]:
    """Find out from all ranks' positions where the tokens of every row stand.

    Args:
        plan: which layers are full.
        group: the ranks; each must call this.
        tokens: this rank's part of the rows, (B, T, ...).
        position_ids: their positions (B or 1, T) in their documents; None is one document a row.

    Returns:
        The layouts of all layers, and the positions.
    """
    batch_size, length = tokens.shape[:2]
    rows: tuple[Axis, ...]
    if position_ids is None:
        start = group.rank * length
        position_ids = torch.arange(start, start + length, device=tokens.device)[None]
        rows = (contiguous(group.size * length),)
    else:
        whole = group.gather(position_ids).cpu().numpy()
        rows = tuple(from_position_ids(row) for row in whole)
    return ContextLayouts(plan, rows * batch_size if len(rows) == 1 else rows, group), position_ids


def labelled_tokens(shift_labels: torch.Tensor, group: ContextGroup) -> torch.Tensor:
    """Return how many tokens have a label in all shards of the rows, at least 1."""
    return group.sum((shift_labels != IGNORE_INDEX).sum()).clamp(min=1)


def refuse_in_shards(
    attention_mask: torch.Tensor | None, past_key_values: Any, use_cache: bool | None
) -> None:
    """Refuse what needs whole rows.

    Raises:
        UsageError: for a cache, or a mask that hides tokens.
    """
    if past_key_values is not None or use_cache:
        raise UsageError(
            "Under context parallelism each process holds a part of the sequence, and there is no "
            "cache. Leave past_key_values out and pass use_cache=False; to generate, load the "
            "model without it."
        )
    if attention_mask is not None and not bool(attention_mask.all()):
        raise UsageError(
            "Under context parallelism no token can be masked. Leave attention_mask out; make "
            "padding a document of its own with position_ids that restart at 0."
        )


def refuse_labels(labels: torch.Tensor | None, shift_labels: torch.Tensor | None) -> None:
    """Refuse labels that are still to be shifted.

    Raises:
        UsageError: if there are only such.
    """
    if labels is not None and shift_labels is None:
        raise UsageError(
            "Under context parallelism the label of a shard's last token is in the next shard. "
            "Shift the labels of whole rows and give the model its part of them as shift_labels."
        )
