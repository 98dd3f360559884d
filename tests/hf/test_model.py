"""The forward pass: every way to run a document gives the same logits; bad masks are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from longgen.errors import UsageError
from longgen.hf import HybridCache

Make = Callable[..., Any]


@pytest.fixture(autouse=True)
def no_grad() -> Any:
    with torch.no_grad():
        yield


def left_padded(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Put rows into one batch that ends together; padding holds tokens that would be noticed."""
    length = max(len(row) for row in rows)
    ids = torch.full((len(rows), length), 5)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, length - len(row) :] = row
        mask[index, length - len(row) :] = 1
    return ids, mask


def in_chunks(model: Any, ids: torch.Tensor, sizes: list[int], **kwargs: Any) -> torch.Tensor:
    """Run a batch chunk by chunk through one cache; return all logits."""
    cache, logits, start = HybridCache(model.config), [], 0
    mask = kwargs.pop("attention_mask", None)
    for size in sizes:
        columns = slice(start, start + size)
        given = {name: value[:, columns] for name, value in kwargs.items()}
        if mask is not None:
            given["attention_mask"] = mask[:, : start + size]
        out = model(ids[:, columns], past_key_values=cache, **given)
        assert out.past_key_values is cache
        logits.append(out.logits)
        start += size
    assert start == ids.shape[1] == cache.get_seq_length()
    return torch.cat(logits, 1)


def test_the_pattern_shows_in_the_logits(hybrid: Any, compute: Make, weights_of: Make) -> None:
    """Unless the sparse logits are far from the dense ones, the other tests would prove nothing."""
    model, row = hybrid.model, hybrid.rows[0]
    dense = type(model.config).from_dict(
        {**model.config.to_dict(), "layer_types": ["full_attention"] * 3}
    )
    far = (compute(dense, weights_of(model), row) - hybrid.exact[0]).abs().amax(-1)
    assert far[-20:].min() > 1000 * hybrid.budget


def test_forward_is_what_the_definition_says(hybrid: Any) -> None:
    for row, ids in enumerate(hybrid.rows):
        hybrid.check("forward", hybrid.model(ids[None], use_cache=False).logits[0], row)
        hybrid.check("with a cache", hybrid.model(ids[None]).logits[0], row)


@pytest.mark.parametrize(
    "sizes",
    [[60, 1], [1] * 61, [7] * 8 + [5], [16] * 3 + [13], [1, 30, 1, 29], [4] * 15 + [1]],
    ids=lambda sizes: "-".join(map(str, sizes[:3])),
)
def test_chunks_through_a_cache_equal_the_whole(hybrid: Any, sizes: list[int]) -> None:
    logits = in_chunks(hybrid.model, hybrid.rows[0][None], sizes)
    hybrid.check(f"chunks {sizes}", logits[0])


