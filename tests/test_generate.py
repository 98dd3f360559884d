"""Generation from long prompts: text comes as it is written, and times are those of the tokens."""

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, PreTrainedTokenizerFast

from longgen.generate import Sampling, generate_text
from longgen.hf import HybridCache
from longgen.pattern import SparsePattern
from longgen.plan import LayerPlan

PREFILL_SECONDS, TOKEN_SECONDS = 0.06, 0.02


class Scripted:
    """Write given tokens at a given pace."""

    device = torch.device("cpu")

    def __init__(self, tokens: list[int], seen: list[str]) -> None:
        self.tokens, self.seen = tokens, seen
        self.generation_config = GenerationConfig(eos_token_id=1, temperature=9.0, do_sample=True)
        self.heard: list[str] = []
        self.options: dict[str, Any] = {}

    def generate(self, prompt: torch.Tensor, streamer: Any, **options: Any) -> Any:
        self.options = {**options, "config": self.generation_config}
        streamer.put(prompt)
        time.sleep(PREFILL_SECONDS - TOKEN_SECONDS)
        for token in self.tokens:
            time.sleep(TOKEN_SECONDS)
            streamer.put(torch.tensor([token]))
            self.heard.append("".join(self.seen))
        streamer.end()
        cache = HybridCache(LayerPlan("SF", SparsePattern()))
        return SimpleNamespace(
            sequences=torch.cat([prompt, torch.tensor([self.tokens])], 1), past_key_values=cache
        )


@pytest.fixture
def scripted(tiny_tokenizer: PreTrainedTokenizerFast) -> tuple[Scripted, list[str]]:
    seen: list[str] = []
    return Scripted(tiny_tokenizer("on the mill")["input_ids"], seen), seen


def test_words_are_handed_over_as_soon_as_they_are_whole(
    scripted: tuple[Scripted, list[str]], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model, seen = scripted
    figures = generate_text(model, tiny_tokenizer, [5, 6, 7], max_new_tokens=9, write=seen.append)
    assert "".join(seen) == figures["text"] == "on the mill"
    # The tokens are o, n, " the", " ", m, ...: a word is whole when the next one begins.
    assert model.heard[:5] == ["", "", "on ", "on the ", "on the "]
    assert (figures["prompt_tokens"], figures["new_tokens"]) == (3, len(model.tokens))


def test_prefill_ends_with_the_first_token(
    scripted: tuple[Scripted, list[str]], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model, _ = scripted
    figures = generate_text(model, tiny_tokenizer, [5], max_new_tokens=9)
    assert figures["prefill_seconds"] >= PREFILL_SECONDS
    assert 0 < figures["tokens_per_second"] <= 1 / TOKEN_SECONDS
    model.tokens = model.tokens[:1]
    assert generate_text(model, tiny_tokenizer, [5], max_new_tokens=1)["tokens_per_second"] is None


def test_only_what_was_asked_for_is_sampled(
    scripted: tuple[Scripted, list[str]], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model, _ = scripted
    own = model.generation_config
    generate_text(model, tiny_tokenizer, [5], max_new_tokens=9, prefill_chunk=4)
    assert model.options["do_sample"] is False and "temperature" not in model.options
    assert model.options["prefill_chunk_size"] == 4
    assert model.options["config"].temperature is None or model.options["config"].temperature == 1
    assert model.options["config"].eos_token_id == 1
    assert model.generation_config is own
    sampling = Sampling(temperature=0.5, top_k=3)
    generate_text(model, tiny_tokenizer, [5], max_new_tokens=9, sampling=sampling)
    assert model.options["do_sample"] is True
    assert {name: model.options[name] for name in ("temperature", "top_p", "top_k")} == {
        "temperature": 0.5,
        "top_p": 1.0,
        "top_k": 3,
    }
