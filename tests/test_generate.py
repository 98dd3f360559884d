"""Generation from long prompts: text comes as it is written, and times are those of the tokens."""

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from longgen import generate as generate_module
from longgen.checkpoint import load_model
from longgen.convert import convert
from longgen.engine import SamplingParams
from longgen.engine import engine as engine_module
from longgen.errors import UsageError
from longgen.generate import generate_text
from longgen.hf import CACHE_NAME, HybridCache
from longgen.pattern import SparsePattern
from longgen.plan import LayerPlan

PREFILL_SECONDS, TOKEN_SECONDS = 0.06, 0.02
PROMPT = [5, 6, 7] * 30
PLAN = LayerPlan("SFS", SparsePattern(block_size=16, sink_blocks=1, local_blocks=2))


class Scripted:
    """Write given tokens at a given pace, as transformers does."""

    device = torch.device("cpu")
    config = LlamaConfig()

    def __init__(self, tokens: list[int], seen: list[str]) -> None:
        self.tokens, self.seen = tokens, seen
        self.generation_config = GenerationConfig(eos_token_id=1, temperature=9.0, do_sample=True)
        self.heard: list[str] = []
        self.options: dict[str, Any] = {}

    def generate(self, prompt: torch.Tensor, stopping_criteria: Any, **options: Any) -> Any:
        self.options = {**options, "config": self.generation_config}
        time.sleep(PREFILL_SECONDS - TOKEN_SECONDS)
        written = prompt
        for token in self.tokens:
            time.sleep(TOKEN_SECONDS)
            written = torch.cat([written, torch.tensor([[token]])], 1)
            is_done = any([bool(stops(written, None)) for stops in stopping_criteria])
            self.heard.append("".join(self.seen))
            if is_done:
                # As transformers does where it reads the end a step late.
                for stops in stopping_criteria:
                    assert bool(stops(torch.cat([written, written[:, :1]], 1), None))
                break
        cache = HybridCache(LayerPlan("SF", SparsePattern()))
        return SimpleNamespace(sequences=written, **{CACHE_NAME: cache})


@pytest.fixture
def scripted(tiny_tokenizer: PreTrainedTokenizerFast) -> tuple[Scripted, list[str]]:
    seen: list[str] = []
    return Scripted(tiny_tokenizer("on the mill")["input_ids"], seen), seen