@pytest.mark.parametrize("sizes", [None, [61], [58, 1, 1, 1], [6] * 10 + [1]], ids=str)
@pytest.mark.parametrize("with_positions", [False, True], ids=["", "position_ids"])
def test_left_padded_rows_equal_single_rows(
    hybrid: Any, sizes: list[int] | None, with_positions: bool
) -> None:
    ids, mask = left_padded(hybrid.rows)
    given = {"attention_mask": mask}
    if with_positions:
        given["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    if sizes is None:
        logits = hybrid.model(ids, use_cache=False, **given).logits
    else:
        logits = in_chunks(hybrid.model, ids, sizes, **given)
    assert torch.isfinite(logits).all()
    for row, own in enumerate(hybrid.rows):
        hybrid.check(f"row {row}", logits[row, -len(own) :], row)


def test_positions_may_be_left_out_half_way(hybrid: Any) -> None:
    """A left-padded cache filled with explicit positions goes on without them."""
    ids, mask = left_padded(hybrid.rows)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = HybridCache(hybrid.model.config)
    start = 55
    hybrid.model(
        ids[:, :start],
        attention_mask=mask[:, :start],
        position_ids=positions[:, :start],
        past_key_values=cache,
    )
    logits = hybrid.model(ids[:, start:], attention_mask=mask, past_key_values=cache).logits
    for row, own in enumerate(hybrid.rows):
        hybrid.check(f"row {row}", logits[row, -6:], row, len(own) - 6)


def test_right_padding_leaves_the_tokens_alone(hybrid: Any) -> None:
    ids, mask = torch.full((3, 61), 5), torch.zeros(3, 61, dtype=torch.long)
    for row, own in enumerate(hybrid.rows):
        ids[row, : len(own)], mask[row, : len(own)] = own, 1
    logits = hybrid.model(ids, attention_mask=mask).logits
    for row, own in enumerate(hybrid.rows):
        hybrid.check(f"row {row}", logits[row, : len(own)], row)


@pytest.mark.parametrize("mask", [None, "ones"])
def test_packed_documents_equal_separate_ones(hybrid: Any, mask: str | None) -> None:
    ids = torch.cat(hybrid.rows)[None]
    positions = torch.cat([torch.arange(len(row)) for row in hybrid.rows])[None]
    attention_mask = torch.ones_like(ids) if mask else None
    out = hybrid.model(ids, position_ids=positions, attention_mask=attention_mask)
    assert out.past_key_values is None, "there is no one document for a cache to go on with"
    start = 0
    for row, own in enumerate(hybrid.rows):
        hybrid.check(f"document {row}", out.logits[0, start : start + len(own)], row)
        start += len(own)


def test_rows_may_be_packed_differently(hybrid: Any) -> None:
    _, middle, short = hybrid.rows
    ids = torch.stack([torch.cat([short, middle]), torch.cat([middle, short])])
    positions = torch.stack(
        [
            torch.cat([torch.arange(len(row)) for row in pair])
            for pair in ([short, middle], [middle, short])
        ]
    )
    logits = hybrid.model(ids, position_ids=positions).logits
    hybrid.check("short first", logits[0, :9], 2)
    hybrid.check("middle second", logits[0, 9:], 1)
    hybrid.check("middle first", logits[1, :48], 1)
    hybrid.check("short second", logits[1, 48:], 2)


@pytest.mark.parametrize("layers", ["SSS", "FFF", "S", "F"])
def test_plans_of_one_kind(
    build: Make, expect: Make, tokens: Make, layers: str, family: str
) -> None:
    """All-sparse models have no full layer from which transformers could take mask sizes."""
    expected = expect(build(family, layers=layers), [tokens(40), tokens(60, seed=1)])
    expected.check("forward", expected.model(tokens(1, 40)).logits[0])
    expected.check("cached", in_chunks(expected.model, tokens(1, 40), [30, 7, 1, 1, 1])[0])


def test_inputs_embeds_equal_input_ids(model: Any, tokens: Make) -> None:
    ids = tokens(2, 40)
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embeds).logits, model(ids).logits)
    assert torch.equal(
        in_chunks(model, ids, [23, 17]), in_chunks_of_embeds(model, embeds, [23, 17])
    )


