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


def test_a_few_sequences_go_the_same_way(
    build: Make, tokens: Make, pattern: SparsePattern, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("qwen3", pattern=pattern, heads=4, key_value_heads=2)
    prompts = [tokens(n, seed=n).tolist() for n in (1, 37, 12, 20, 9)]
    texts_of = []
    for most in (1, 3):
        monkeypatch.setattr(one_token, "MOST_TOKENS", most)
        numbers: list[int] = []
        logits_of = one_token.logits_of

        def counted(*args: Any, numbers: list[int] = numbers, do: Any = logits_of) -> Any:
            numbers.append(len(args[2]))
            return do(*args)

        monkeypatch.setattr(one_token, "logits_of", counted)
        engine = Engine(model, max_length=120, max_sequences=3, page_size=8)
        engine.decode_runner = DecodeRunner(model, engine.cache, capture=False)
        done = engine.generate(prompts, SamplingParams(max_tokens=30, ignore_eos=True))
        texts_of.append([request.output for request in done])
        assert set(numbers) <= {1} if most == 1 else {2, 3} <= set(numbers)
        monkeypatch.setattr(one_token, "logits_of", logits_of)
    assert texts_of[0] == texts_of[1]


def test_logits_are_the_same(build: Make, tokens: Make) -> None:
    """Of Qwen2, which has biases, with ones of the output projection as well."""
    model = build("llama", attention_bias=True, tie_word_embeddings=True)
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


def test_models_that_go_the_usual_way(build: Make, tokens: Make) -> None:
    def changed(change: Callable[[Any], None], **fields: Any) -> Any:
        model = build(**fields)
        change(model)
        return model

    def replace(model: Any) -> None:
        down = model.model.layers[1].mlp.down_proj
        model.model.layers[1].mlp.down_proj = Other(down.in_features, down.out_features, bias=False)

    def transpose(model: Any) -> None:
        weight = model.model.layers[0].self_attn.o_proj.weight
        weight.data = weight.data.T.contiguous().T

    assert one_token.can_run(build())
    prompts = [tokens(9).tolist()]
    for model in (
        build(hidden_act="gelu"),
        build(mlp_bias=True),
        changed(replace),
        changed(transpose),
    ):
        assert not one_token.can_run(model)
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
