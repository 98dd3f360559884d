import numpy as np
import pytest
import torch

from longgen.bench.work import PATTERNS, Heads, Work, attention_flops, token_window
from longgen.errors import UsageError
from longgen.layout import Layout
from longgen.pattern import SparsePattern

SHAPE = Heads(heads=6, kv_heads=3, head_dim=32)


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("length", [700, 5000])
def test_flops_count_what_the_mask_shows(name: str, length: int) -> None:
    pattern = PATTERNS[name]
    mask = Layout.causal(length).dense_mask(pattern, SHAPE.kv_heads)
    pairs = int(mask.sum()) * (1 if mask.shape[1] == SHAPE.kv_heads else SHAPE.kv_heads)
    # Each key/value head serves two query heads; two products of 2 FLOPs for each element.
    forward = 2 * pairs * 2 * 2 * SHAPE.head_dim
    assert attention_flops(pattern, length, SHAPE, "forward") == pytest.approx(forward, rel=1e-12)
    assert attention_flops(pattern, length, SHAPE, "backward") == pytest.approx(2.5 * forward)


def test_the_issues_patterns() -> None:
    sink, strided = PATTERNS["sink"], PATTERNS["strided"]
    assert sink.local_blocks * sink.block_size == 4096
    assert sink.sink_blocks * sink.block_size == 128
    assert strided.local_blocks * strided.block_size == 1024
    assert (strided.stride_blocks, strided.head_shift) == (16, 1)
    assert PATTERNS["full"].is_full


@pytest.mark.parametrize("kind", ["sink_2k", "strided_2k"])
def test_blocks_of_64_and_128_keep_about_the_same(kind: str) -> None:
    pairs = [
        PATTERNS[name].mean_visible_pairs(131072, 32) / 131072 for name in (kind, f"{kind}_64")
    ]
    assert PATTERNS[kind].block_size == 2 * PATTERNS[f"{kind}_64"].block_size
    assert pairs[0] == pytest.approx(pairs[1], rel=0.05)


@pytest.mark.parametrize("sink", [True, False])
def test_a_token_window_slides(sink: bool) -> None:
    blocks = SparsePattern(block_size=8, sink_blocks=1, local_blocks=3)
    window = token_window(blocks, sink=sink)
    q, k = np.arange(100)[:, None], np.arange(100)[None]
    expected = (k <= q) & ((q - k < 24) | ((k < 8) & sink))
    assert (window.visible(q, k) == expected).all()
    assert window.visible_pairs(100) == expected.sum()


def test_heads_must_fit() -> None:
    with pytest.raises(UsageError, match="10 query heads are not a multiple of 4"):
        Heads(heads=10, kv_heads=4)
    with pytest.raises(UsageError, match="head_dim is 0"):
        Heads(head_dim=0)
    assert str(Heads(heads=32, kv_heads=8)) == "32/8 heads x 128"


def test_case_names_are_stable() -> None:
    work = Work(name="sink", pattern=PATTERNS["sink"], length=1, shape=SHAPE, dtype=torch.bfloat16)
    assert work.case("forward") == "attention.sink.forward"
