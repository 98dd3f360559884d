"""What a provider must get right before its time counts.

Nothing here has a tolerance of its own: errors are held to twice those of plain PyTorch in the same
dtype, both measured against fp64 (longgen/attention/testing.py), with the mask of the pattern that
the provider says it computes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from longgen.attention.testing import (
    Attend,
    ErrorBudget,
    Inputs,
    assert_within_eager_error,
    eager_attention,
    random_inputs,
)
from longgen.bench.work import Heads, Work
from longgen.layout import Layout
from longgen.pattern import SparsePattern

# The whole score matrix is kept in fp64, several times: a few GB at the longest.
_SHORTEST, _LONGEST = 2048, 4608
_ROWS = 32
_EARLY_ROWS = 8
_SAMPLED_HEADS = 3


class Wrong(Exception):
    """Says, as a sentence, what a provider computed wrongly."""


def gate_length(pattern: SparsePattern) -> int:
    """Return a length of a few thousand tokens at which every part of a pattern hides something.

    Patterns that keep more than that are only tested whole on sampled rows (`check_rows`).
    """
    if pattern.is_full:
        return _SHORTEST
    blocks = pattern.sink_blocks + pattern.local_blocks + pattern.stride_blocks + 2
    wanted = blocks * pattern.block_size
    return min(max(_SHORTEST, -(-wanted // 128) * 128), _LONGEST)


def gate_shape(pattern: SparsePattern, shape: Heads) -> Heads:
    """Return few heads with the same group and size; two key/value heads, if the pattern differs
    between heads or the groups are small."""
    several = pattern.num_head_classes > 1 or shape.group <= 4
    kv_heads = min(shape.kv_heads, 2 if several else 1)
    return Heads(heads=shape.group * kv_heads, kv_heads=kv_heads, head_dim=shape.head_dim)


def gate_budget(work: Work, device: torch.device, *, gradients: bool, seed: int) -> ErrorBudget:
    """Return what the pattern of `work` gives in truth and in eager PyTorch, at its length.

    It takes several times 8 bytes for each query, key and head.
    """
    shape = work.shape
    inputs = random_inputs(
        work.length,
        heads=shape.heads,
        key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        dtype=work.dtype,
        device=device,
        seed=seed,
    )
    mask = Layout.causal(work.length).dense_mask(work.pattern, shape.kv_heads)
    return ErrorBudget(inputs, torch.from_numpy(mask).to(device), gradients=gradients)


def check_gate(name: str, attend: Attend, budget: ErrorBudget) -> None:
    """Hold output and gradients of `attend` to a budget.

    Raises:
        Wrong: if they leave it.
    """
    try:
        budget.check(name, attend)
    except AssertionError as error:
        raise Wrong(f"wrong result at {budget.inputs.q.shape[1]:,} tokens: {error}") from None


def sampled_rows(length: int, seed: int) -> dict[str, list[int]]:
    """Return positions of queries to check at full length: some early, most late, the last one.

    The groups are compared apart: early queries see few keys, and their large outputs would hide
    the errors of late ones.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, count: int) -> list[int]:
        if high <= low:
            return []
        return sorted(torch.randint(low, high, (count,), generator=generator).tolist())

    late = [*draw(length // 2, length, _ROWS - _EARLY_ROWS - 1), length - 1]
    groups = {"early": draw(length // 64, length // 8, _EARLY_ROWS), "late": late}
    return {name: rows for name, rows in groups.items() if rows}


class RowTruth:
    """Hold what sampled query rows of some heads give in truth and in eager PyTorch."""

    def __init__(
        self, inputs: Inputs, pattern: SparsePattern, *, gradients: bool, seed: int
    ) -> None:
        """Compute both: a softmax over the keys that each row sees, head by head.

        Args:
            inputs: at full length.
            pattern: what queries see.
            gradients: whether to compute those of the queries too.
            seed: of the sample.
        """
        num_heads, kv_heads = inputs.q.shape[2], inputs.k.shape[2]
        group, length = num_heads // kv_heads, inputs.q.shape[1]
        chosen = sorted({0, kv_heads // 2, kv_heads - 1})[:_SAMPLED_HEADS]
        # Query heads of different places in their groups.
        self.heads = [(h, h * group + i % group) for i, h in enumerate(chosen)]
        self.rows = sampled_rows(length, seed)
        self.gradients = gradients
        self.truth = {
            name: self._both(inputs, pattern, torch.tensor(rows, device=inputs.q.device))
            for name, rows in self.rows.items()
        }

    def _both(
        self, inputs: Inputs, pattern: SparsePattern, rows: torch.Tensor
    ) -> list[dict[str, torch.Tensor]]:
        results = []
        keys = torch.arange(inputs.k.shape[1], device=rows.device)
        for convert in (lambda x: x, lambda x: x.double()):
            found: dict[str, list[torch.Tensor]] = {"out": [], "dq": []}
            for kv_head, head in self.heads:
                mask = pattern.visible(rows[:, None], keys[None, :], kv_head)[None, None]
                q = convert(inputs.q[:, rows, head : head + 1]).requires_grad_(self.gradients)
                k, v = (convert(x[:, :, kv_head : kv_head + 1]) for x in (inputs.k, inputs.v))
                with torch.set_grad_enabled(self.gradients):
                    out = eager_attention(q, k, v, mask)
                found["out"].append(out.detach())
                if self.gradients:
                    grad = convert(inputs.grad[:, rows, head : head + 1])
                    found["dq"].append(torch.autograd.grad(out, q, grad)[0])
            results.append({key: torch.cat(parts, 2) for key, parts in found.items() if parts})
        return results

    def check(self, name: str, out: torch.Tensor, dq: torch.Tensor | None) -> None:
        """Hold the sampled rows of an output and of the queries' gradient (B, T, H, D) to them.

        Raises:
            Wrong: if they leave the budget.
        """
        heads = torch.tensor([head for _, head in self.heads], device=out.device)
        for group, rows in self.rows.items():
            eager, exact = self.truth[group]
            places = torch.tensor(rows, device=out.device)
            for key, value in (("out", out), ("dq", dq)):
                if value is None or key not in exact:
                    continue
                part = value[:, places][:, :, heads]
                try:
                    assert_within_eager_error(
                        f"{name} {key}, {group} rows", part, eager[key], exact[key], largest=False
                    )
                except AssertionError as error:
                    raise Wrong(f"wrong result at full length: {error}") from None


def check_full_length(
    name: str, attend: Attend, inputs: Inputs, truth: RowTruth, directions: Sequence[str]
) -> None:
    """Run `attend` once at full length: everything must be finite, and the sampled rows right.

    Raises:
        Wrong: if not.
    """
    backward = "backward" in directions
    leaves = [x.detach().requires_grad_(backward) for x in inputs[:3]]
    with torch.set_grad_enabled(backward):
        out = attend(*leaves)
    _check_whole("out", out, inputs.q)
    dq = None
    if backward:
        dq, dk, dv = torch.autograd.grad(out, leaves, inputs.grad)
        for key, value, like in (("dq", dq, inputs.q), ("dk", dk, inputs.k), ("dv", dv, inputs.v)):
            _check_whole(key, value, like)
    truth.check(name, out.detach(), dq)


def _check_whole(key: str, value: torch.Tensor, like: torch.Tensor) -> None:
    if value.shape != like.shape:
        raise Wrong(f"{key} has shape {tuple(value.shape)}, not {tuple(like.shape)}")
    if not bool(torch.isfinite(value).all()):
        raise Wrong(f"{key} holds values that are not finite at full length")
