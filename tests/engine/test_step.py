"""Pieces of prompts and decoding sequences in one pass give the logits of plain forwards."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from longgen.engine.cache import FP8_MARGIN, EngineCache, Span
from longgen.engine.decode import DecodeBatch
from longgen.engine.step import Step, run
from longgen.errors import UsageError
from longgen.pattern import SparsePattern
from tests.interpreter import interpreted

LONGEST = 60


def make_cache(model: Any, dtype: torch.dtype = torch.float32, **sizes: int) -> EngineCache:
    config = model.config
    return EngineCache(
        config.layer_plan,
        config.num_key_value_heads,
        config.head_dim,
        **{"num_pages": 40, "page_size": 5, "num_slots": 3, "max_length": LONGEST, **sizes},
        dtype=dtype,
        device=torch.device("cpu"),
    )


def run_in_pieces(
    model: Any, cache: EngineCache, rows: list[list[int]], seed: int
) -> list[torch.Tensor]:
    """Take sequences through the model in random pieces, and return the logits of all tokens."""
    chance = random.Random(seed)
    seen = [0] * len(rows)
    slots = cache.slots.take(len(rows))
    tables = [cache.pages.take(cache.num_pages_for(LONGEST)) for _ in rows]
    logits: list[list[torch.Tensor]] = [[] for _ in rows]
    while any(n < len(row) for n, row in zip(seen, rows, strict=True)):
        spans, decoding, tokens, order = [], [], [], []
        for i, row in enumerate(rows):
            if seen[i] == len(row) or chance.random() < 0.2:
                continue
            length = min(chance.choice([1, 1, 2, 7, 20]), len(row) - seen[i])
            if length == 1 and seen[i]:
                decoding.append(i)
                continue
            spans.append(Span(cache, seen[i], length, slots[i], tables[i]))
            tokens += row[seen[i] : seen[i] + length]
            order.append((i, length))
            seen[i] += length
        for i in decoding:
            tokens.append(rows[i][seen[i]])
            order.append((i, 1))
            seen[i] += 1
        if not tokens:
            continue
        batch = None
        if decoding:
            batch = DecodeBatch.of(
                cache,
                [seen[i] for i in decoding],
                [slots[i] for i in decoding],
                [tables[i] for i in decoding],
            )
        found = run(model, Step(cache, spans, batch), tokens, range(len(tokens)))
        for (i, length), part in zip(
            order, found.split([length for _, length in order]), strict=True
        ):
            assert len(part) == length
            logits[i].append(part)
    cache.slots.give_back(slots)
    for table in tables:
        cache.pages.give_back(table)
    return [torch.cat(parts) for parts in logits]


@pytest.mark.parametrize("seed", range(4))
def test_any_pieces_give_the_logits_of_plain_forwards(
    model: Any, tokens: Callable[..., torch.Tensor], seed: int
) -> None:
    cache = make_cache(model)
    for round_ in range(2):  # the second over what the first left in slots and pages
        rows = [tokens(n, seed=10 * seed + round_ + n).tolist() for n in (57, 30, 44)]
        for row, found in zip(rows, run_in_pieces(model, cache, rows, seed), strict=True):
            with torch.no_grad():
                expected = model(torch.tensor([row])).logits[0]
            assert torch.allclose(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layers", ["FFF", "SSS", "FSS"])
@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_families_and_plans(
    build: Callable[..., Any], tokens: Callable[..., torch.Tensor], family: str, layers: str
) -> None:
    model = build(family, layers=layers, heads=6, key_value_heads=2)
    rows = [tokens(n, seed=n).tolist() for n in (50, 13, 22)]
    for row, found in zip(rows, run_in_pieces(model, make_cache(model), rows, 0), strict=True):
        with torch.no_grad():
            expected = model(torch.tensor([row])).logits[0]
        assert torch.allclose(found, expected, atol=1e-4, rtol=1e-4)


def test_what_a_cache_holds_is_what_it_says(model: Any) -> None:
    cache = make_cache(model)
    plan, heads = model.config.layer_plan, model.config.num_key_value_heads
    token = 2 * 4 * heads * model.config.head_dim
    capacity = cache.geometry.capacity
    full, sparse = plan.layers.count("F"), plan.layers.count("S")
    # A page to spare, and an entry in every slot.
    assert cache.num_bytes == token * (full * 41 * 5 + sparse * 3 * (capacity + 1))
    assert cache.bytes_of(23) == token * (full * 25 + sparse * (capacity + 1))


def test_fp8_halves_the_bytes_at_a_small_loss(
    model: Any, tokens: Callable[..., torch.Tensor]
) -> None:
    plain, small = make_cache(model, torch.bfloat16), make_cache(model, torch.float8_e4m3fn)
    assert small.num_bytes * 2 == plain.num_bytes
    rows = [tokens(n, seed=n).tolist() for n in (57, 30, 44)]
    first = run_in_pieces(model, small, rows, 0)
    assert small.scales is not None
    assert all(len(set(scale.flatten().tolist())) > 1 for scale in small.scales)
    # With the same scales, any other pieces store the same numbers.
    other = make_cache(model, torch.float8_e4m3fn)
    other.scales, other._has_scales = small.scales, small._has_scales
    for a, b in zip(first, run_in_pieces(model, other, rows, 1), strict=True):
        assert torch.allclose(a, b, atol=1e-3, rtol=1e-3)
    with torch.no_grad():
        exact = model(torch.tensor([rows[0]])).logits[0]
    assert (first[0] - exact).norm() > 1e-3 * exact.norm(), "nothing was rounded"


def test_fp8_rounds_to_three_bits(model: Any) -> None:
    cache = make_cache(model, torch.float8_e4m3fn)
    new = torch.randn(2, 50, cache.num_heads, model.config.head_dim)
    k, v = cache.decode(0, *cache.encode(0, *new), torch.float32)
    for found, meant in ((k, new[0]), (v, new[1])):
        largest = meant.abs().amax((0, 2), keepdim=True)
        # Half a step of three bits behind the point; the smallest numbers have fixed steps, of
        # which half is 2^-10 of what is stored, 448 standing for FP8_MARGIN times the largest.
        smallest = largest * FP8_MARGIN / 448 * 2.0**-10
        assert ((found - meant).abs() <= meant.abs() / 16 + smallest).all()


def test_fp8_numbers_beyond_the_range_are_clamped(model: Any) -> None:
    cache = make_cache(model, torch.float8_e4m3fn)
    ones = torch.ones(3, cache.num_heads, model.config.head_dim)
    cache.encode(0, ones, 2 * ones)
    stored = cache.encode(0, 1000 * ones, -1000 * ones)
    k, v = cache.decode(0, *stored, torch.float32)
    assert torch.allclose(k, torch.tensor(FP8_MARGIN))
    assert torch.allclose(v, torch.tensor(-2 * FP8_MARGIN))


def test_a_sequence_that_grows_too_long_is_refused(model: Any) -> None:
    cache = make_cache(model)
    with pytest.raises(UsageError, match="A sequence of 58 tokens cannot grow by 3"):
        Span(cache, 58, 3, 0, list(range(12)))


def test_the_triton_kernel_decodes_alike() -> None:
    """The same comparison through Triton's interpreter, in a process of its own."""
    code = (
        "import sys, torch\n"
        "from tests.engine.conftest import PATTERNS\n"
        "from tests.engine.test_step import make_cache, run_in_pieces\n"
        "from tests.hf.conftest import build, tokens\n"
        "for pattern in PATTERNS.values():\n"
        "    model = build(pattern=pattern, heads=6, key_value_heads=2)\n"
        "    rows = [tokens(n, seed=n).tolist() for n in (41, 20)]\n"
        "    found = run_in_pieces(model, make_cache(model), rows, 1)\n"
        "    for row, logits in zip(rows, found, strict=True):\n"
        "        expected = model(torch.tensor([row])).logits[0]\n"
        "        assert torch.allclose(logits, expected, atol=1e-4, rtol=1e-4)\n"
        "from longgen.engine import kernels\n"
        "assert kernels.use_triton(torch.device('cpu'))\n"
    )
    done = interpreted("-c", code)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("group", [1, 3])
