"""Compiled layers compute the same, in as few graphs as said."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from longgen.engine import Engine, SamplingParams
from longgen.hf.compile import compile_layers
from tests.hf.conftest import STRIDED, build, tokens


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> CompileCounterWithBackend:
    """Trace, but leave out the compiler behind it, which takes a minute on a CPU."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compile_function = torch.compile

    def trace(function: Any, *, dynamic: bool, options: dict[str, Any]) -> Any:
        assert options
        return compile_function(function, dynamic=dynamic, backend=counter)

    monkeypatch.setattr(torch, "compile", trace)
    return counter


def test_layers_share_their_graphs(graphs: CompileCounterWithBackend) -> None:
    model = build(pattern=STRIDED, heads=4, key_value_heads=2)
    prompts = [tokens(n, seed=n).tolist() for n in (30, 70, 33)]

    def outputs() -> list[Any]:
        engine = Engine(
            model,
            max_length=150,
            max_sequences=3,
            page_size=8,
            prefill_chunk=16,
            max_batched_tokens=64,
        )
        done = engine.generate(prompts, SamplingParams(max_tokens=20, ignore_eos=True))
        return [request.output for request in done]

    plain = outputs()
    compile_layers(model)
    assert outputs() == plain
    # Six graphs for many tokens, six for one, however many layers there are.
    assert graphs.frame_count == 12
    compile_layers(model)
    assert outputs() == plain
    assert graphs.frame_count == 12


def test_a_copy_of_a_compiled_model_has_its_own_weights(graphs: CompileCounterWithBackend) -> None:
    model = build(pattern=STRIDED)
    compile_layers(model)
    other = copy.deepcopy(model)
    down = other.model.layers[0].mlp.down_proj
    with torch.no_grad():
        down.weight.zero_()
        assert not down(torch.ones(1, 1, down.in_features)).any()
