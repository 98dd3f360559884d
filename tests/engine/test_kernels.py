"""What decoding stores and how it attends, against loops; with Triton also through its interpreter.

Without a GPU these are the PyTorch paths, and the last test runs the file again where
TRITON_INTERPRET makes the kernels run.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from longgen.engine import kernels, linear
from longgen.engine.cache import EngineCache
from longgen.engine.decode import DecodeBatch
from longgen.engine.kernels import decode_attention, store_tokens
from longgen.pattern import SparsePattern
from longgen.plan import LayerPlan
from tests.interpreter import assert_passes

HEADS, DIM, SPARE = 3, 6, 9
FP8 = torch.float8_e4m3fn
INTERPRETED = kernels.use_triton(torch.device("cpu"))


def bits(x: torch.Tensor) -> torch.Tensor:
    """Make NaNs comparable."""
    return x.contiguous().view(torch.uint8)


def poisoned(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full(shape, float("nan")).to(dtype)


def as_given(k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Give (N, Hkv, D) strides that they come with: heads first, and beside other numbers."""
    wide = v.new_zeros(len(v), 2 * HEADS, DIM)
    wide[:, HEADS:] = v
    return k.transpose(0, 1).contiguous().transpose(0, 1), wide[:, HEADS:]


def encoded(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (x / scale[:, None]).clamp(-448, 448).to(FP8)


@pytest.mark.parametrize("kept", ["encoded", "fp8", torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["one place", "places moved", "places a head", "all moved"])
def test_one_token_goes_where_it_belongs(layout: str, kept: Any) -> None:
    """Two rows fill the batch up: what they write nobody reads, and nothing else changes."""
    torch.manual_seed(0)
    size, number = 8, 6
    maps = HEADS if layout in ("places a head", "all moved") else 1
    pages = torch.tensor([4, 0, 7, 2, SPARE, SPARE])
    entries = torch.randint(size - 1, (number, maps))
    moved = None
    if layout != "one place":
        moved = torch.where(torch.rand(number, maps) < 0.5, size - 1, entries)
        moved = torch.full_like(entries, size - 1) if layout == "all moved" else moved
        moved = moved.T.contiguous().T  # with strides of its own
    dtype = FP8 if kept in ("fp8", "encoded") else kept
    stores = [poisoned(SPARE + 1, size, HEADS, DIM, dtype=dtype) for _ in range(2)]
    for store in stores:
        store[4] = torch.randn(size, HEADS, DIM).to(dtype)
    new = [3 * torch.randn(number, HEADS, DIM) for _ in range(2)]
    new[0][0, 0, :3] = torch.tensor([1e4, -1e4, 0.0])
    new = [x.bfloat16() if kept == "fp8" else x.to(dtype) for x in new]
    scales = torch.tensor([[0.1, 1.0, 0.013], [0.02, 0.3, 2.0]]) if kept == "fp8" else None
    expected = [store.clone() for store in stores]
    for which, (store, x) in enumerate(zip(expected, new, strict=True)):
        x = x if scales is None else encoded(x, scales[which])
        for n in range(number):
            for h in range(HEADS):
                entry = entries[n, h % maps]
                if moved is not None:
                    store[pages[n], moved[n, h % maps], h] = store[pages[n], entry, h].clone()
                store[pages[n], entry, h] = x[n, h]
    k, v = as_given(*new)
    store_tokens(*stores, k, v, pages=pages, entries=entries, moved=moved, scales=scales)
    for store, wanted in zip(stores, expected, strict=True):
        assert torch.equal(bits(store[:SPARE]), bits(wanted[:SPARE]))


@pytest.mark.parametrize("dtype", [torch.float32, FP8], ids=["fp32", "fp8"])
def test_slots_and_pages_hold_what_their_places_say(
    pattern: SparsePattern, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Token after token of sequences that differ in length; what was never written stays NaN."""
    torch.manual_seed(0)
    # Only storing is looked at, and the interpreter is slow.
    monkeypatch.setattr(linear, "decode_attention", lambda q, *_, **__: q)
    longest, page_size = 25, 5
    cache = EngineCache(
        LayerPlan("FS", pattern),
        HEADS,
        DIM,
        num_pages=12,
        page_size=page_size,
        num_slots=3,
        max_length=longest,
        dtype=dtype,
        device=torch.device("cpu"),
    )
    for store in (*cache.keys, *cache.values):
        store.copy_(poisoned(*store.shape, dtype=dtype))
    rows = {0: list(range(5, 10)), 2: list(range(5))[::-1]}  # slot: pages
    ahead = {0: 0, 2: 4}
    tokens = 3 * torch.randn(2, 3, longest, HEADS, DIM)  # keys and values, of each slot
    for step in range(1, longest + 5):
        going = [slot for slot in rows if 0 < step - ahead[slot] <= longest]
        lengths = [step - ahead[slot] for slot in going]
        # One more row only fills the batch up.
        batch = DecodeBatch.of(
            cache,
            [*lengths, 0],
            [*going, 0],
            [*(rows[slot] for slot in going), [cache.spare_page] * 5],
        )
        k, v = (x[[*going, 1], [n - 1 for n in [*lengths, 1]]] for x in tokens)
        for layer in range(2):
            batch.attend(layer, torch.ones(len(k), 2 * HEADS, DIM), k, v, 1.0)
    # The first tokens have set the scales.
    stored = [cache.encode(layer, *tokens.flatten(1, 2)) for layer in range(2)]
    places = cache.geometry.positions(torch.tensor([longest]))[0].expand(HEADS, -1)
    for which, (pages, slots) in enumerate((cache.keys, cache.values)):
        for slot, table in rows.items():
            full = stored[0][which].view(3, longest, HEADS, DIM)[slot]
            assert torch.equal(bits(pages[table].flatten(0, 1)), bits(full))
            sparse = stored[1][which].view(3, longest, HEADS, DIM)[slot]
            for h in range(HEADS):
                held = places[h] >= 0
                own = slots[slot, :-1, h]
                assert torch.equal(bits(own[held]), bits(sparse[places[h][held], h]))
                assert own[~held].float().isnan().all()
        assert slots[1].float().isnan().all() and pages[10:12].float().isnan().all()


def draw_attention(group: int, width: int, dtype: torch.dtype) -> tuple[dict[str, Any], Any]:
    """Give arguments of an attention over pages in e4m3 or fp32, and its result in fp64."""
    torch.manual_seed(0)
    number, size = 3, 48
    q = torch.randn(number, 2 * group, 16)
    keys, values = torch.randn(2, 7, size, 2, 16).to(dtype).unbind()
    tables = torch.randperm(7)[: number * width].view(number, width)
    lengths = torch.tensor([width * size, 1, width * size - 5])
    visible = torch.rand(number, 2, width * size) < 0.5
    visible[2, 1] = False
    scales = torch.tensor([[0.7, 1.3], [2.0, 0.5]]) if dtype == FP8 else None
    settings = {"lengths": lengths, "visible": visible, "scales": scales}
    k, v = (x[tables].flatten(1, 2).double() for x in (keys, values))
    if scales is not None:
        k, v = (x * scale[:, None].double() for x, scale in zip((k, v), scales, strict=True))
    exact = torch.zeros(q.shape, dtype=torch.float64)
    for n in range(number):
        for h in range(2 * group):
            seen = visible[n, h // group] & (torch.arange(width * size) < lengths[n])
            weights = torch.softmax(q[n, h].double() @ k[n, seen, h // group].T * 0.3, 0)
            exact[n, h] = weights @ v[n, seen, h // group]
    inputs = {"q": q, "keys": keys, "values": values, "block_tables": tables, "scale": 0.3}
    return inputs | settings, exact


@pytest.mark.parametrize("dtype", [torch.float32, FP8], ids=["fp32", "fp8"])
@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("group", [1, 3])
def test_attention_over_scaled_pages(group: int, width: int, dtype: torch.dtype) -> None:
    inputs, exact = draw_attention(group, width, dtype)
    for splits in (None, 1, 2, 5):
        arrivals = torch.zeros(3, 2, dtype=torch.int32)
        # The second time as the first: what is counted is zero again.
        for _ in range(2):
            out = decode_attention(**inputs, arrivals=arrivals, num_splits=splits)
            assert torch.allclose(out.double(), exact, atol=1e-5)
            assert not arrivals.any()
        assert torch.allclose(decode_attention(**inputs, num_splits=splits), out, atol=1e-6)


def test_rows_that_are_no_sequences_see_nothing() -> None:
    """Of no length in pages; and in slots, of which an entry is left out, under a mask."""
    torch.manual_seed(0)
    q = torch.randn(3, 4, 16)
    pages = torch.randn(2, 12, 128, 2, 16)
    tables, lengths = torch.arange(12).view(3, 4), torch.tensor([0, 300, 0])
    slots = torch.randn(2, 3, 131, 2, 16)
    visible = torch.zeros(3, 1, 130, dtype=torch.bool)
    visible[1, :, :70] = True
    places = torch.arange(3)[:, None]
    for splits in (None, 1, 3):
        for arrivals in (None, torch.zeros(3, 2, dtype=torch.int32)):
            options: dict[str, Any] = {"scale": 0.3, "num_splits": splits, "arrivals": arrivals}
            full = decode_attention(q, *pages, tables, lengths=lengths, **options)
            sparse = decode_attention(q, *slots[:, :, :130], places, visible=visible, **options)
            alone = decode_attention(
                q[1:2], *slots[:, 1:2, :70], places[:1], scale=0.3, lengths=torch.tensor([70])
            )
            assert not full[[0, 2]].any() and not sparse[[0, 2]].any()
            assert full[1].any() and torch.allclose(sparse[1], alone[0], atol=1e-6)
            assert arrivals is None or not arrivals.any()


@pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter")
@pytest.mark.parametrize("group", [1, 3])
def test_tuning_changes_no_results(group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from longgen.engine import triton_decode

    inputs, exact = draw_attention(group, 2, torch.float32)
    for splits, join, block, numbers in (
        (5, 32, 16, 8192),
        (5, 5, 32, 1),
        (3, 0, 16, 8192),
        (8, 7, 64, 100),
    ):
        monkeypatch.setattr(triton_decode, "JOIN_NUMBERS", numbers)
        out = triton_decode.paged_decode(
            **inputs,
            num_splits=splits,
            arrivals=torch.zeros(3, 2, dtype=torch.int32),
            join_splits=join,
            block=block,
            num_warps=8,
            num_stages=2,
        )
        assert torch.allclose(out.double(), exact, atol=1e-5)


@pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter")
def test_few_keys_take_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    from longgen.engine import triton_decode

    def refuse(*_: Any) -> None:
        raise AssertionError("a second launch")

    class Refusing:
        __getitem__ = refuse

    inputs, exact = draw_attention(3, 2, torch.float32)
    monkeypatch.setattr(triton_decode, "_together", Refusing())
    arrivals = torch.zeros(3, 2, dtype=torch.int32)
    for settings in ({}, {"num_splits": 3, "arrivals": arrivals}):
        out = decode_attention(**inputs, **settings)
        assert torch.allclose(out.double(), exact, atol=1e-5)
    with pytest.raises(AssertionError, match="a second launch"):
        decode_attention(**inputs, num_splits=3)


def test_the_same_with_the_kernels() -> None:
    assert_passes(__file__)
