"""Matrix products that run once in a layer that is computed again."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import set_checkpoint_early_stop

from longgen.attention.keep import within
from longgen.bench.models import planned_config, random_model, shape_config
from longgen.pattern import SparsePattern
from longgen.plan import LayerPlan
from longgen.train import products
from longgen.train.elementwise import norms_follow_autocast
from longgen.train.products import keep_products_of
from longgen.train.recompute import set_recompute
from tests.weighing import SMALL

LAYERS = 3
PLAN = LayerPlan.build(LAYERS, "middle:1", SparsePattern(block_size=16, local_blocks=2))
# Queries, keys, values and output of attention; gate, up and down.
PRODUCTS = 7


def make_model(mode: str, family: str = "llama", autocast: bool = False) -> Any:
    shape = replace(SMALL, model_type=family, num_hidden_layers=LAYERS)
    config = planned_config(shape_config(shape, 256), PLAN)
    model = random_model(config, dtype=torch.float32, device=torch.device("cpu"), seed=0).train()
    set_recompute(model, mode)
    if autocast:
        norms_follow_autocast(model)
    return model


def gradients(model: Any, autocast: bool = False) -> list[torch.Tensor | None]:
    ids = torch.randint(0, SMALL.vocab_size, (1, 256), generator=torch.manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(ids, shift_labels=ids, use_cache=False, num_items_in_batch=256).loss
    loss.backward()
    return [p.grad for p in model.parameters()]


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Count the products that are computed in layers."""
    calls = 0

    class Counting:
        def linear(self, *args: Any) -> torch.Tensor:
            nonlocal calls
            calls += 1
            return F.linear(*args)

    monkeypatch.setattr(products, "F", Counting())
    return lambda: calls


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("early_stop", [True, False], ids=["", "to-the-end"])
def test_gradients_are_the_same_bits_and_products_run_once(
    family: str, autocast: bool, early_stop: bool, count: Callable[[], int]
) -> None:
    expected = gradients(make_model("off", family, autocast), autocast)
    assert count() == 0
    with nullcontext() if early_stop else set_checkpoint_early_stop(False):
        found = gradients(make_model("elementwise", family, autocast), autocast)
    assert count() == PRODUCTS * LAYERS
    for one, other in zip(found, expected, strict=True):
        assert one is not None and other is not None
        assert one.dtype == torch.float32 and torch.equal(one, other)


def test_weights_that_do_not_learn_get_no_gradients(count: Callable[[], int]) -> None:
    found = []
    for mode in ("off", "elementwise"):
        model = make_model(mode, "qwen2")
        for layer in model.model.layers:
            layer.mlp.requires_grad_(False)
            layer.self_attn.q_proj.bias.requires_grad_(False)
        found.append(gradients(model))
    assert count() == PRODUCTS * LAYERS
    for one, other in zip(*found, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)


def test_passes_may_overlap_and_fail() -> None:
    """Two forward passes before a backward pass, one that is taken twice, one that breaks off."""

    def broken(*args: Any) -> None:
        raise RuntimeError("no more")

    found = []
    for mode in ("off", "elementwise"):
        model = make_model(mode, "qwen2")
        first, second = (
            model(ids, shift_labels=ids, use_cache=False, num_items_in_batch=96).loss
            for ids in (torch.arange(96)[None], torch.arange(64)[None])
        )
        hook = model.model.layers[1].mlp.register_forward_hook(broken)
        with pytest.raises(RuntimeError, match="no more"):
            gradients(model)
        hook.remove()
        assert within() is None
        second.backward(retain_graph=True)
        first.backward()
        second.backward()
        found.append([p.grad for p in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_without_gradients_products_are_what_they_were(count: Callable[[], int]) -> None:
    ids = torch.arange(64)[None] % SMALL.vocab_size
    logits = []
    for mode in ("off", "elementwise"):
        model = make_model(mode)
        with torch.no_grad():
            logits.append(model(ids, use_cache=False).logits)
        logits.append(model.eval()(ids, use_cache=False).logits)
    assert all(torch.equal(one, logits[0]) for one in logits)


def test_products_that_are_their_own_affair_are_refused() -> None:
    class Own(torch.nn.Linear):
        pass

    model = make_model("off")
    model.model.layers[1].mlp.up_proj = Own(64, 160, bias=False)
    with pytest.raises(TypeError, match="Own computes its product by itself"):
        keep_products_of(model)
