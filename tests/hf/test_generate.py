"""generate(): the tokens of uncached forward passes, one row at a time; the rest is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from longgen.errors import UsageError
from longgen.hf import HybridCache

Make = Callable[..., Any]
NEW = 14


def options(**kwargs: Any) -> dict[str, Any]:
    return {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, **kwargs}


def padded(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    length = max(len(row) for row in rows)
    ids, mask = torch.full((len(rows), length), 5), torch.zeros(len(rows), length, dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, length - len(row) :], mask[index, length - len(row) :] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


def test_greedy_tokens_and_logits(hybrid: Any, expect: Make) -> None:
    """Cached decoding gives the logits of the definition at every step, and their tokens."""
    out = hybrid.model.generate(
        hybrid.rows[1][None], **options(return_dict_in_generate=True, output_logits=True)
    )
    assert isinstance(out.past_key_values, HybridCache)
    whole = expect(hybrid.model, [out.sequences[0, :-1]])
    logits = torch.cat(out.logits)
    whole.check("steps", logits, start=len(hybrid.rows[1]) - 1)
    assert torch.equal(logits.argmax(-1), out.sequences[0, -NEW:])
    assert torch.equal(whole.exact[0][-NEW:].argmax(-1), out.sequences[0, -NEW:])


def test_left_padded_batches_and_chunked_prefill(hybrid: Any) -> None:
    model, batch = hybrid.model, padded(hybrid.rows)
    alone = [model.generate(row[None], **options())[0, len(row) :] for row in hybrid.rows]
    for chunk in (None, 1, 7, 16, 61, 100):
        out = model.generate(**batch, **options(prefill_chunk_size=chunk))
        assert torch.equal(out[:, 61:], torch.stack(alone)), chunk
    out = model.generate(**batch, **options(use_cache=False, return_dict_in_generate=True))
    assert out.past_key_values is None
    assert torch.equal(out.sequences[:, 61:], torch.stack(alone))


@pytest.mark.parametrize(
    "kind",
    [
        {"do_sample": True},
        {"do_sample": True, "num_return_sequences": 3, "top_k": 20, "temperature": 1.3},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.3},
        {"num_beams": 3, "do_sample": True},
    ],
    ids=lambda kind: "-".join(kind),
)
def test_sampling_and_beams_equal_those_without_a_cache(
    model: Any, tokens: Make, kind: Any
) -> None:
    batch = padded([tokens(40, seed=1), tokens(23, seed=2)])
    results = []
    for use_cache in (True, False):
        torch.manual_seed(5)
        results.append(model.generate(**batch, **options(use_cache=use_cache, **kind)))
    assert torch.equal(*results)


@pytest.mark.parametrize("chunk", [None, 9])
def test_beams_of_a_batch_equal_those_of_single_rows(
    model: Any, tokens: Make, chunk: int | None
) -> None:
    rows = [tokens(40, seed=1), tokens(23, seed=2), tokens(31, seed=3)]
    batch = model.generate(**padded(rows), **options(num_beams=3, prefill_chunk_size=chunk))
    for row, out in zip(rows, batch, strict=True):
        alone = model.generate(row[None], **options(num_beams=3))
        assert torch.equal(out[40:], alone[0, len(row) :])


def test_rows_that_end_early(build: Make, tokens: Make) -> None:
    """A finished row is filled with padding tokens and does not disturb the others."""
    model, rows = build(), [tokens(30, seed=1), tokens(19, seed=2)]
    alone = [model.generate(row[None], **options())[0, len(row) :] for row in rows]
    end = next(t for t in alone[0].tolist() if t not in alone[1])
    stop = alone[0].tolist().index(end) + 1
    assert 0 < stop < NEW
    batch = model.generate(**padded(rows), **options(eos_token_id=end))
    assert torch.equal(batch[0, 30 : 30 + stop], alone[0][:stop])
    assert (batch[0, 30 + stop :] == 0).all()
    assert torch.equal(batch[1, 30:], alone[1])


def test_a_conversation_goes_on_with_its_cache(model: Any, tokens: Make) -> None:
    """Two calls of generate with one cache equal one long prompt, also in a left-padded batch."""
    first = padded([tokens(30, seed=1), tokens(17, seed=2)])
    cache = HybridCache(model.config)
    turn = model.generate(**first, **options(), past_key_values=cache)
    assert cache.get_seq_length() == 30 + NEW - 1
    ids = torch.cat([turn, tokens(2, 9, seed=3)], 1)
    mask = torch.cat([first["attention_mask"], torch.ones(2, ids.shape[1] - 30).long()], 1)
    second = model.generate(ids, attention_mask=mask, **options(), past_key_values=cache)
    assert torch.equal(second, model.generate(ids, attention_mask=mask, **options()))
    alone = model.generate(ids[1:, 13:], attention_mask=mask[1:, 13:], **options())
    assert torch.equal(second[1, 13:], alone[0])


def test_inputs_embeds(model: Any, tokens: Make) -> None:
    ids = tokens(2, 40)
    out = model.generate(inputs_embeds=model.get_input_embeddings()(ids), **options())
    assert torch.equal(out, model.generate(ids, **options())[:, 40:])


def test_the_cache_is_not_shared_between_calls(model: Any, tokens: Make) -> None:
    ids = tokens(2, 40)
    first = model.generate(ids, **options())
    model.generate(tokens(3, 25, seed=9), **options())
    assert torch.equal(model.generate(ids, **options()), first)


def test_assisted_decoding_is_refused(
    model: Any, build: Make, build_base: Make, tokens: Make
) -> None:
    for extra in ({"prompt_lookup_num_tokens": 2}, {"assistant_model": build(seed=1)}):
        with pytest.raises(UsageError, match="Assisted decoding"):
            model.generate(tokens(1, 30), **options(**extra))
    with pytest.raises(UsageError, match="cannot be cropped"):
        build_base("llama").generate(tokens(1, 30), **options(assistant_model=model))


@pytest.mark.parametrize("name", ["static", "offloaded", "offloaded_static", "quantized"])
def test_other_caches_are_refused_by_name(model: Any, tokens: Make, name: str) -> None:
    with pytest.raises(UsageError, match=f'cache_implementation="{name}"'):
        model.generate(tokens(1, 30), **options(cache_implementation=name))


def test_foreign_caches_are_refused(model: Any, tokens: Make) -> None:
    with pytest.raises(UsageError, match="DynamicCache"):
        model.generate(tokens(1, 30), **options(), past_key_values=DynamicCache())


def test_the_dynamic_cache_by_name_is_ours(model: Any, tokens: Make) -> None:
    named = options(cache_implementation="dynamic", return_dict_in_generate=True)
    assert isinstance(model.generate(tokens(1, 30), **named).past_key_values, HybridCache)


def test_continuous_batching_is_refused(model: Any) -> None:
    """It would switch to an attention of its own."""
    with pytest.raises(ValueError, match="longgen"):
        model.generate_batch([[5, 6, 7]], max_new_tokens=2)
    assert model.config._attn_implementation == "longgen"
