"""One token of one sequence on an NVIDIA GPU: its kernels, also where they begin early."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from longgen.engine import Engine, SamplingParams, kernels
from longgen.engine.kernels import Places
from longgen.engine.linear import Norm, Rotary, Seen
from longgen.pattern import SparsePattern
from tests.engine.rounding import compare, make_model, make_prompt
from tests.engine.test_kernels import bits
from tests.engine.test_linear import exact_norm
from tests.hf.conftest import build

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

FP8 = torch.float8_e4m3fn
SINK = SparsePattern(block_size=64, sink_blocks=1, local_blocks=4)
STRIDED = SparsePattern(block_size=64, sink_blocks=0, local_blocks=2, stride_blocks=4, head_shift=1)
HAS_BOTH = torch.cuda.is_available() and kernels.overlaps_launches(torch.device("cuda", 0))
WAYS = (False, True) if HAS_BOTH else (False,)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "rows, size",
    [
        ((4096, 1024, 1024), 4096),
        ((4096,), 11008),
        ((32000,), 4096),
        ((576, 192, 192), 576),
        ((97,), 100),
        ((12, 3, 5), 72),
    ],
)
def test_products(rows: tuple[int, ...], size: int, dtype: torch.dtype) -> None:
    """Against fp64, to twice what PyTorch makes of it; the same bits however kernels begin."""
    from longgen.engine.triton_linear import matvec

    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
    draw = {"device": "cuda", "dtype": dtype}
    x, residual = torch.randn(1, size, **draw), torch.randn(1, sum(rows), **draw)
    weights = [torch.randn(count, size, **draw) / size**0.5 for count in rows]
    biases = [torch.randn(count, **draw) for count in rows]
    norm = Norm(torch.rand(size, **draw) + 0.5, 1e-5)
    every = torch.cat(weights)
    exact = exact_norm(x, norm) @ every.double().T + torch.cat(biases).double() + residual.double()
    eager = residual + F.linear(norm.apply(x), every, torch.cat(biases))
    found = [matvec(x, weights, biases, norm=norm, residual=residual, overlaps=way) for way in WAYS]
    budget = 2 * (eager.double() - exact).square().mean().sqrt()
    floor = exact.square().mean().sqrt() * torch.finfo(dtype).eps
    assert (found[0].double() - exact).square().mean().sqrt() <= budget + floor
    assert all(torch.equal(found[0], other) for other in found[1:])
    if len(rows) == 1:
        up = torch.randn_like(weights[0]) / size**0.5
        normed = exact_norm(x, norm)
        exact = F.silu(normed @ weights[0].double().T) * (normed @ up.double().T)
        eager = F.silu(F.linear(norm.apply(x), weights[0])) * F.linear(norm.apply(x), up)
        out = matvec(x, (weights[0], up), (None, None), norm=norm, gated=True)
        budget = 2 * (eager.double() - exact).square().mean().sqrt()
        floor = exact.square().mean().sqrt() * torch.finfo(dtype).eps
        assert (out.double() - exact).square().mean().sqrt() <= budget + floor


@pytest.mark.parametrize("kept", [torch.bfloat16, FP8], ids=["bf16", "fp8"])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
@pytest.mark.parametrize("group", [1, 3, 8])
def test_rotating_while_attending(
    group: int, head_dim: int, normed: bool, kept: torch.dtype
) -> None:
    """In one kernel as in two, wherever the new key belongs and whichever program it falls to."""
    from longgen.engine import triton_decode, triton_store

    torch.manual_seed(0)
    key_heads, size, number = 2, 640, 4
    heads = group * key_heads
    draw = {"device": "cuda", "dtype": torch.bfloat16}
    qkv = torch.randn(number, (heads + 2 * key_heads) * head_dim, **draw)
    angles = torch.randn(number, head_dim // 2, device="cuda").repeat(1, 2)
    norms = [Norm(torch.rand(head_dim, **draw) + 0.5, 1e-5) for _ in range(2)] if normed else []
    rotary = Rotary(angles.cos().bfloat16(), angles.sin().bfloat16(), *norms)
    scales = torch.rand(2, key_heads, device="cuda") + 0.1 if kept == FP8 else None
    stores = list(torch.randn(2, 12, size + 1, key_heads, head_dim, **draw).to(kept).unbind())
    slots = torch.tensor([4, 0, 7, 3], device="cuda")
    entries = torch.tensor([[0], [333], [639], [size]], device="cuda")
    visible = torch.rand(number, 1, size, device="cuda") < 0.7
    visible[:3].scatter_(2, entries[:3, :, None], True)
    visible[3] = False
    arrivals = torch.zeros(number, key_heads, dtype=torch.int32, device="cuda")
    tables = torch.tensor([[4, 1], [2, 5], [6, 8], [9, 9]], device="cuda", dtype=torch.int32)
    lengths = torch.tensor([641, 1, 1280, 0], device="cuda")
    last = (lengths - 1).clamp(min=0)
    pages = tables.gather(1, (last // size)[:, None]).long()[:, 0]
    for places, seen in (
        (Places(slots, entries), Seen(slots[:, None], size, None, visible, arrivals)),
        (Places(pages, (last % size)[:, None]), Seen(tables, size, lengths)),
    ):
        expected = [store.clone() for store in stores]
        held = [store[:, :size] for store in expected]
        for splits in (None, 1, 5):
            q = triton_store.rotate_and_store(
                *expected, qkv, rotary, heads, places, scales, overlaps=False
            )
            wanted = triton_decode.paged_decode(
                q,
                *held,
                seen.tables,
                0.1,
                seen.lengths,
                seen.visible,
                splits,
                scales=scales,
                arrivals=seen.arrivals,
                overlaps=False,
            )
            results = []
            for way in WAYS:
                found = [store.clone() for store in stores]
                out = triton_decode.rotate_and_attend(
                    *found, qkv, rotary, heads, places, seen, 0.1, scales, way, splits
                )
                assert torch.allclose(out.float(), wanted.float(), atol=2e-2, rtol=2e-2)
                # What the last row, no sequence's, writes nobody reads.
                rows = [row for row in range(12) if row not in (3, 9)]
                assert torch.equal(bits(found[1][rows]), bits(expected[1][rows]))
                a, b = (x[rows].float() for x in (found[0], expected[0]))
                assert torch.allclose(a, b, rtol=0.13 if kept == FP8 else 1e-2, atol=1e-2)
                assert not arrivals.any()
                results.append([out, *(bits(store) for store in found)])
            for other in results[1:]:
                assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.skipif(not HAS_BOTH, reason="this GPU's kernels begin one after the other")
@pytest.mark.parametrize("kv_dtype", [None, "fp8"])
@pytest.mark.parametrize("pattern", [SINK, STRIDED], ids=["sink", "strided"])
def test_kernels_that_begin_early_change_nothing(
    pattern: SparsePattern, kv_dtype: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hundreds of recorded steps whose kernels are too short to hide a race: the same bits."""
    model = build(
        pattern=pattern,
        layers="SSFSFSSF",
        heads=16,
        key_value_heads=4,
        head_dim=64,
        hidden_size=1024,
        intermediate_size=2048,
        vocab_size=2048,
        max_position_embeddings=4096,
        initializer_range=0.05,
    ).to("cuda", torch.bfloat16)
    prompt = make_prompt(900)
    texts, scales = [], []
    for way in (True, False):
        monkeypatch.setattr(kernels, "overlaps_launches", lambda device, way=way: way)
        engine = Engine(model, max_length=2000, max_sequences=1, kv_dtype=kv_dtype)
        params = SamplingParams(max_tokens=600, ignore_eos=True)
        texts += [request.output for _ in range(2) for request in engine.generate([prompt], params)]
        assert engine.decode_runner is not None and engine.decode_runner._one_token
        scales.append(torch.stack(engine.cache.scales or [torch.ones(1)]))
    assert torch.equal(*scales)
    assert len(set(texts[0])) > 20
    assert all(text == texts[0] for text in texts)


