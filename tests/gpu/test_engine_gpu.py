"""The engine on one NVIDIA GPU: the split-KV kernel, and decoding steps recorded in CUDA graphs."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from longgen.engine import Engine, SamplingParams, kernels
from longgen.engine.cache import EngineCache
from longgen.engine.decode import DecodeBatch
from longgen.engine.runner import DecodeRunner
from longgen.pattern import SparsePattern
from longgen.plan import LayerPlan
from tests.engine.rounding import compare, make_model, make_prompt
from tests.hf.conftest import SINK, STRIDED, build, tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

LENGTHS = (3, 700, 1500, 2000, 128)
FP8 = torch.float8_e4m3fn
BOTH = SparsePattern(block_size=3, sink_blocks=2, local_blocks=2, stride_blocks=2, head_shift=3)


@pytest.mark.parametrize("group", [1, 3, 4, 8])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
def test_decoding_kernel(group: int, head_dim: int) -> None:
    """Against fp64, to twice what PyTorch makes of the same numbers in their own precision."""
    torch.manual_seed(0)
    for dtype, page_size in (
        (torch.bfloat16, 16),
        (torch.bfloat16, 128),
        (torch.float16, 128),
    ):
        number, heads, width = 5, 2, 4096 // page_size
        draw = {"device": "cuda", "dtype": dtype}
        q = torch.randn(number, heads * group, head_dim, **draw)
        keys, values = torch.randn(2, number * width, page_size, heads, head_dim, **draw)
        tables = torch.randperm(number * width, device="cuda").int().view(number, width)
        lengths = torch.tensor([4096, 1, 63, 2049, 1000], device="cuda")
        visible = torch.rand(number, heads, 4096, device="cuda") < 0.3
        visible[:, :, 0] = True
        for seen in (None, visible, visible[:, :1]):
            settings: dict[str, Any] = {"scale": 0.1, "lengths": lengths, "visible": seen}
            exact = kernels._plain(
                *(x.double() for x in (q, keys, values)), tables, 0.1, lengths, seen
            )
            k, v = (x[tables.long()].flatten(1, 2) for x in (keys, values))
            mask = torch.arange(4096, device="cuda") < lengths[:, None, None]
            mask = mask if seen is None else mask & seen
            grouped = q.view(number, heads, group, head_dim)
            scores = torch.einsum("nhgd,nshd->nhgs", grouped, k) * 0.1
            scores = scores.masked_fill(~mask[:, :, None], float("-inf"))
            eager = torch.einsum("nhgs,nshd->nhgd", torch.softmax(scores, -1), v).reshape(q.shape)
            budget = 2 * (eager.double() - exact).square().mean().sqrt()
            arrivals = torch.zeros(number, heads, dtype=torch.int32, device="cuda")
            # Each costs a compilation, so not all of all.
            last = [(None, arrivals), (7, arrivals)] if seen is visible else []
            for splits, counts in ((None, None), (1, None), (7, None), *last):
                found = kernels.decode_attention(
                    q, keys, values, tables, num_splits=splits, arrivals=counts, **settings
                )
                error = (found.double() - exact).square().mean().sqrt()
                assert error <= budget + exact.square().mean().sqrt() * torch.finfo(dtype).eps / 2
                assert not arrivals.any()


def test_keys_in_fp8() -> None:
    torch.manual_seed(0)
    q = torch.randn(3, 8, 128, device="cuda", dtype=torch.bfloat16)
    keys, values = torch.randn(2, 12, 128, 2, 128, device="cuda").to(FP8)
    tables = torch.arange(12, device="cuda").view(3, 4)
    lengths = torch.tensor([512, 100, 300], device="cuda")
    arrivals = torch.zeros(3, 2, dtype=torch.int32, device="cuda")
    for scales in (None, torch.tensor([[0.7, 1.3], [2.0, 0.5]], device="cuda")):
        exact = kernels._plain(q, keys, values, tables, 0.1, lengths, None, scales)
        settings: dict[str, Any] = {"scale": 0.1, "lengths": lengths, "scales": scales}
        for splits, counts in itertools.product((1, 3), (None, arrivals)):
            found = kernels.decode_attention(
                q, keys, values, tables, num_splits=splits, arrivals=counts, **settings
            )
            assert torch.allclose(found.float(), exact.float(), atol=2e-2, rtol=2e-2)


def test_the_last_to_arrive_sees_all_parts() -> None:
    """Many times over, on processors that are full and empty: always the same bits."""
    torch.manual_seed(0)
    for number in (1, 16, 200):
        q = torch.randn(number, 32, 128, device="cuda", dtype=torch.bfloat16)
        keys, values = torch.randn(2, number, 2112, 8, 128, device="cuda", dtype=q.dtype)
        tables = torch.arange(number, device="cuda")[:, None]
        arrivals = torch.zeros(number, 8, dtype=torch.int32, device="cuda")
        found = [
            kernels.decode_attention(
                q, keys, values, tables, scale=0.1, arrivals=arrivals, num_splits=9
            )
            for _ in range(200)
        ]
        assert all(torch.equal(found[0], other) for other in found[1:])
        twice = kernels.decode_attention(q, keys, values, tables, scale=0.1, num_splits=9)
        assert torch.allclose(found[0].float(), twice.float(), atol=1e-2, rtol=1e-2)
        assert not arrivals.any()


@pytest.mark.parametrize("kept", [torch.bfloat16, torch.float32, FP8])
@pytest.mark.parametrize("moves", [False, True])
@pytest.mark.parametrize("head_dim", [80, 128])
def test_storing_kernel(head_dim: int, moves: bool, kept: torch.dtype) -> None:
    """Against PyTorch on the CPU, bit for bit."""
    torch.manual_seed(0)
    number, heads, size = 70, 8, 130
    stores = list(torch.randn(2, 90, size, heads, head_dim).to(kept).unbind())
    new = torch.randn(2, heads, number, head_dim).to(torch.bfloat16 if kept == FP8 else kept)
    new[0, 0, 0, :4] = torch.tensor([1e5, -1e5, 0.0, 1e-6])
    k, v = new.transpose(1, 2)
    pages, entries = torch.randperm(90)[:number], torch.randint(size - 1, (number, heads))
    moved = torch.where(torch.rand(number, heads) < 0.5, size - 1, entries) if moves else None
    scales = torch.rand(2, heads) / 50 + 1e-4 if kept == FP8 else None
    places = {"pages": pages, "entries": entries, "moved": moved, "scales": scales}
    found = [store.cuda() for store in stores]
    kernels.store_tokens(
        *found, k.cuda(), v.cuda(), **{n: x if x is None else x.cuda() for n, x in places.items()}
    )
    kernels.store_tokens(*stores, k, v, **places)
    for a, b in zip(found, stores, strict=True):
        assert torch.equal(a.cpu().view(torch.uint8), b.view(torch.uint8))


def test_every_bfloat16_is_encoded_like_by_pytorch() -> None:
    """All but NaNs, which stay NaNs."""
    new = torch.arange(65536).to(torch.uint16).view(torch.bfloat16).cuda()
    k = new.view(-1, 1, 128)
    cache = EngineCache(
        LayerPlan("F", SINK),
        1,
        128,
        num_pages=len(k),
        page_size=1,
        num_slots=1,
        max_length=1,
        dtype=FP8,
        device=k.device,
    )
    assert cache.scales is not None
    for scale in (1.0, 0.0371, 7.7):
        cache.scales[0].fill_(scale)
        cache._has_scales[0] = True
        kernels.store_tokens(
            cache.keys[0],
            cache.values[0],
            k,
            k,
            pages=torch.arange(len(k), device="cuda"),
            entries=torch.zeros(len(k), 1, dtype=torch.long, device="cuda"),
            scales=cache.scales[0],
        )
        expected = cache.encode(0, k, k)[0].flatten()
        for stored in (cache.keys[0], cache.values[0]):
            found = stored[: len(k)].flatten()
            same = found.view(torch.uint8) == expected.view(torch.uint8)
            assert (same | new.isnan()).all()
            assert torch.equal(found.float().isnan(), new.isnan())


@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8], ids=["bf16", "fp8"])
@pytest.mark.parametrize(
    "pattern, few", [(SparsePattern.attention_sink(), True), (BOTH, False)], ids=["sink", "both"]
)
def test_launches_of_a_layer(pattern: SparsePattern, few: bool, dtype: torch.dtype) -> None:
    """One stores and one attends; in layers of many keys a third puts the parts together."""
    cache = EngineCache(
        LayerPlan("SF", pattern),
        8,
        128,
        num_pages=64,
        page_size=128,
        num_slots=1,
        max_length=8192,
        dtype=dtype,
        device=torch.device("cuda"),
    )
    q, k, v = (torch.randn(1, n, 128, device="cuda").bfloat16() for n in (32, 8, 8))
    batch = DecodeBatch.of(cache, [5000], [0], [list(range(64))])
    names: list[list[str]] = []
    for layer in range(2):
        for _ in range(2):
            batch.attend(layer, q, k, v, 0.1)
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            batch.attend(layer, q, k, v, 0.1)
            torch.cuda.synchronize()
        on_device = torch.autograd.DeviceType.CUDA
        names.append([e.name for e in profile.events() if e.device_type == on_device])
    # Calls of the driver aren't launches of their own.
    calls = ("cu", "Activity", "Context")
    sparse, full = (sorted(n for n in some if not n.startswith(calls)) for some in names)
    many = ["_part", "_store", "_together"]
    assert sparse == (many[:2] if few else many)
    assert full == many


@pytest.mark.parametrize("pattern", [SINK, STRIDED, BOTH], ids=["sink", "strided", "both"])
def test_recorded_steps_write_what_generate_does(pattern: SparsePattern) -> None:
    """In fp32, so that ties don't matter; sequences come and go, sizes change, nothing is recorded
    twice."""
    # The kernel's products are tf32 otherwise.
    torch.backends.cuda.matmul.allow_tf32 = False
    model = build(pattern=pattern, heads=4, key_value_heads=2)
    prompts = [tokens(n, seed=n).tolist() for n in (3, 47, 1, 90, 20, 64)]
    counts = [40, 25, 60, 30, 20, 35]
    expected = []
    for prompt, count in zip(prompts, counts, strict=True):
        ids = torch.tensor([prompt])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        expected.append(out[0, len(prompt) :].tolist())
    engine = Engine(
        model.cuda(),
        max_length=150,
        max_sequences=4,
        page_size=8,
        prefill_chunk=16,
        max_batched_tokens=64,
    )
    assert engine.decode_runner is not None and engine.decode_runner.capture
    for _ in range(2):
        done = engine.generate(
            prompts, [SamplingParams(max_tokens=n, ignore_eos=True) for n in counts]
        )
        for request, new in zip(done, expected, strict=True):
            # One wrong pair would change nearly all; a tie may turn one sequence.
            assert request.output[:5] == new[:5]
        assert sum(r.output == new for r, new in zip(done, expected, strict=True)) >= 5
        graphs = [buffers.graph for buffers in engine.decode_runner._buffers.values()]
    assert all(graph is not None for graph in graphs)
    assert [b.graph for b in engine.decode_runner._buffers.values()] == graphs


@pytest.mark.parametrize("kv_dtype", [None, "fp8"])
@pytest.mark.parametrize("joins", [False, True])
def test_recorded_steps_equal_unrecorded_ones(
    joins: bool, kv_dtype: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if joins:
        # Slots as small as these are otherwise read by one program.
        for name in ("WHOLE_KEYS", "SPLIT_KEYS"):
            monkeypatch.setattr(f"longgen.engine.splits.{name}", 16)
    model = build(pattern=STRIDED, heads=4, key_value_heads=2).cuda()
    outputs = []
    for capture in (True, False):
        engine = Engine(model, max_length=150, max_sequences=3, page_size=8, kv_dtype=kv_dtype)
        engine.decode_runner = DecodeRunner(model, engine.cache, capture=capture)
        prompts = [tokens(n, seed=n).tolist() for n in (10, 70, 33)]
        done = engine.generate(prompts, SamplingParams(max_tokens=50, ignore_eos=True))
        outputs.append([request.output for request in done])
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("heads", [(8, 8), (8, 2)], ids=["MHA", "GQA"])
@pytest.mark.parametrize(
    "pattern",
    [
        SparsePattern.attention_sink(block_size=128, local_blocks=4),
        SparsePattern(block_size=64, sink_blocks=0, local_blocks=2, stride_blocks=4, head_shift=1),
    ],
    ids=["sink", "strided"],
)
@pytest.mark.parametrize("enforce_eager", [False, True], ids=["recorded", "plain"])
def test_bf16_rounds_no_worse_than_eager(
    pattern: SparsePattern,
    heads: tuple[int, int],
    enforce_eager: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Logits within twice the error that eager transformers makes against fp32, prompts in pieces
    and decoding; greedy texts part at near-ties alone, which are printed."""
    torch.backends.cuda.matmul.allow_tf32 = False
    model = make_model(pattern, heads=heads).cuda()
    prompts = [make_prompt(n) for n in LENGTHS]
    found = compare(model, prompts, 100, 512, enforce_eager=enforce_eager)
    with capsys.disabled():
        print(f"\n{pattern}, {heads} heads, enforce_eager={enforce_eager}\n{found.summary()}")
    found.check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_compiled_conversions_to_eight_bits(dtype: torch.dtype) -> None:
    """Of pieces of any length, in a row or in turn with other heads: the same but for a quotient
    that lies between two numbers, which may go to either."""
    caches = [
        EngineCache(
            LayerPlan("F", SINK),
            4,
            64,
            num_pages=1,
            page_size=1024,
            num_slots=1,
            max_length=1024,
            dtype=FP8,
            device=torch.device("cuda"),
        )
        for _ in range(2)
    ]
    caches[1].compile()
    for length in (1000, 1, 77, 512):
        new = 30 * torch.randn(2, 1, 4, length, 64, device="cuda", dtype=dtype)
        # Beyond what the first piece lets pass.
        new[0, ..., 5] *= 1e4
        pieces = [x[0].transpose(0, 1) for x in new]
        for k, v in (pieces, [x.contiguous() for x in pieces]):
            stored = [cache.encode(0, k, v) for cache in caches]
            for a, b in zip(*stored, strict=True):
                steps = a.view(torch.uint8).int() - b.view(torch.uint8).int()
                assert steps.abs().max() <= 1 and (steps != 0).float().mean() < 1e-3
            back = [cache.decode(0, *(x[None] for x in stored[0]), dtype) for cache in caches]
            for a, b in zip(*back, strict=True):
                assert torch.equal(a, b)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("enforce_eager", [False, True], ids=["recorded", "plain"])
def test_a_gpu_that_is_not_the_current_one(enforce_eager: bool) -> None:
    """One sequence and two, in pieces: as on the first GPU."""
    prompts = [tokens(n, seed=n).tolist() for n in (40, 23)]
    outputs = []
    for index in range(2):
        model = build(pattern=SINK, heads=4, key_value_heads=2).to(f"cuda:{index}")
        settings: dict[str, Any] = {"max_length": 150, "max_sequences": 2, "prefill_chunk": 16}
        engine = Engine(model, enforce_eager=enforce_eager, **settings)
        params = SamplingParams(max_tokens=20, ignore_eos=True)
        done = [*engine.generate(prompts, params), *engine.generate(prompts[:1], params)]
        outputs.append([request.output for request in done])
        assert torch.cuda.current_device() == 0
    assert outputs[0] == outputs[1]
