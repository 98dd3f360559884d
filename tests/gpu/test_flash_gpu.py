"""The flash backend on a Hopper GPU, against fp64 on the same card.

By default every pattern, layout, GQA ratio and head size is covered, not every combination of them:
each costs compilations. LONGGEN_ALL_SHAPES=1 runs the whole product (best with `-n 12`).
"""

from __future__ import annotations

import itertools
import os
import statistics
import time
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from longgen.attention import attention
from longgen.attention.flash import HEAD_DIMS, flash_obstacle
from longgen.attention.testing import ErrorBudget, random_inputs, visible_in_output, with_gradients
from longgen.errors import UsageError
from longgen.layout import Layout, axis_length, cached, padded
from longgen.pattern import SparsePattern

OBSTACLE = (
    flash_obstacle(torch.zeros(1, 1, 1, 64, dtype=torch.bfloat16, device="cuda"), gradients=True)
    if torch.cuda.is_available()
    else "needs an NVIDIA GPU"
)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(OBSTACLE), reason=str(OBSTACLE))]

LayoutMask = Callable[..., torch.Tensor]

PATTERNS = {
    "full": SparsePattern.full(),
    "sink_64": SparsePattern(block_size=64, sink_blocks=1, local_blocks=4),
    "sink_128": SparsePattern(block_size=128, sink_blocks=1, local_blocks=3),
    "strided_64": SparsePattern.block_sparse(stride_blocks=8),
    "strided_128": SparsePattern(
        block_size=128, sink_blocks=0, local_blocks=2, stride_blocks=4, head_shift=1
    ),
    "both_100": SparsePattern(
        block_size=100, sink_blocks=1, local_blocks=1, stride_blocks=3, head_shift=2
    ),
}
GROUPS = (1, 3, 4, 8)
EARLIER = 700
KEY_VALUE_HEADS = 2


def layouts(pattern: SparsePattern, heads: int) -> dict[str, Layout]:
    """Return a layout of every kind, of odd lengths."""
    paddings = (0, 333)
    kept = [[cached(pattern, 1500, n, h) for h in range(heads)] for n in paddings]
    room = max(axis_length(axis) for row in kept for axis in row) + 5
    return {
        "plain": Layout.causal(1333),
        "short": Layout.causal(63),
        "offset": Layout.causal(777, 777 + EARLIER),
        "packed": Layout.packed([0, 411, 412, 1000, 1333]),
        "rows": Layout.of_rows(
            [Layout.packed([0, 100, 901]).queries[0], Layout.packed([0, 450, 901]).queries[0]]
        ),
        "left_padded": Layout.of_rows(padded(499, 0, n) for n in (150, 0, 499)),
        "caches": Layout(
            tuple(padded(200, 1500, n) for n in paddings),
            tuple(
                tuple(
                    cached(pattern, 1500, n, h, room) + padded(200, 1500, n) for h in range(heads)
                )
                for n in paddings
            ),
        ),
    }