@pytest.mark.parametrize("number", [1, 3])
def test_logits_outlast_a_pass_that_began_ahead(number: int) -> None:
    model = build(pattern=SINK, heads=4, key_value_heads=2).to("cuda")
    results = []
    for ahead in (False, True):
        engine = Engine(model, max_length=512, max_sequences=number, page_size=128)
        runner = engine.decode_runner
        assert runner is not None and runner.capture
        generator = torch.Generator("cuda").manual_seed(0)
        for store in (*engine.cache.keys, *engine.cache.values):
            store.normal_(generator=generator)
        rows = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]][:number]
        token, found = [5] * number, []
        for length in range(300, 320):
            slots = list(range(number))
            logits, token = runner(token, [length] * number, slots, rows, ahead=ahead)
            assert token == logits.argmax(-1).tolist()
            found.append(logits.clone())
        results.append(torch.stack(found))
    assert torch.equal(*results)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("pattern", [SINK, STRIDED], ids=["sink", "strided"])
def test_bf16_rounds_no_worse_than_eager(
    pattern: SparsePattern, family: str, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    model = make_model(pattern, family).cuda()
    prompt = make_prompt(900)
    found = compare(model, [prompt], 100, 512)
    with capsys.disabled():
        print(f"\n{family}, {pattern}\n{found.summary()}")
    found.check()
