"""One token of one sequence, by its own way through the model: the same texts as transformers'."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from longgen.engine import Engine, SamplingParams, one_token
from longgen.engine.runner import DecodeRunner
from longgen.hf import FAMILIES
from longgen.hf import compile as compiling
from longgen.pattern import SparsePattern

Make = Callable[..., Any]


def texts(model: Any, prompts: list[list[int]], way: Callable[[Any], None], **fields: Any) -> Any:
    engine = Engine(model, max_length=120, max_sequences=1, page_size=8, **fields)
    engine.decode_runner = DecodeRunner(model, engine.cache, capture=False)
    way(engine.decode_runner)
    done = engine.generate(prompts, SamplingParams(max_tokens=40, ignore_eos=True))
    return [request.output for request in done]


@pytest.mark.parametrize("kv_dtype", [None, "fp8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_texts_are_the_same(
    build: Make,
    tokens: Make,
    pattern: SparsePattern,
    family: str,
    kv_dtype: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = build(family, pattern=pattern, heads=4, key_value_heads=2)
    prompts = [tokens(n, seed=n).tolist() for n in (1, 37)]
    calls = []
    logits_of = one_token.logits_of
    monkeypatch.setattr(
        one_token, "logits_of", lambda *args: calls.append(len(args[2])) or logits_of(*args)
    )
    found = texts(model, prompts, lambda runner: None, kv_dtype=kv_dtype)
    # All but the tokens that a prompt brings.
    assert calls == [1] * sum(len(output) - 1 for output in found)

    def other(runner: Any) -> None:
        runner._one_token = False

    assert texts(model, prompts, other, kv_dtype=kv_dtype) == found
    assert len(calls) == sum(len(output) - 1 for output in found)


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize(
    "family, fields",
    [
        # Biases like those of Qwen2, and of the output projection as well.
        ("llama", {"attention_bias": True, "tie_word_embeddings": True}),
        ("qwen3", {"attention_bias": True, "heads": 6, "key_value_heads": 1}),
        ("llama", {"head_dim": 6, "heads": 3, "key_value_heads": 3}),
        ("llama", {"rope_parameters": {"rope_theta": 1e3, **LLAMA3}}),
        # Its rotation has a length, too.
        ("mistral", {"rope_parameters": {"rope_theta": 1e3, **YARN}}),
        ("qwen2", {"rope_parameters": {"rope_theta": 1e3, "rope_type": "linear", "factor": 2.0}}),
    ],
)
def test_logits_are_the_same(
    build: Make, tokens: Make, family: str, fields: dict[str, Any]
) -> None:
    model = build(family, **fields)
    assert one_token.can_run(model)
    steps = []
    for way in (True, False):
        engine = Engine(model, max_length=60, max_sequences=1, page_size=8)
        runner = DecodeRunner(model, engine.cache, capture=False)
        runner._one_token = way
        logits = []
        for length, token in enumerate(tokens(30).tolist(), start=1):
            table = list(range(-(-length // 8)))
            logits.append(runner([token], [length], [0], [table])[0].clone())
        steps.append(torch.cat(logits))
    assert torch.allclose(*steps, atol=1e-4)


class Other(nn.Linear):
    """Something that is more than a product."""


class Packed(torch.Tensor):
    """A weight that is more than its numbers, as quantised ones are."""


class Normed(nn.LayerNorm):
    """Another norm."""


def replace(model: Any) -> None:
    down = model.model.layers[1].mlp.down_proj
    model.model.layers[1].mlp.down_proj = Other(down.in_features, down.out_features, bias=False)


def transpose(model: Any) -> None:
    weight = model.model.layers[0].self_attn.o_proj.weight
    weight.data = weight.data.T.contiguous().T


def pack(model: Any) -> None:
    product = model.model.layers[2].self_attn.q_proj
    product.weight = nn.Parameter(product.weight.detach().as_subclass(Packed))


def bias_up(model: Any) -> None:
    model.model.layers[0].mlp.up_proj.bias = nn.Parameter(torch.rand(48))


def bias_keys(model: Any) -> None:
    model.model.layers[0].self_attn.k_proj.bias = nn.Parameter(torch.rand(16))


def norm_otherwise(model: Any) -> None:
    model.model.layers[0].post_attention_layernorm = Normed(32)


def gate_otherwise(model: Any) -> None:
    model.model.layers[0].mlp.act_fn = nn.Tanh()


def hook(model: Any) -> None:
    model.model.layers[1].self_attn.register_forward_hook(lambda _, __, out: (2 * out[0], out[1]))


def hook_before(model: Any) -> None:
    model.lm_head.register_forward_pre_hook(lambda _, given: (given[0].flip(-1),))


def wrap(model: Any) -> None:
    layer = model.model.layers[0]
    layer.forward = lambda x, **rest: 0.5 * type(layer).forward(layer, x, **rest)


@pytest.mark.parametrize(
    "change, fields",
    [
        (None, {"hidden_act": "gelu"}),
        (None, {"mlp_bias": True}),
        (replace, {}),
        (transpose, {}),
        (pack, {}),
        (bias_up, {}),
        (bias_keys, {}),
        (norm_otherwise, {}),
        (gate_otherwise, {}),
        (hook, {}),
        (hook_before, {}),
        (wrap, {}),
    ],
)
def test_models_that_go_the_usual_way(
    build: Make, tokens: Make, change: Callable[[Any], None] | None, fields: dict[str, Any]
) -> None:
    model = build(**fields)
    if change is not None:
        assert one_token.can_run(model)
        change(model)
    assert not one_token.can_run(model)
    prompts = [tokens(9).tolist()]
    ids = torch.tensor(prompts)
    usual = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=40,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert texts(model, prompts, lambda runner: None) == [usual[0, 9:].tolist()]


def test_hooks_that_do_nothing_here_are_let_be(build: Make, tokens: Make) -> None:
    """Of layers that are compiled, and those that transformers leaves where it noted something."""
    model = build()
    states = model(tokens(5)[None], output_hidden_states=True).hidden_states
    assert len(states) == 4 and model.model.layers[0]._forward_hooks
    compiling.compile_layers(model)
    assert model.model.layers[0].mlp.down_proj._forward_pre_hooks
    assert one_token.can_run(model)
