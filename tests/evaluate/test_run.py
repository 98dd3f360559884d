"""What an evaluation measures by default, and which figures it may take over."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from longgen.errors import UsageError
from longgen.evaluate import asking
from longgen.evaluate import run as run_module
from longgen.evaluate.cost import Cost
from longgen.evaluate.needle import NeedleExample, NeedleTask
from longgen.evaluate.results import read_results
from longgen.evaluate.run import (
    default_lengths,
    evaluate_model,
    usable_text,
    variant_of,
)
from longgen.evaluate.saved import fingerprint
from longgen.evaluate.text import Text, tokenize_text
from longgen.hf import LongGenLlamaConfig
from longgen.pattern import SparsePattern

TEXT = np.random.default_rng(0).integers(5, 600, 2000)


@pytest.mark.parametrize(
    ("context", "lengths"),
    [
        (32768, (4096, 8192, 16384, 32768)),
        (131072, (4096, 8192, 16384, 32768, 65536, 131072)),
        (8192, (1024, 2048, 4096, 8192)),
        (40960, (4096, 8192, 16384, 32768, 40960)),
        (1000, (64, 128, 256, 512, 1000)),
        (4, (1, 2, 4)),
    ],
)
def test_lengths_double_up_to_the_context(context: int, lengths: tuple[int, ...]) -> None:
    assert default_lengths(context) == lengths


@pytest.mark.parametrize(
    ("layers", "name"), [("SFS", "hybrid"), ("FFF", "full"), ("SSS", "sparse")]
)
def test_variants_are_told_by_their_layers(layers: str, name: str) -> None:
    kinds = {"S": "longgen_sparse", "F": "full_attention"}
    config = LongGenLlamaConfig(
        num_hidden_layers=3,
        layer_types=[kinds[letter] for letter in layers],
        longgen={"pattern": SparsePattern().to_dict()},
    )
    assert variant_of(config) == name
    assert variant_of(LlamaConfig()) == "original"


def test_a_fingerprint_changes_with_weights_and_config_alone(model: LlamaForCausalLM) -> None:
    first = fingerprint(model)
    assert fingerprint(model) == first
    assert fingerprint(LlamaForCausalLM(model.config)) != first
    weight = model.model.layers[1].mlp.up_proj.weight.data
    kept = weight[3, 4].clone()
    weight[3, 4] = torch.nextafter(kept, torch.tensor(torch.inf))
    assert fingerprint(model) != first
    weight[3, 4] = kept
    model.config.rope_parameters["rope_theta"] += 1
    assert fingerprint(model) != first
    model.config.rope_parameters["rope_theta"] -= 1
    assert fingerprint(model) == first
    assert fingerprint(model.bfloat16()) != first
    model.float()


def test_text_is_read_until_there_is_enough(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(f"{name} " * 1000)
    whole = tokenize_text([tmp_path], tokenizer, 10_000)
    assert tokenizer.decode(whole.ids) == "".join(f"{name} " * 1000 for name in "abc")
    assert len(tokenize_text([tmp_path], tokenizer, 10)) < len(whole) / 2


def test_text_loses_its_special_tokens_and_has_to_last(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = [7, tokenizer.bos_token_id, 8, 9] * 50
    text, longest = usable_text(ids, tokenizer, (100, 149, 150), only=("loss",))
    assert text.ids.tolist() == [7, 8, 9] * 50 and longest == 149
    with pytest.raises(UsageError, match="151 needs 151"):
        usable_text(ids, tokenizer, (151,), only=("needle",))
    assert usable_text(ids, tokenizer, (151,), only=("needle",), repeat=True)[1] == 151
    with pytest.raises(UsageError, match="150 needs 151"):
        usable_text(ids, tokenizer, (100,), loss_context=150, only=("loss",))


def test_only_known_things_are_measured(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    for only in ((), ("needle", "taste")):
        with pytest.raises(UsageError, match="choose from needle, loss, cost"):
            evaluate_model(model, tokenizer, TEXT, tmp_path, lengths=(128,), only=only)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["model", "hybrid"])
def test_what_was_written_outlasts_an_interruption(
    request: pytest.FixtureRequest,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    model = request.getfixturevalue(kind)
    settings: dict[str, Any] = {"lengths": (160, 190), "num_depths": 10, "samples": 1}
    settings |= {"only": ("needle",), "say": lambda line: None}
    # One question at a time.
    monkeypatch.setattr(asking, "free_bytes", lambda device: 0)

    def call(folder: str) -> list[dict[str, Any]]:
        return evaluate_model(model, tokenizer, TEXT, tmp_path / folder, **settings)

    whole = call("whole")
    # A model with random weights finds nothing.
    assert [len(row["misses"]) for row in whole] == [10, 10]
    assert len({miss["answer"] for row in whole for miss in row["misses"]}) > 1

    build, left = NeedleTask.build, 14

    def interrupted(*args: Any) -> NeedleExample:
        nonlocal left
        left -= 1
        if not left:
            raise KeyboardInterrupt
        return build(*args)

    monkeypatch.setattr(NeedleTask, "build", interrupted)
    with pytest.raises(KeyboardInterrupt):
        call("stopped")
    saved: Any = read_results(tmp_path / "stopped" / "needle.json")["rows"]
    assert saved[0]["misses"] == whole[0]["misses"]
    assert 0 < len(saved[1]["misses"]) < 10
    assert call("stopped") == whole
    # What was saved was not asked again.
    assert -left == 10 - len(saved[1]["depths"])


def test_lengths_that_did_not_fit_are_tried_again(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measure, tried = run_module.measure_cost, []

    def measured(model: Any, lengths: list[int], **kwargs: Any) -> list[Cost]:
        tried.append(lengths[0])
        if lengths[0] >= limit:
            return [Cost(length=lengths[0], prefill_chunk=8192, error="Out of memory.")]
        return measure(model, lengths, **kwargs)

    monkeypatch.setattr(run_module, "measure_cost", measured)
    monkeypatch.setattr(run_module, "REPEATS", 1)

    def call() -> list[dict[str, Any]]:
        lines: list[str] = []
        lengths, only = (8, 16, 32), ("cost",)
        return evaluate_model(
            model, tokenizer, TEXT, tmp_path, lengths=lengths, only=only, say=lines.append
        )

    limit = 16
    rows = call()
    assert tried == [8, 16]
    errors = {row["length"]: row.get("error") for row in rows}
    assert errors[8] is None and errors[16] == "Out of memory."
    assert errors[32] == "Not tried: 16 tokens did not fit already."
    limit = 1000
    rows = call()
    assert tried == [8, 16, 16, 32]
    assert all(row["value"] is not None for row in rows) and len(rows) == 9
    saved: Any = read_results(tmp_path / "cost.json")["rows"]
    assert saved == rows


LOSS: dict[str, Any] = {"lengths": (100,), "loss_windows": 3, "only": ("loss",)}


def test_loss_keeps_to_documents_and_needles_do_not_notice(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """Special tokens before a document move its start."""
    ids = np.concatenate([[tokenizer.bos_token_id] * 30, TEXT])
    text = Text(ids, np.array([0, 930, 1030]))
    settings: dict[str, Any] = LOSS | {"say": lambda line: None}
    [row] = evaluate_model(model, tokenizer, text, tmp_path / "loss", **settings)
    assert row["within_documents"] is True and row["starts"] == [0, 799, 1000]

    settings |= {"only": ("needle",), "lengths": (160,), "num_depths": 10, "samples": 1}
    found = evaluate_model(model, tokenizer, text, tmp_path / "documents", **settings)
    assert found == evaluate_model(model, tokenizer, ids, tmp_path / "ids", **settings)


@pytest.mark.parametrize(
    ("starts", "measured_again"), [([0], False), ([0, 900], True), (range(0, 2000, 50), False)]
)
def test_old_figures_are_taken_over_where_their_windows_lie_the_same(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    starts: Any,
    measured_again: bool,
) -> None:
    """Results of before windows kept to documents do not say where theirs lay."""
    evaluate_model(model, tokenizer, TEXT, tmp_path, say=lambda line: None, **LOSS)
    file = tmp_path / "loss.json"
    old = json.loads(file.read_text())
    [row] = old["rows"]
    assert (row.pop("starts"), row.pop("within_documents")) == ([0, 949, 1899], None)
    row["value"] = 123.0
    other = {**row, "length": 60}
    old["rows"] = [other, row]
    file.write_text(json.dumps(old))

    lines: list[str] = []
    text = Text(TEXT, np.array(starts))
    [row] = evaluate_model(model, tokenizer, text, tmp_path, say=lines.append, **LOSS)
    assert (row["value"] != 123.0) == measured_again
    assert any("left out" in line for line in lines) == measured_again
    # Figures of other lengths stay, or go, by the same rule.
    saved: Any = read_results(file)["rows"]
    assert [one["length"] for one in saved] == ([100] if measured_again else [60, 100])
    if len(starts) > 2:
        assert [one["within_documents"] for one in saved] == [False, False]
    # A second time nothing is left to change.
    written = file.stat().st_mtime_ns
    assert evaluate_model(model, tokenizer, text, tmp_path, say=print, **LOSS) == [row]
    assert file.stat().st_mtime_ns == written
