"""FlashAttention's kernels, written out: what they compute from tables, on CPU, in plain PyTorch.

The kernels need a GPU, but what they are told does not. Here each step that a table orders is
counted: a tile that is listed twice weighs double, one that is forgotten is missing, and tiles
listed as wholly visible are never masked.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import ModuleType

import pytest
import torch

from longgen.attention import flash
from longgen.attention.flash import ops, plan
from longgen.attention.flash.plan import TILE_K, Mask

Tensor = torch.Tensor


def _up(size: int, step: int) -> int:
    return -(-size // step) * step


def _masked(
    mask: Mask,
    places: list[Tensor],
    batch: int,
    heads: int,
    sizes: tuple[int, int],
    tiles: Tensor,
    by_row: bool,
) -> Tensor:
    """Ask the mask about the pairs of all tiles (B, H, nq, nk), also those behind the ends: bool
    (B, H, nq * tile, nk * tile).

    By row, it is asked about each tile's first key alone, and causality cuts the rest.
    """
    (num_q, num_k), (tall, wide) = sizes, tiles.tolist()
    b, h, q, k = (
        torch.arange(n, dtype=torch.int32)[(..., *[None] * (3 - axis))]
        for axis, n in enumerate((batch, heads, _up(num_q, tall), _up(num_k, wide)))
    )
    key_head = h // mask.group
    head = key_head + mask.head_offset
    if not mask.by_places:
        assert not places
        q = q + (num_k - num_q)
        return (
            _visible(mask, q, k // wide * wide, head) & (k <= q)
            if by_row
            else _visible(mask, q, k, head)
        )
    q = q + b * num_q if mask.query_rows else q
    k = k + key_head * num_k if mask.key_heads > 1 else k
    k = k + b * (num_k * mask.key_heads) if mask.key_rows else k
    assert all(x.dtype == torch.int32 and x.dim() == 1 for x in places)
    q_document, q_position, k_document, k_position = (
        place[at] for place, at in zip(places, (q, q, k, k), strict=True)
    )
    same = (q_document == k_document) & (q_document >= 0)
    return same & _visible(mask, q_position, k_position, head)


def _visible(mask: Mask, q: Tensor, k: Tensor, head: Tensor) -> Tensor:
    seen = mask.pattern.visible(q, k, head)
    if mask.only_strided:
        rest = replace(mask.pattern, stride_blocks=0, head_shift=0)
        seen = seen & ~rest.visible(q, k)
    return seen.expand(torch.broadcast_shapes(seen.shape, head.shape))


def _weigh(
    masked: Tensor,
    whole: Tensor,
    mask: Mask,
    places: list[Tensor],
    sizes: tuple[int, int],
    tile_q: int,
    tile_k: int,
    by_row: bool = False,
) -> Tensor:
    """Count how often each pair (B, H, T, S) is computed, given how often each tile is visited."""
    (num_q, num_k), (batch, heads, *_) = sizes, masked.shape
    assert not whole[:, :, num_q // tile_q :].any(), "a tile without mask has no such queries"
    assert not whole[..., num_k // tile_k :].any(), "a tile without mask has no such keys"
    seen = _masked(mask, places, batch, heads, sizes, torch.tensor([tile_q, tile_k]), by_row)

    def per_pair(visits: Tensor) -> Tensor:
        return visits.repeat_interleave(tile_q, 2).repeat_interleave(tile_k, 3)

    return (per_pair(masked) * seen + per_pair(whole))[:, :, :num_q, :num_k]


def _heads_first(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    group = q.shape[2] // k.shape[2]
    dtype = torch.promote_types(q.dtype, torch.float32)
    q, k, v = (x.to(dtype).transpose(1, 2) for x in (q, k, v))
    return q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)


def _attend(q: Tensor, k: Tensor, v: Tensor, counts: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attend with every pair as often as counted (B, H, T, S): out like q, and lse (B, H, T)."""
    qh, kh, vh = _heads_first(q, k, v)
    scores = (qh @ kh.transpose(-1, -2) * scale).masked_fill(counts == 0, float("-inf"))
    largest = scores.amax(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).min)
    weights = counts * torch.exp(scores - largest)
    total = weights.sum(-1, keepdim=True)
    out = weights @ vh / torch.where(total == 0, 1.0, total)
    return out.transpose(1, 2).to(q.dtype).contiguous(), (largest + total.log())[..., 0]


