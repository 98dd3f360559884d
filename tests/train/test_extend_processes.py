"""Extension runs of several processes: one folder, one log, and resuming as if never stopped."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from longgen.errors import UsageError
from longgen.train.config import ExtendConfig
from longgen.train.extend import extend, training_folder
from longgen.train.saving import WEIGHTS, mark_whole, newest_checkpoint
from tests.processes import run_processes, run_until_killed
from tests.train.extending import (
    extend_and_die,
    extend_by_sgd,
    extend_on_uneven_cards,
    extend_twice,
    extend_wrongly,
)

Settings = Callable[..., ExtendConfig]


def log(config: ExtendConfig) -> list[dict[str, Any]]:
    lines = (training_folder(config.out) / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def weights(config: ExtendConfig) -> dict[str, torch.Tensor]:
    return load_file(Path(config.out) / "model.safetensors")


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_two_processes_share_sequences_and_resume_as_if_never_stopped(
    settings: Settings, sharding: str
) -> None:
    whole, stopped = (
        settings(
            name,
            context_parallel=2,
            sharding=sharding,
            gradient_checkpointing="selective",
            save_steps=100,
        )
        for name in ("whole", "stopped")
    )
    results = run_processes(2, extend_twice, whole, stopped)
    assert results[1]["lines"] == []
    assert "resuming from checkpoint-3" in results[0]["lines"]
    assert sum(line.startswith("step 6/6") for line in results[0]["lines"]) == 2
    for result in results:
        assert [record["finished"] for record in result["records"]] == [True, False, True]
        assert [record["training"]["step"] for record in result["records"]] == [6, 3, 6]
    assert results[0]["records"][0]["processes"] == 2
    assert results[0]["records"][0]["training"]["sharding"] == sharding

    steps = [(entry["step"], entry["loss"]) for entry in log(whole)]
    assert [(entry["step"], entry["loss"]) for entry in log(stopped)] == steps
    first, second = weights(whole), weights(stopped)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name

    alone = replace(whole, out=whole.out + "-alone", context_parallel=1)
    extend(alone, say=lambda line: None)
    for one, other in zip(log(alone), log(whole), strict=True):
        assert one["tokens"] == other["tokens"] == 512
        # AdamW turns rounding noise of gradients near zero into steps of full size.
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
    # Gone on with by one process, it stays the same run but for rounding.
    copy = replace(stopped, out=stopped.out + "-copy", context_parallel=1)
    extend(copy, resume=True, say=lambda line: None)
    assert len(log(copy)) == 6
    for one, other in zip(log(copy), log(stopped), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
    held = [np.load(training_folder(config.out) / "heldout.npy") for config in (alone, whole)]
    assert np.array_equal(*held)


def assert_near(config: ExtendConfig, other: ExtendConfig) -> None:
    """See that two runs by SGD had the same losses and made the same weights, but for rounding."""
    one, two = log(config), log(other)
    assert [line["step"] for line in one] == [line["step"] for line in two] == [1, 2, 3, 4, 5, 6]
    for line, same in zip(one, two, strict=True):
        assert line["loss"] == pytest.approx(same["loss"], rel=1e-6)
    first, second = weights(config), weights(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert (tensor - second[name]).abs().max() <= 1e-6 * second[name].abs().max(), name


def test_a_run_of_four_killed_while_it_saves_goes_on_with_two_or_one(settings: Settings) -> None:
    alone, four = (
        settings(name, sharding="fsdp", gradient_checkpointing="full") for name in ("one", "four")
    )
    four = replace(four, context_parallel=2)
    extend_by_sgd(0, alone)
    codes = run_until_killed(4, extend_and_die, four, 4)
    assert codes == [-signal.SIGKILL] * 4
    folder = training_folder(four.out)
    # Weights are whole and the optimizer is not: such a checkpoint does not count.
    assert (folder / "checkpoint-4" / WEIGHTS / ".metadata").is_file()
    assert newest_checkpoint(folder) == (folder / "checkpoint-2", [folder / "checkpoint-4"])
    copy = replace(four, out=four.out + "-copy", context_parallel=1)
    shutil.copytree(four.out, copy.out)

    records = run_processes(2, extend_by_sgd, four, True)
    assert [record["finished"] for record in records] == [True, True]
    assert_near(four, alone)
    assert extend_by_sgd(0, copy, True)["finished"]
    assert_near(copy, alone)


def test_a_run_of_one_goes_on_with_two_that_share_the_model(
    settings: Settings,
    make_checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = str(make_checkpoint(tmp_path / "tied", tie_word_embeddings=True))
    whole, begun = (settings(name, model=base) for name in ("whole", "begun"))
    extend_by_sgd(0, whole)

    def cut(*args: Any) -> None:
        raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        # Right after the mark of the first checkpoint.
        patch.setattr("longgen.train.trainer.mark_whole", lambda *args: mark_whole(*args) or cut())
        with pytest.raises(RuntimeError):
            extend_by_sgd(0, begun)
    run_processes(2, extend_by_sgd, replace(begun, sharding="fsdp"), True)
    assert_near(begun, whole)


def test_what_processes_cannot_share_is_refused(settings: Settings) -> None:
    first, second = run_processes(2, extend_wrongly, settings("full"))
    kinds, sentences = zip(*first, strict=True)
    assert kinds == ("UsageError",) * 4
    # What the first process alone finds out, the others repeat without reporting it.
    assert [kind for kind, _ in second] == ["ReportedElsewhere", *kinds[1:]]
    assert [sentence for _, sentence in second] == list(sentences)
    assert "notes.txt" in sentences[0] or "not empty" in sentences[0]
    assert "context_parallel is 3, but 2 processes were started. Start a multiple" in sentences[1]
    assert "129 tokens cannot be cut into 2 equal parts; make it 130" in sentences[2]
    assert "3 sequences, which 2 groups of processes cannot share" in sentences[3]


def test_sharing_sequences_takes_processes(settings: Settings) -> None:
    with pytest.raises(
        UsageError, match=r"context_parallel is 2, but 1 process was started.*--nproc-per-node 2"
    ):
        extend(settings(context_parallel=2), say=lambda line: None)


def test_processes_with_uneven_cards_choose_the_same_checkpointing(settings: Settings) -> None:
    """Layers that are run again exchange again: all must do so, or one waits for ever."""
    config = settings(context_parallel=2, steps=1, force=True)
    assert run_processes(2, extend_on_uneven_cards, config, [80 << 30, 1 << 20]) == ["full"] * 2
