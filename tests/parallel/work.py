"""What test processes do: attention spread over a group, beside the same attention whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from longgen.attention import attention
from longgen.layout import Axis, Layout, axis_length
from longgen.parallel import collectives
from longgen.parallel.attend import context_attention, sent_bytes
from longgen.parallel.group import ContextGroup
from longgen.pattern import SparsePattern


@dataclass(frozen=True)
class Case:
    """One attention of H query and Hkv key/value heads of size D over rows of tokens."""

    pattern: SparsePattern
    rows: tuple[Axis, ...]
    heads: tuple[int, int, int]
    size: int
    by: str
    seed: int = 0


class Counter:
    """Add up the bytes that really go to other ranks."""

    def __init__(self, rank: int) -> None:
        self.rank, self.sent = rank, 0
        self._swap = collectives.dist.all_to_all_single

    def __call__(self, out: Any, rows: Any, receive: Any, send: Any, **options: Any) -> Any:
        others = sum(count for rank, count in enumerate(send) if rank != self.rank)
        self.sent += others * rows[:1].nbytes if len(rows) else 0
        return self._swap(out, rows, receive, send, **options)


def compare(rank: int, cases: list[Case]) -> list[dict[str, Any]]:
    """Run every case whose group has this rank; return errors against the whole and bytes sent."""
    dist.init_process_group("gloo")
    groups = {size: dist.new_group(list(range(size))) for size in (1, 2, 3, 4)}
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    return [
        run(case, ContextGroup(rank, case.size, groups[case.size]))
        for case in cases
        if rank < case.size
    ]


def run(case: Case, group: ContextGroup) -> dict[str, Any]:
    """Return the greatest error of output and gradients relative to the greatest value of each, and
    the bytes."""
    heads, kv_heads, head_dim = case.heads
    generator = torch.Generator().manual_seed(case.seed)
    batch, total = len(case.rows), axis_length(case.rows[0])

    def draw(number: int) -> torch.Tensor:
        shape = (batch, total, number, head_dim)
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    whole = [draw(heads), draw(kv_heads), draw(kv_heads)]
    grad = draw(heads)
    for tensor in whole:
        tensor.requires_grad_()
    layout = Layout.of_rows(case.rows)
    expected = attention(*whole, pattern=case.pattern, layout=layout, impl="reference")
    expected.backward(grad)

    length = total // case.size
    own = slice(group.rank * length, (group.rank + 1) * length)
    parts = [tensor.detach()[:, own].clone().requires_grad_() for tensor in whole]
    counter = Counter(group.rank)
    collectives.dist.all_to_all_single, before = counter, collectives.dist.all_to_all_single
    try:
        out = context_attention(
            *parts, pattern=case.pattern, rows=case.rows, group=group, by=case.by
        )
        sent = counter.sent
        out.backward(grad[:, own])
    finally:
        collectives.dist.all_to_all_single = before
    assert all(
        part.grad is not None and tensor.grad is not None
        for part, tensor in zip(parts, whole, strict=True)
    )
    pairs = [(out, expected[:, own])]
    pairs += [(part.grad, tensor.grad[:, own]) for part, tensor in zip(parts, whole, strict=True)]
    scales = [expected, *(tensor.grad for tensor in whole)]
    # What goes in is of size 1; of queries that see one key each only rounding comes back, 2e-16.
    errors = [
        float((got - want).abs().max() / scale.abs().max().clamp(min=1e-2))
        for (got, want), scale in zip(pairs, scales, strict=True)
    ]
    planned = sent_bytes(
        case.pattern,
        case.rows,
        group,
        num_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        bytes_per_element=8,
        by=case.by,
    )
    return {
        "error": max(errors),
        "planned": planned,
        "sent": sent,
        "sent_back": counter.sent - sent,
    }