def _gradients(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    counts: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what the pairs, as often as counted, add to dq, dk and dv."""
    qh, kh, vh = _heads_first(q, k, v)
    grad, out = (x.to(qh.dtype).transpose(1, 2) for x in (grad, out))
    product = (grad * out).sum(-1, keepdim=True)
    if grad_lse is not None:
        product = product - grad_lse[..., None]
    finite = lse.masked_fill(lse == float("-inf"), 0.0)[..., None]
    scores = (qh @ kh.transpose(-1, -2) * scale).masked_fill(counts == 0, float("-inf"))
    weights = counts * torch.exp(scores - finite)
    dscores = weights * (grad @ vh.transpose(-1, -2) - product) * scale

    def per_key_head(x: Tensor) -> Tensor:
        return x.unflatten(1, (k.shape[2], -1)).sum(2).transpose(1, 2)

    dk, dv = dscores.transpose(-1, -2) @ qh, weights.transpose(-1, -2) @ grad
    return (dscores @ kh).transpose(1, 2), per_key_head(dk), per_key_head(dv)


@dataclass(frozen=True)
class Kernels:
    """Stand for the module that holds the kernels; functions as there."""

    forward_tile_q: int
    backward_tile_q: int

    def tiles_q(self, head_dim: int) -> tuple[int, int]:
        return self.forward_tile_q, self.backward_tile_q

    def listed_forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        forward: list[Tensor],
        mask: Mask,
        tile_k: int,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        assert mask.group == q.shape[2] // k.shape[2]
        batch, heads, tile_q = q.shape[0], q.shape[2], self.forward_tile_q
        shape = (batch, heads, -(-q.shape[1] // tile_q), -(-k.shape[1] // tile_k))
        lists = [x.expand(batch, heads, *x.shape[2:]) for x in forward[:4]]
        visits = []
        for count, index in (lists[:2], lists[2:]):
            assert count.dtype == index.dtype == torch.int32
            assert count.shape == shape[:3]
            listed = torch.arange(index.shape[-1]) < count[..., None]
            visits.append(
                torch.zeros(shape, dtype=torch.int64).scatter_add_(3, index.long(), listed.long())
            )
            # Walked from the end, and only the first tile asks where the keys end.
            behind = (index[..., :-1] >= index[..., 1:]) & listed[..., 1:]
            assert not behind.any(), "tiles are not listed in order"
        assert (lists[0] + lists[2]).all(), "a query tile has no tile to begin with"
        sizes, by_row = (q.shape[1], k.shape[1]), mask.is_by_row(tile_k)
        counts = _weigh(*visits, mask, forward[4:], sizes, tile_q, tile_k, by_row)
        return _attend(q, k, v, counts, scale)

    def listed_backward(
        self,
        grad: Tensor,
        grad_lse: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        backward: list[Tensor],
        mask: Mask,
        strided: list[Tensor],
        strided_mask: Mask | None,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        def add(k: Tensor, v: Tensor, work: list[Tensor], mask: Mask) -> tuple[Tensor, ...]:
            assert mask.group == q.shape[2] // k.shape[2]
            tile_q, sizes = self.backward_tile_q, (q.shape[1], k.shape[1])
            shape = (q.shape[0], q.shape[2], -(-sizes[0] // tile_q), -(-sizes[1] // TILE_K))
            masked, whole = (torch.zeros(shape, dtype=torch.int64) for _ in range(2))
            programs = torch.zeros(shape[0], shape[1], shape[3], dtype=torch.int64)
            table, tiles = work[:2]
            assert table.dtype == tiles.dtype == torch.int32
            for j, h, b, start, count, last, full, turn in table.tolist():
                programs[b, h, j] += 1
                assert start >= 0 and start + count <= len(tiles)
                for i in tiles[start : start + count].tolist():
                    masked[b, h, i, j] += 1
                assert 0 <= turn < max(full, 1)
                for at in range(turn, turn + full):
                    i = last - at % full
                    assert i >= 0
                    whole[b, h, i, j] += 1
            counts = _weigh(masked, whole, mask, work[2:], sizes, tile_q, TILE_K)
            dq, dk, dv = _gradients(grad, grad_lse, q, k, v, out, lse, counts, scale)
            if mask.group == 1:
                # Each program stores its tile over what was there, and nothing else does.
                assert programs.max() <= 1, "two programs store the same tile"
                forgotten = (programs == 0).repeat_interleave(TILE_K, 2)[:, :, : sizes[1]]
                nowhere = forgotten.transpose(1, 2)[..., None]
                dk, dv = (x.masked_fill(nowhere, float("nan")) for x in (dk, dv))
            return dq, dk, dv

        dq, dk, dv = add(k, v, backward, mask)
        if strided_mask is not None:
            columns, *work = strided
            place = (
                torch.arange(q.shape[0])[:, None, None],
                columns.transpose(1, 2),
                torch.arange(k.shape[2])[None, None, :],
            )
            dq_more, *parts = add(k[place], v[place], work, strided_mask)
            dq = dq + dq_more
            for part, target in zip(parts, (dk, dv), strict=True):
                target.index_put_(place, part, accumulate=True)
        return dq.to(q.dtype).contiguous(), dk.to(k.dtype).contiguous(), dv.to(v.dtype).contiguous()

    def dense_forward(
        self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        if cu_seqlens is None:
            return _attend(q, k, v, _causal(q, k, None), scale)
        out, lse = _attend(q[None], k[None], v[None], _causal(q[None], k[None], cu_seqlens), scale)
        return out[0], lse[0]

    def dense_backward(
        self,
        grad: Tensor,
        grad_lse: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        cu_seqlens: Tensor | None,
        scale: float,
    ) -> tuple[Tensor, ...]:
        rows = [grad, grad_lse, q, k, v, out, lse]
        if cu_seqlens is not None:
            rows = [None if x is None else x[None] for x in rows]
        grads = _gradients(*rows, _causal(rows[2], rows[3], cu_seqlens), scale)
        return tuple((x if cu_seqlens is None else x[0]).to(q.dtype).contiguous() for x in grads)


def _causal(q: Tensor, k: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    num_q, num_k = q.shape[1], k.shape[1]
    seen = torch.ones(num_q, num_k, dtype=torch.bool).tril(num_k - num_q)
    if cu_seqlens is not None:
        assert cu_seqlens.dtype == torch.int32
        assert cu_seqlens[0] == 0 and cu_seqlens[-1] == num_q == num_k
        document = torch.bucketize(torch.arange(num_q), cu_seqlens, right=True)
        seen &= document[:, None] == document
    return seen.long().expand(q.shape[0], q.shape[2], -1, -1)


@pytest.fixture(scope="session")
def emulate() -> Callable[[int, int], Kernels]:
    """Return the maker of kernels: (query tile forward, query tile backward) -> Kernels."""
    return Kernels


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernels]:
    """Let the operators run on CPU, on written-out kernels with query tiles of 128 and 64.

    Their own bodies run as on a GPU; only the module behind them is another. It all ends with the
    test.
    """
    kernels = Kernels(128, 64)
    module = ModuleType("longgen.attention.flash.hopper")
    for name in ("tiles_q", "listed_forward", "listed_backward", "dense_forward", "dense_backward"):
        setattr(module, name, getattr(kernels, name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    with torch.library._scoped_library("longgen", "IMPL") as library:
        for op in (
            ops.flash_listed,
            ops.flash_listed_backward,
            ops.flash_dense,
            ops.flash_dense_backward,
        ):
            library.impl(op._opoverload.name().removeprefix("longgen::"), op._init_fn, "CPU")
        yield kernels


@pytest.fixture
def no_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have nothing keep the backend from running."""
    monkeypatch.setattr(flash, "flash_obstacle", lambda q, *, gradients: None)


@pytest.fixture(autouse=True)
def fresh_tables() -> None:
    """Leave no tables of another test behind."""
    plan.tables.cache_clear()
