"""Hybrid models whose process holds a part of every row."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from longgen.errors import UsageError
from longgen.hf import LongGenQwen3Config, LongGenQwen3ForCausalLM
from longgen.parallel import ContextGroup, shard
from longgen.pattern import SparsePattern
from longgen.plan import LayerPlan
from longgen.train.processes import Processes
from tests.processes import run_processes

LENGTH = 96


def make_model() -> Any:
    """Return a tiny Qwen3 hybrid of random weights in fp64, for a family that takes masks by layer
    type."""
    torch.manual_seed(0)
    config = LongGenQwen3Config(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=LENGTH,
        initializer_range=0.2,
        layer_types=LayerPlan.build(3).layer_types,
        longgen={"pattern": SparsePattern.block_sparse(4, 5, 2, 0, 2).to_dict()},
    )
    return LongGenQwen3ForCausalLM(config).double().eval()


def batch(packed: bool) -> dict[str, torch.Tensor]:
    """Return two rows of tokens; in the packed ones documents end at different places."""
    ids = torch.randint(0, 61, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    borders = ([0, 30, 31, LENGTH], [0, 70, LENGTH]) if packed else ([0, LENGTH],) * 2
    rows = [
        torch.cat([torch.arange(b - a) for a, b in zip(row, row[1:], strict=False)])
        for row in borders
    ]
    labels = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], 1)
    labels[0, :50] = -100
    return {"input_ids": ids, "position_ids": torch.stack(rows), "shift_labels": labels}


def forward_parts(rank: int) -> list[dict[str, Any]]:
    """Return this rank's logits and share of the loss, packed and not."""
    group = Processes.start(2).group
    assert group is not None
    model = make_model()
    model.set_context_parallel(group)
    results = []
    for packed in (False, True):
        part = shard(batch(packed), group.rank, group.size)
        labels = part.pop("shift_labels")
        if not packed:
            # One document a row from its start is what no positions mean.
            del part["position_ids"]
        with torch.no_grad():
            logits = model(**part).logits
            loss = model(**part, shift_labels=labels).loss
        results.append({"logits": logits.numpy(), "loss": float(loss)})
    return results


def test_logits_and_shares_of_the_loss_are_those_of_the_whole() -> None:
    found = run_processes(2, forward_parts)
    model = make_model()
    for index, packed in enumerate((False, True)):
        whole = batch(packed)
        labels = whole.pop("shift_labels")
        with torch.no_grad():
            logits = model(**whole, use_cache=False).logits
            loss = model(**whole, shift_labels=labels, use_cache=False).loss
        parts = [torch.from_numpy(rank[index]["logits"]) for rank in found]
        torch.testing.assert_close(torch.cat(parts, 1), logits, rtol=1e-6, atol=1e-6)
        # The loss is summed up in fp32.
        assert sum(rank[index]["loss"] for rank in found) == pytest.approx(float(loss), rel=1e-6)


def test_what_needs_whole_rows_is_refused() -> None:
    model = make_model()
    model.set_context_parallel(ContextGroup(0, 2))
    ids = torch.ones(1, 8, dtype=torch.long)
    with pytest.raises(UsageError, match="no cache"):
        model(ids, use_cache=True)
    with pytest.raises(UsageError, match="no cache"):
        model.generate(ids, max_new_tokens=1, do_sample=False)
    with pytest.raises(UsageError, match="no token can be masked"):
        model(ids, attention_mask=torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1]]))
    for training in (True, False):
        with pytest.raises(UsageError, match="next shard"):
            model.train(training)(ids, labels=ids)
    model.set_context_parallel(None)
    assert model.eval()(ids, labels=ids).loss.isfinite()
