"""Providers that are right, and some that are wrong on purpose."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from longgen.attention import attention
from longgen.bench.providers import Job, Provider
from longgen.bench.work import Work
from longgen.pattern import SparsePattern

SMALL = SparsePattern(block_size=16, sink_blocks=1, local_blocks=2)


def provider(name: str, change: Callable[..., torch.Tensor], **fields: Any) -> Provider:
    """Return a provider whose output is `change(work, q, k, v)`."""

    def make(work: Work) -> Job:
        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return change(work, q, k, v)

        return Job(attend=attend, sees=work.pattern)

    return Provider(name=name, label=name, make=make, **fields)


def right(work: Work, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return attention(q, k, v, pattern=work.pattern)


def wrong_mask(work: Work, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """See a block more than the pattern allows."""
    pattern = replace(work.pattern, local_blocks=work.pattern.local_blocks + 1)
    return attention(q, k, v, pattern=pattern)