def in_chunks_of_embeds(model: Any, embeds: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    cache = HybridCache(model.config)
    chunks = embeds.split(sizes, 1)
    return torch.cat([model(inputs_embeds=c, past_key_values=cache).logits for c in chunks], 1)


def test_logits_to_keep(model: Any, tokens: Make) -> None:
    ids = tokens(2, 40)
    hidden = model.model(input_ids=ids).last_hidden_state
    assert torch.equal(model(ids).logits, model.lm_head(hidden))
    assert torch.equal(model(ids, logits_to_keep=3).logits, model.lm_head(hidden[:, -3:]))


@pytest.mark.parametrize("training", [False, True])
def test_hidden_states(build: Make, tokens: Make, family: str, training: bool) -> None:
    model, ids = build(family, layers="SF").train(training), tokens(2, 20)
    labels = {"labels": ids} if training else {}
    for out in (
        model(ids, output_hidden_states=True, **labels),
        model.model(ids, output_hidden_states=True),
    ):
        assert len(out.hidden_states) == 3
        assert torch.equal(out.hidden_states[0], model.get_input_embeddings()(ids))
        assert torch.equal(out.hidden_states[-1], model.model(ids).last_hidden_state)
    assert model(ids, **labels).hidden_states is None


def test_use_cache(model: Any, tokens: Make) -> None:
    ids = tokens(1, 20)
    assert isinstance(model(ids).past_key_values, HybridCache)
    assert model(ids, use_cache=False).past_key_values is None
    assert isinstance(model(ids, use_cache=True).past_key_values, HybridCache)
    model.train()
    assert model(ids).past_key_values is None, "training has no use for a cache"
    model.eval()


def test_a_tuple_is_given_on_request(model: Any, tokens: Make) -> None:
    ids = tokens(2, 20)
    whole = model(ids)
    assert torch.equal(model(ids, return_dict=False)[0], whole.logits)
    assert torch.equal(model.model(ids, return_dict=False)[0], model.model(ids).last_hidden_state)


def test_masks_with_holes_are_refused(model: Any, tokens: Make) -> None:
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[1, 7] = 0
    with pytest.raises(UsageError, match=r"Row 1 .* middle of the sequence"):
        model(tokens(2, 20), attention_mask=mask)


@pytest.mark.parametrize("shape", [(2, 19), (1, 20), (2, 21), (2, 1, 20, 20), (20,)])
def test_masks_of_the_wrong_shape_are_refused(model: Any, tokens: Make, shape: Any) -> None:
    with pytest.raises(UsageError, match=r"LongGen models take \(2, 20\)"):
        model(tokens(2, 20), attention_mask=torch.ones(shape, dtype=torch.long))


def test_a_mask_must_cover_what_is_cached(model: Any, tokens: Make) -> None:
    cache = model(tokens(2, 20)).past_key_values
    with pytest.raises(UsageError, match=r"\(2, 23\).* cached ones included"):
        model(tokens(2, 3), attention_mask=torch.ones(2, 3), past_key_values=cache)


@pytest.mark.parametrize("before, after", [([4, 0], [0, 0]), ([0, 0], [4, 0]), ([4, 0], [5, 0])])
def test_padding_may_not_change_under_a_cache(
    model: Any, tokens: Make, before: list[int], after: list[int]
) -> None:
    def mask(length: int, paddings: list[int]) -> torch.Tensor:
        return (torch.arange(length) >= torch.tensor(paddings)[:, None]).long()

    cache = HybridCache(model.config)
    model(tokens(2, 20), attention_mask=mask(20, before), past_key_values=cache)
    with pytest.raises(UsageError, match="must stay the same"):
        model(tokens(2, 3), attention_mask=mask(23, after), past_key_values=cache)


def test_right_padding_then_more_tokens_is_refused(model: Any, tokens: Make) -> None:
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[0, -3:] = 0
    cache = model(tokens(2, 20), attention_mask=mask).past_key_values
    with pytest.raises(UsageError, match="middle of the sequence"):
        more = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
        model(tokens(2, 1), attention_mask=more, past_key_values=cache)


def test_packed_documents_have_no_cache(model: Any, tokens: Make) -> None:
    positions = torch.cat([torch.arange(10), torch.arange(10)])[None]
    with pytest.raises(UsageError, match="packed"):
        model(tokens(1, 20), position_ids=positions, past_key_values=HybridCache(model.config))


def test_packed_rows_cannot_be_padded_on_the_left(model: Any, tokens: Make) -> None:
    """Positions that restart under a mask that hides something say two things at once."""
    mask = torch.ones(1, 20, dtype=torch.long)
    mask[0, :3] = 0
    positions = torch.cat([torch.zeros(3).long(), torch.arange(10), torch.arange(7)])[None]
    with pytest.raises(UsageError, match="position_ids"):
        model(tokens(1, 20), position_ids=positions, attention_mask=mask)


def test_nothing_to_run_is_refused(model: Any) -> None:
    with pytest.raises(UsageError, match="input_ids or inputs_embeds"):
        model()