@pytest.fixture(scope="module")
def hybrid(make_checkpoint: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a hybrid of 1,024 tokens."""
    folder = tmp_path_factory.mktemp("hybrid")
    convert(make_checkpoint(folder / "base"), folder / "hybrid", PLAN, context=1024)
    return load_model(folder / "hybrid", device="cpu")


def test_text_is_handed_over_as_soon_as_it_is_final(
    scripted: tuple[Scripted, list[str]], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model, seen = scripted
    params = SamplingParams(max_tokens=len(model.tokens))
    figures = generate_text(model, tiny_tokenizer, [5, 6, 7], params, write=seen.append)
    assert "".join(seen) == figures["text"] == "on the mill"
    # The tokens are o, n, " the", " ", m, ...
    assert model.heard[:5] == ["o", "on", "on the", "on the ", "on the m"]
    assert (figures["prompt_tokens"], figures["new_tokens"]) == (3, len(model.tokens))
    assert (figures["runtime"], figures["finish_reason"]) == ("transformers", "length")


@pytest.mark.parametrize(("stop", "text"), [(" the", "on"), ("ll", "on the mi"), ("x", None)])
def test_text_ends_before_a_stop_string(
    scripted: tuple[Scripted, list[str]],
    tiny_tokenizer: PreTrainedTokenizerFast,
    stop: str,
    text: str | None,
) -> None:
    model, seen = scripted
    params = SamplingParams(max_tokens=len(model.tokens), stop=(stop, "mill and more"))
    figures = generate_text(model, tiny_tokenizer, [5], params, write=seen.append)
    assert "".join(seen) == figures["text"] == (text or "on the mill")
    assert figures["finish_reason"] == ("stop" if text else "length")
    assert (figures["new_tokens"] < len(model.tokens)) == (stop == " the")


def test_prefill_ends_with_the_first_token(
    scripted: tuple[Scripted, list[str]], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model, _ = scripted
    figures = generate_text(model, tiny_tokenizer, [5], SamplingParams(max_tokens=9))
    assert figures["prefill_seconds"] >= PREFILL_SECONDS
    assert 0 < figures["tokens_per_second"] <= 1 / TOKEN_SECONDS
    model.tokens = model.tokens[:1]
    figures = generate_text(model, tiny_tokenizer, [5], SamplingParams(max_tokens=1))
    assert figures["tokens_per_second"] is None


def test_only_what_was_asked_for_is_sampled(
    scripted: tuple[Scripted, list[str]], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model, _ = scripted
    own = model.generation_config
    generate_text(model, tiny_tokenizer, [5], SamplingParams(max_tokens=9), prefill_chunk=4)
    assert model.options["do_sample"] is False and "temperature" not in model.options
    assert model.options["prefill_chunk_size"] == 4
    assert model.options["config"].temperature is None or model.options["config"].temperature == 1
    assert model.options["config"].eos_token_id == [1]
    assert model.generation_config is own
    params = SamplingParams(max_tokens=9, temperature=0.5, top_k=3, min_p=0.25, ignore_eos=True)
    generate_text(model, tiny_tokenizer, [5], params)
    assert model.options["do_sample"] is True
    asked = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    assert [model.options[name] for name in asked] == [0.5, 1.0, 3, 0.25, 1.0]
    assert model.options["config"].eos_token_id is None


def test_a_plain_model_has_no_keys_in_fp8(
    scripted: tuple[Scripted, list[str]], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(UsageError, match=r"in fp8 are for hybrids, .* and Scripted isn't one"):
        generate_text(scripted[0], tiny_tokenizer, [5], SamplingParams(), kv_dtype="fp8")


@pytest.mark.parametrize("chunk", [16, 8192])
def test_a_hybrid_writes_in_the_engine_what_generate_does(
    hybrid: Any, tiny_tokenizer: PreTrainedTokenizerFast, chunk: int
) -> None:
    ids = torch.tensor([PROMPT])
    out = hybrid.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False, pad_token_id=0
    )
    expected = out[0, len(PROMPT) :].tolist()
    seen: list[str] = []
    read: list[int] = []
    figures = generate_text(
        hybrid,
        tiny_tokenizer,
        PROMPT,
        SamplingParams(max_tokens=40),
        prefill_chunk=chunk,
        write=seen.append,
        on_read=read.append,
    )
    assert figures["runtime"] == "longgen.engine"
    assert figures["text"] == tiny_tokenizer.decode(expected, skip_special_tokens=True)
    assert figures["text"] == "".join(seen) and len(seen) > 5
    assert figures["new_tokens"] == len(expected)
    assert figures["cached_tokens"] == len(PROMPT) + len(expected) - 1
    assert figures["prefill_seconds"] > 0 and figures["tokens_per_second"] > 0
    assert read == ([16, 32, 48, 64, 80] if chunk == 16 else [])


def test_running_out_of_memory_is_a_sentence(
    hybrid: Any, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **settings: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    params = SamplingParams(max_tokens=40)
    with monkeypatch.context() as patch:
        patch.setattr(engine_module, "run", full)
        with pytest.raises(UsageError, match="Not enough memory for this request"):
            generate_text(hybrid, tiny_tokenizer, PROMPT, params)
    monkeypatch.setattr(generate_module, "Engine", full)
    with pytest.raises(UsageError, match=r"keys and values of 130 tokens do not fit .* cpu"):
        generate_text(hybrid, tiny_tokenizer, PROMPT, params)
