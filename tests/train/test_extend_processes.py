"""Extension runs of several processes: one folder, one log, and resuming as if never stopped."""

from __future__ import annotations

import json
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
from tests.processes import run_processes
from tests.train.extending import extend_twice, extend_wrongly

Settings = Callable[..., ExtendConfig]


def log(config: ExtendConfig) -> list[dict[str, Any]]:
    lines = (training_folder(config.out) / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def weights(config: ExtendConfig) -> dict[str, torch.Tensor]:
    return load_file(Path(config.out) / "model.safetensors")


def test_two_processes_share_sequences_and_resume_as_if_never_stopped(settings: Settings) -> None:
    whole, stopped = (settings(n, context_parallel=2, save_steps=100) for n in ("whole", "stopped"))
    results = run_processes(2, extend_twice, whole, stopped)
    assert results[1]["lines"] == []
    assert "resuming from checkpoint-3" in results[0]["lines"]
    assert sum(line.startswith("step 6/6") for line in results[0]["lines"]) == 2
    for result in results:
        assert [record["finished"] for record in result["records"]] == [True, False, True]
        assert [record["training"]["step"] for record in result["records"]] == [6, 3, 6]
    assert results[0]["records"][0]["processes"] == 2

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
