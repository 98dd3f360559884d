"""What the tests give to the operators."""

from __future__ import annotations

from typing import Any

import torch

from longgen.attention.flash.plan import tables
from longgen.attention.testing import random_inputs
from longgen.layout import Layout, padded
from longgen.pattern import SparsePattern

Tensor = torch.Tensor

FULL = SparsePattern.full()
SINK = SparsePattern(block_size=16, sink_blocks=1, local_blocks=2)
STRIDED = SparsePattern.block_sparse(block_size=16, stride_blocks=3)
SCALE = 0.3
LENGTH = 200
LAYOUTS = {
    "plain": Layout.causal(LENGTH),
    "packed": Layout.packed([0, 30, LENGTH]),
    "left_padded": Layout.of_rows(padded(LENGTH, 0, n) for n in (0, 150)),
}


def draw(requires_grad: bool = True, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    inputs = random_inputs(LENGTH, batch=2, heads=4, head_dim=16, dtype=dtype)[:3]
    return [x.requires_grad_(requires_grad) for x in inputs]


def arguments(
    layout: Layout, pattern: SparsePattern = STRIDED, gradients: bool = True
) -> tuple[Any, ...]:
    """Return what `flash_listed` takes behind q, k and v."""
    made = tables(pattern, layout, 2, 4, 2, 0, (128, 64), torch.device("cpu"), gradients)
    masks = (made.mask, made.backward_mask, made.strided_mask)
    return (
        *(made.forward, made.backward, made.strided),
        *("" if mask is None else mask.encode() for mask in masks),
        made.tile_k,
        SCALE,
    )
