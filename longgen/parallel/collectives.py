"""All-to-all among the ranks of a group, plain and with gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist


def begin_all_to_all(
    rows: torch.Tensor, send: Sequence[int], receive: Sequence[int], process_group: Any
) -> Callable[[], torch.Tensor]:
    """Begin to send `send[r]` rows to each rank r, in order; the function returned waits for what
    comes, `receive[r]` rows from each.

    Between the two, other work goes on beside the exchange. On a GPU the wait is the stream's, not
    the host's.

    Args:
        rows: (sum(send), ...), contiguous.
        send: rows for each rank, this one included.
        receive: rows from each rank; what that rank has for this one in its `send`.
        process_group: torch.distributed's handle.

    Returns:
        A function that returns (sum(receive), ...), without gradients.
    """
    received = rows.new_empty(sum(receive), *rows.shape[1:])
    work = dist.all_to_all_single(
        received, rows, list(receive), list(send), group=process_group, async_op=True
    )

    def wait() -> torch.Tensor:
        work.wait()
        return received

    return wait


def all_to_all(
    rows: torch.Tensor, send: Sequence[int], receive: Sequence[int], process_group: Any
) -> torch.Tensor:
    """Exchange rows as `begin_all_to_all` does, and wait for them."""
    return begin_all_to_all(rows, send, receive, process_group)()


class _Swap(torch.autograd.Function):
    """All-to-all of equal parts. It is its own inverse, so the gradients go the same way."""

    @staticmethod
    def forward(ctx: Any, parts: torch.Tensor, process_group: Any) -> torch.Tensor:
        ctx.process_group = process_group
        ones = [1] * len(parts)
        return all_to_all(parts.contiguous(), ones, ones, process_group)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        ones = [1] * len(grads[0])
        return all_to_all(grads[0].contiguous(), ones, ones, ctx.process_group), None


def swap(parts: torch.Tensor, process_group: Any) -> torch.Tensor:
    """Send parts[r] of (ranks, ...) to rank r; return (ranks, ...) with what came from each."""
    return _Swap.apply(parts, process_group)