def test_decoding_over_pages_with_holes(group: int) -> None:
    """Keys under a mask and a length, in pages out of order, and queries that see nothing."""
    from longgen.engine.kernels import decode_attention

    torch.manual_seed(0)
    q = torch.randn(3, 2 * group, 8)
    keys, values = torch.randn(2, 7, 5, 2, 8).unbind()
    tables = torch.tensor([[3, 1], [6, 0], [2, 2]])
    lengths = torch.tensor([10, 4, 7])
    visible = torch.rand(3, 2, 10) < 0.5
    visible[1, 1] = False
    out = decode_attention(q, keys, values, tables, scale=0.3, lengths=lengths, visible=visible)
    for n in range(3):
        k, v = (x[tables[n]].flatten(0, 1)[: lengths[n]].double() for x in (keys, values))
        for h in range(2 * group):
            seen = visible[n, h // group, : lengths[n]]
            weights = torch.softmax(q[n, h].double() @ k[seen, h // group].T * 0.3, 0)
            expected = weights @ v[seen, h // group]
            assert torch.allclose(out[n, h].double(), expected, atol=1e-6)
    assert not out[1, group:].any()


def test_pages_are_never_given_out_twice(pattern: SparsePattern) -> None:
    from longgen.engine.cache import Pool

    pool = Pool(5)
    first, second = pool.take(2), pool.take(3)
    assert sorted(first + second) == list(range(5)) and not pool.num_free
    with pytest.raises(RuntimeError, match="1 asked for, 0 are free"):
        pool.take(1)
    pool.give_back(first)
    with pytest.raises(KeyError):
        pool.give_back(first)
    assert sorted(pool.take(2)) == sorted(first)
