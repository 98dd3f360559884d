"""What is measured: patterns by name, the shape of the heads, and the FLOPs that count."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from longgen.errors import UsageError
from longgen.pattern import SparsePattern

DIRECTIONS = ("forward", "backward")
# Five matrix products instead of two: what every published figure counts.
BACKWARD_RATIO = 2.5

# `case` names of results files: stable, never given another meaning.
PATTERNS: Mapping[str, SparsePattern] = {
    "full": SparsePattern.full(),
    "sink": SparsePattern(block_size=128, sink_blocks=1, local_blocks=32),
    "strided": SparsePattern(
        block_size=128, sink_blocks=0, local_blocks=8, stride_blocks=16, head_shift=1
    ),
    # The paper's two settings, in blocks of 64 tokens and in blocks of 128.
    "sink_2k": SparsePattern.attention_sink(block_size=128, local_blocks=16),
    "sink_2k_64": SparsePattern.attention_sink(),
    "strided_2k": SparsePattern.block_sparse(block_size=128),
    "strided_2k_64": SparsePattern.block_sparse(),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """Hold the shape of one attention layer at batch 1.

    Attributes:
        heads: query heads.
        kv_heads: key/value heads; `heads` is a multiple of them.
        head_dim: size of one head.
    """

    heads: int = 32
    kv_heads: int = 32
    head_dim: int = 128

    def __post_init__(self) -> None:
        for name in ("heads", "kv_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; give at least 1.")
        if self.heads % self.kv_heads:
            raise UsageError(
                f"{self.heads} query heads are not a multiple of {self.kv_heads} key/value heads; "
                "change --heads or --kv-heads."
            )

    @property
    def group(self) -> int:
        """Query heads that share a key/value head."""
        return self.heads // self.kv_heads

    def __str__(self) -> str:
        return f"{self.heads}/{self.kv_heads} heads x {self.head_dim}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Hold one piece of work: a pattern over one document, in one layer.

    Attributes:
        name: of the pattern, as `case` has it.
        pattern: what queries see.
        length: tokens of the document.
        shape: the heads.
        dtype: of inputs and outputs.
    """

    name: str
    pattern: SparsePattern
    length: int
    shape: Heads
    dtype: torch.dtype

    def case(self, direction: str) -> str:
        """Return the name in results files, as attention.sink.forward."""
        return f"attention.{self.name}.{direction}"


def attention_flops(pattern: SparsePattern, length: int, shape: Heads, direction: str) -> float:
    """Return the FLOPs of one pass over one document of `length` tokens.

    Forward: 4 x head_dim x heads x (visible query-key pairs); backward: 2.5 times that. What a
    kernel computes and then masks, or computes again, does not count.
    """
    pairs = pattern.mean_visible_pairs(length, shape.kv_heads)
    forward = 4 * shape.head_dim * shape.heads * pairs
    return forward if direction == "forward" else BACKWARD_RATIO * forward


def token_window(pattern: SparsePattern, *, sink: bool) -> SparsePattern:
    """Return a sliding window of tokens that keeps as many as the pattern's window of blocks.

    Blocks of one token make a window that slides: query q sees keys above q - W, W being
    `local_blocks * block_size`. A window of blocks moves a block at a time, and sees between
    W - block_size + 1 and W tokens.

    Args:
        pattern: a pattern without stride.
        sink: whether the pattern's sink tokens are seen too.
    """
    size = pattern.block_size
    return SparsePattern(
        block_size=1,
        sink_blocks=pattern.sink_blocks * size if sink else 0,
        local_blocks=pattern.local_blocks * size,
    )
