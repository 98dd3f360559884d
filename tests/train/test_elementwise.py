"""What lies between matrix products: compiled, and in the format that autocast computes in."""

from __future__ import annotations

import inspect
import logging
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile

from longgen.train.elementwise import (
    _ROTARY,
    _fuse_rotary,
    compile_elementwise,
    norms_follow_autocast,
)
from tests.train.test_products import gradients, make_model
from tests.weighing import SMALL, stand_in

CLONE = "aten::clone"
FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]


@pytest.fixture(autouse=True)
def nothing_is_compiled_yet() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("mode", ["off", "elementwise", "selective"])
@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_layers_have_the_same_gradients(family: str, mode: str) -> None:
    expected = gradients(make_model(mode, family))
    model = make_model(mode, family)
    compile_elementwise(model)
    for one, other in zip(gradients(model), expected, strict=True):
        assert one is not None and other is not None
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_rotates_in_a_compiled_function(family: str) -> None:
    model = make_model("off", family)
    other = make_model("off", family)
    compile_elementwise(model)
    for layer, untouched in zip(model.model.layers, other.model.layers, strict=True):
        own = layer.self_attn.forward.__globals__[_ROTARY]
        plain = inspect.unwrap(type(untouched.self_attn).forward).__globals__[_ROTARY]
        inner = inspect.getclosurevars(own).nonlocals["compiled"]
        assert hasattr(inner, "_torchdynamo_orig_callable")
        assert not hasattr(plain, "_torchdynamo_orig_callable")


def test_attention_that_rotates_otherwise_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    class Own(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    modules = [Own(), Own()]
    with caplog.at_level(logging.WARNING):
        for module in modules:
            _fuse_rotary(module)
    said = "Own.forward does not rotate by transformers' apply_rotary_pos_emb"
    assert caplog.text.count(said) == 1
    assert all("forward" not in vars(module) for module in modules)


@pytest.mark.parametrize(("family", "graphs"), [("llama", 3), ("qwen3", 4)])
def test_norms_rotation_and_gate_are_one_graph_each(family: str, graphs: int) -> None:
    """A norm with its cast; Qwen3's norms of heads have another shape."""
    counters.clear()
    model = make_model("elementwise", family, autocast=True)
    compile_elementwise(model)
    gradients(model, True)
    assert counters["stats"]["unique_graphs"] == graphs and not counters["graph_break"]


def test_queries_and_keys_are_not_copied_from_one_layout_to_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stand_in(monkeypatch)
    copies = {}
    for compiled in (False, True):
        model = make_model("elementwise", autocast=True)
        if compiled:
            compile_elementwise(model)
        gradients(model, True)
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
            gradients(model, True)
        found = [event.input_shapes[0] for event in recorded.events() if event.name == CLONE]
        copies[compiled] = sum(len(shape) == 4 for shape in found)
    assert copies == {False: 2 * len(model.model.layers), True: 0}


def test_norms_give_what_autocast_computes_in() -> None:
    given: dict[str, torch.dtype] = {}
    model = make_model("off", "qwen3")
    norms_follow_autocast(model)
    for name, module in model.named_modules():
        if name.endswith("norm"):
            module.register_forward_hook(
                lambda module, args, out, name=name: given.__setitem__(name, out.dtype)
            )
    ids = torch.arange(64)[None] % SMALL.vocab_size
    for autocast, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            model(ids, shift_labels=ids, use_cache=False)
        assert len(given) == 4 * len(model.model.layers) + 1
        assert set(given.values()) == {dtype}


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_norm_and_its_cast_are_one_graph_for_all_layers(family: str) -> None:
    model = make_model("off", family, autocast=True)
    compile_elementwise(model)
    counters.clear()
    x = torch.randn(1, 16, SMALL.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    for layer in model.model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            with torch.autocast("cpu", torch.bfloat16):
                assert norm(x).dtype == torch.bfloat16
    assert counters["stats"]["unique_graphs"] == 1


def test_what_enters_products_is_the_same_under_autocast() -> None:
    """The loss is the same bits; gradients of what several projections share are added in bf16."""
    plain, following = make_model("off"), make_model("off", autocast=True)
    ids = torch.randint(0, SMALL.vocab_size, (1, 256), generator=torch.manual_seed(0))
    losses = []
    for model in (plain, following):
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(float(model(ids, shift_labels=ids, use_cache=False).loss.detach()))
    assert losses[0] == losses[1]
    exact = gradients(make_model("off"))
    for found in (gradients(plain, True), gradients(following, True)):
        for one, other in zip(found, exact, strict=True):
            assert one is not None and other is not None
            assert (one - other).norm() <= 0.03 * other.norm()