def shapes() -> list[tuple[str, int, int]]:
    """Return (pattern, GQA ratio, head size)."""
    if os.environ.get("LONGGEN_ALL_SHAPES"):
        return list(itertools.product(PATTERNS, GROUPS, HEAD_DIMS))
    # Each pattern with two of each, all ratios with all sizes but for four pairs.
    return [
        (name, GROUPS[(i // 2 + j) % 4], HEAD_DIMS[j])
        for i, name in enumerate(PATTERNS)
        for j in (i % 4, (i + 2) % 4)
    ]


@pytest.fixture(autouse=True)
def poisoned() -> None:
    """Leave NaN in the memory that the allocator hands out next, in blocks small and large."""
    torch.cuda.empty_cache()
    nan = float("nan")
    blocks = [torch.full((1 << 17,), nan, device="cuda") for _ in range(64)]
    blocks.append(torch.full((1 << 27,), nan, device="cuda"))
    del blocks


@pytest.mark.parametrize(("name", "group", "head_dim"), shapes())
def test_flash(layout_mask: LayoutMask, name: str, group: int, head_dim: int) -> None:
    pattern, heads = PATTERNS[name], KEY_VALUE_HEADS * group
    dtype = torch.float16 if (group, head_dim) == (3, 64) else torch.bfloat16
    for kind, layout in layouts(pattern, KEY_VALUE_HEADS).items():
        # Rows of a batch share a layout, or have their own.
        batch = max(layout.num_rows, 2 if kind == "packed" else 1)
        inputs = random_inputs(
            layout.num_queries,
            layout.num_keys,
            batch=batch,
            heads=heads,
            key_value_heads=KEY_VALUE_HEADS,
            head_dim=head_dim,
            dtype=dtype,
            device="cuda",
        )
        mask = layout_mask(pattern, layout, KEY_VALUE_HEADS).cuda()
        attend = partial(attention, pattern=pattern, layout=layout, impl="flash")
        ErrorBudget(inputs, mask).check(f"{kind} flash", attend)
        if kind not in ("plain", "packed", "caches"):
            continue
        read = visible_in_output(
            attend,
            layout.num_queries,
            layout.num_keys,
            batch=batch,
            heads=heads,
            key_value_heads=KEY_VALUE_HEADS,
            head_dim=head_dim,
            dtype=dtype,
            device="cuda",
            requires_grad=True,
        )
        assert torch.equal(read, mask.repeat_interleave(group, 1).expand_as(read)), kind


@pytest.mark.parametrize("name", ["full", "sink_64", "strided_128"])
@pytest.mark.parametrize("offset", [0, 5])
def test_global_heads(layout_mask: LayoutMask, name: str, offset: int) -> None:
    pattern, layout = PATTERNS[name], Layout.causal(700)
    inputs = random_inputs(
        700, heads=4, key_value_heads=4, head_dim=64, dtype=torch.bfloat16, device="cuda"
    )
    mask = layout_mask(pattern, layout, 4, offset).cuda()
    attend = partial(
        attention, pattern=pattern, layout=layout, head_offset=offset, scale=0.05, impl="flash"
    )
    ErrorBudget(inputs, mask, scale=0.05).check("flash", attend)


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("kind", ["plain", "packed", "left_padded"])
def test_log_sum_exp_and_its_gradient(name: str, kind: str) -> None:
    pattern = PATTERNS[name]
    layout = layouts(pattern, 2)[kind]
    inputs = random_inputs(
        layout.num_queries, batch=layout.num_rows, dtype=torch.bfloat16, device="cuda"
    )

    def run(impl: str, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in inputs[:3]]
        _, lse = attention(*leaves, pattern=pattern, layout=layout, impl=impl, return_lse=True)
        seen = torch.isfinite(lse)
        weights = torch.linspace(-1, 1, lse.numel(), device="cuda").view(lse.shape)
        loss = (lse.masked_fill(~seen, 0.0) * weights).sum()
        return [lse.detach(), *torch.autograd.grad(loss, leaves[:2])]

    ours, exact = run("flash", torch.bfloat16), run("reference", torch.float64)
    assert torch.equal(torch.isfinite(ours[0]), torch.isfinite(exact[0]))
    seen = torch.isfinite(exact[0])
    # Scores are summed in fp32.
    assert torch.allclose(ours[0][seen].double(), exact[0][seen], atol=2e-5, rtol=2e-5)
    for actual, expected in zip(ours[1:], exact[1:], strict=True):
        error = (actual.double() - expected).norm() / expected.norm()
        assert error < 2 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("name", ["full", "sink_128", "strided_64"])
def test_strided_inputs(layout_mask: LayoutMask, name: str) -> None:
    """Queries come as a transposed view from transformers, and slices start anywhere."""
    pattern, layout = PATTERNS[name], Layout.causal(901)
    inputs = random_inputs(901, dtype=torch.bfloat16, device="cuda")
    plain = with_gradients(partial(attention, pattern=pattern, impl="flash"), inputs)

    def views(*tensors: torch.Tensor) -> torch.Tensor:
        turned = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors)
        cut = (torch.nn.functional.pad(x, (1, 7))[..., 1:-7] for x in turned)
        return attention(*cut, pattern=pattern, layout=layout, impl="flash")

    for key, value in with_gradients(views, inputs).items():
        assert torch.equal(value, plain[key]) or key in ("dq", "dk", "dv"), key
        assert torch.allclose(value.float(), plain[key].float(), atol=2e-2, rtol=2e-2), key


@pytest.mark.parametrize("name", ["full", "sink_128", "strided_64"])
def test_compiled_checkpointed_and_captured(name: str) -> None:
    pattern = PATTERNS[name]
    inputs = random_inputs(1024, dtype=torch.bfloat16, device="cuda")
    attend = partial(attention, pattern=pattern, impl="flash")
    plain = with_gradients(attend, inputs)

    def again(*tensors: torch.Tensor) -> torch.Tensor:
        out = checkpoint(attend, *tensors, use_reentrant=False)
        assert isinstance(out, torch.Tensor)
        return out

    compiled = torch.compile(lambda *x: attend(*x) * 1.0)
    for run in (again, compiled):
        for key, value in with_gradients(run, inputs).items():
            assert torch.allclose(value, plain[key], atol=2e-2, rtol=2e-2), key
    with torch.no_grad():
        static = [x.clone() for x in inputs[:3]]
        attend(*static)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = attend(*static)
        for buffer in static:
            buffer.copy_(buffer.flip(1))
        graph.replay()
        expected = attend(*static)
    assert torch.equal(captured, expected)


def test_operators_are_well_formed() -> None:
    from longgen.attention.flash.hopper import tiles_q
    from longgen.attention.flash.ops import flash_dense, flash_listed
    from longgen.attention.flash.plan import tables

    q, k, v, _ = (
        x.requires_grad_()
        for x in random_inputs(700, dtype=torch.bfloat16, head_dim=64, device="cuda")
    )
    pattern, layout = PATTERNS["strided_64"], Layout.causal(700)
    made = tables(pattern, layout, 1, 4, 2, 0, tiles_q(64), q.device, True)
    assert made.strided_mask is not None
    masks = (m.encode() for m in (made.mask, made.backward_mask, made.strided_mask))
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(
        flash_listed,
        (q, k, v, made.forward, made.backward, made.strided, *masks, made.tile_k, 0.125),
        test_utils=tests,
    )
    torch.library.opcheck(flash_dense, (q, k, v, None, 0.125), test_utils=tests)


def test_refusals() -> None:
    wide = random_inputs(100, head_dim=72, dtype=torch.bfloat16, device="cuda")
    with pytest.raises(UsageError, match="head sizes"):
        attention(*wide[:3], impl="flash")
    with pytest.raises(UsageError, match=r"torch\.float32"):
        attention(*random_inputs(100, device="cuda")[:3], impl="flash")
    inputs = random_inputs(300, dtype=torch.bfloat16, device="cuda")
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(UsageError, match="no fixed order"):
            with_gradients(partial(attention, pattern=PATTERNS["sink_64"], impl="flash"), inputs)
    finally:
        torch.use_deterministic_algorithms(False)


def test_lists_are_made_fast() -> None:
    """At 131,072 tokens, all tables for both directions: while they are made, layers wait."""
    from longgen.attention.flash.hopper import tiles_q
    from longgen.attention.flash.plan import tables

    device = torch.device("cuda", torch.cuda.current_device())
    layout = Layout.causal(131072)
    patterns = {
        "sink": SparsePattern.attention_sink(),
        "strided, 16 unlike heads": SparsePattern(
            block_size=128, sink_blocks=0, local_blocks=8, stride_blocks=16, head_shift=1
        ),
        "full": SparsePattern.full(),
    }
    medians = {}
    for name, pattern in patterns.items():
        times = []
        # The first compile the kernels.
        for _ in range(55):
            tables.cache_clear()
            torch.cuda.synchronize()
            start = time.perf_counter()
            tables(pattern, layout, 1, 32, 32, 0, tiles_q(128), device, True)
            torch.cuda.synchronize()
            times.append(1e3 * (time.perf_counter() - start))
        medians[name] = statistics.median(times[5:])
        print(f"tables: {name}: {medians[name]:.3f} ms, least {min(times):.3f} ms")
    assert max(medians.values()) < 1.0
