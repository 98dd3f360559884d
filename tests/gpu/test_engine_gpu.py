"""The engine on one NVIDIA GPU: the split-KV kernel, and decoding steps recorded in CUDA graphs."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from longgen.engine import Engine, SamplingParams, kernels
from longgen.engine.runner import DecodeRunner
from longgen.pattern import SparsePattern
from tests.hf.conftest import SINK, STRIDED, build, tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

BOTH = SparsePattern(block_size=3, sink_blocks=2, local_blocks=2, stride_blocks=2, head_shift=3)


@pytest.mark.parametrize("group", [1, 3, 4, 8])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
def test_decoding_kernel(group: int, head_dim: int) -> None:
    """Against fp64, to twice what PyTorch makes of the same numbers in their own precision."""
    torch.manual_seed(0)
    for dtype, page_size in itertools.product((torch.bfloat16, torch.float16), (16, 128)):
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
            for splits in (None, 1, 7):
                found = kernels.decode_attention(
                    q, keys, values, tables, num_splits=splits, **settings
                )
                error = (found.double() - exact).square().mean().sqrt()
                assert error <= budget + exact.square().mean().sqrt() * torch.finfo(dtype).eps / 2


def test_keys_in_fp8() -> None:
    torch.manual_seed(0)
    q = torch.randn(3, 8, 128, device="cuda", dtype=torch.bfloat16)
    keys, values = torch.randn(2, 12, 128, 2, 128, device="cuda").to(torch.float8_e4m3fn)
    tables = torch.arange(12, device="cuda").view(3, 4)
    lengths = torch.tensor([512, 100, 300], device="cuda")
    found = kernels.decode_attention(q, keys, values, tables, scale=0.1, lengths=lengths)
    exact = kernels._plain(q, keys, values, tables, 0.1, lengths, None)
    assert torch.allclose(found.float(), exact.float(), atol=2e-2, rtol=2e-2)


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


def test_recorded_steps_equal_unrecorded_ones() -> None:
    model = build(pattern=STRIDED, heads=4, key_value_heads=2).cuda()
    outputs = []
    for capture in (True, False):
        engine = Engine(model, max_length=150, max_sequences=3, page_size=8)
        engine.decode_runner = DecodeRunner(model, engine.cache, capture=capture)
        prompts = [tokens(n, seed=n).tolist() for n in (10, 70, 33)]
        done = engine.generate(prompts, SamplingParams(max_tokens=50, ignore_eos=True))
        outputs.append([request.output for request in done])
    assert outputs[0] == outputs[1]
