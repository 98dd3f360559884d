"""`longgen bench train`: end to end on a CPU, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from longgen.bench import train
from longgen.bench.train_step import TrainStep

SMALL = ("--block-size", 8, "--sink-blocks", 1, "--local-blocks", 2)


def quick(run: Callable[..., Any], *arguments: object) -> Any:
    return run("bench", "train", *arguments, "--quick")


def test_quick_without_a_model_takes_a_tiny_one(run: Callable[..., Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="an extra: longgen[plots]")
    folder = tmp_path / "out"
    result = quick(run, "--lengths", 256, "--out", folder)
    assert result.code == 0, result.err
    assert "no GPU: tiny on the CPU; these figures say nothing" in result.err
    for word in ("hybrid", "full", "transformers", "s a step", "tokens/s/GPU", "planned", "MFU:"):
        assert word in result.out
    assert str(folder) in result.out
    found = json.loads((folder / "train.json").read_text())
    for key in ("card", "gpus", "date", "commit", "command", "versions", "seed", "ceiling"):
        assert key in found
    assert "partial" not in found and found["name"] == "train" and found["gpus"] == 0
    assert found["layers"] == "SSFFSS" and "visible pairs" in found["mfu_is"]
    assert found["timing"]["a_step_is"] == "forward, backward"
    assert {row["case"] for row in found["rows"]} == {
        f"train_step.{name}" for name in ("hybrid", "full", "transformers")
    }
    assert all(row["value"] > 0 and row["length"] == 256 for row in found["rows"])
    assert {r["against"] for r in found["ratios"]} == {"full", "transformers"}
    assert (folder / "train.png").stat().st_size > 10_000


def test_a_hybrid_brings_its_own_plan(run: Callable[..., Any], tiny_hybrid: Path) -> None:
    how = ("--lengths", "128,512", "--optimizer", "--checkpointing", "full", "--json")
    result = quick(run, tiny_hybrid, *how)
    assert result.code == 0, result.err
    assert result.json["layers"] == "SFS" and result.json["pattern"]["local_blocks"] == 2
    rows = result.json["rows"]
    assert {row["length"] for row in rows} == {128, 512} and all(row["value"] for row in rows)
    assert {row["shape"] for row in rows} == {str(tiny_hybrid)}
    assert {row["checkpointing"] for row in rows} == {"full"}
    assert result.json["timing"]["a_step_is"] == "forward, backward, clipping, AdamW"


def test_a_slice_of_a_checkpoint(run: Callable[..., Any], tiny_checkpoint: Path) -> None:
    how = ("--layers", 2, "--full-layers", "2", "--variants", "full,hybrid", "--lengths", 64)
    result = quick(run, tiny_checkpoint, *SMALL, *how, "--checkpointing", "none", "--json")
    assert result.code == 0, result.err
    assert result.json["layers"] == "SF" and result.json["layers_of"] == 3
    assert [row["case"] for row in result.json["rows"]] == ["train_step.full", "train_step.hybrid"]
    assert {row["checkpointing"] for row in result.json["rows"]} == {"off"}


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    original = train.make_step

    def make(settings: Any, name: str, *rest: Any) -> TrainStep:
        if name == "transformers":
            raise error
        return original(settings, name, *rest)

    monkeypatch.setattr(train, "make_step", make)


def test_what_failed_is_said_and_the_rest_is_there(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, torch.OutOfMemoryError("CUDA out of memory"))
    result = quick(run, "--lengths", 256)
    assert result.code == 0
    assert "train_step.transformers, 256: Out of memory at 256 tokens." in result.out


def test_an_interrupt_keeps_the_rows(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    failing(monkeypatch, KeyboardInterrupt())
    result = quick(run, "--lengths", 256, "--out", tmp_path)
    assert result.code == 130 and "the rows so far are kept" in result.err
    found = json.loads((tmp_path / "train.json").read_text())
    assert found["partial"] is True
    assert {row["case"] for row in found["rows"]} == {"train_step.hybrid", "train_step.full"}


def test_a_gpu_is_asked_for(refused: Callable[..., str]) -> None:
    assert "no GPU" in refused("bench", "train", "--shape", "llama-2-7b")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--shape", "gpt-2"), "shape 'gpt-2' is not known; choose from llama-2-7b"),
        (("folder", "--shape", "llama-2-7b"), "Both the model folder and --shape llama-2-7b"),
        (("llama-2-7b",), "llama-2-7b names a shape, which has no weights; write --shape"),
        (("no-such-folder",), "neither a named model nor a folder"),
        (("--variants", "hybrid,vllm"), "--variants has 'vllm'; choose from hybrid"),
        (("--variants", ","), "--variants has no name"),
        (("--checkpointing", "some"), "--checkpointing has 'some'; choose from none, auto"),
        (("--checkpointing", "elementwise", "--fp8"), "fp8 products give none to keep"),
        (("--checkpointing", "none", "--offload"), "and checkpointing is off"),
        (("--lengths", ","), "at least one length of 2 tokens"),
        (("--lengths", "8K,lots"), "number of tokens 'lots'"),
        (("--layers", "7"), "--layers is 7; the model has 6, so give 1 to 6"),
        (("--context-parallel", "2"), "context_parallel is 2, but 1 process was started"),
        (("--sharding", "zero"), "sharding is 'zero'; choose from auto, fsdp, ddp"),
        (("--fp8",), "fp8 products cannot run here"),
        (("--pattern", "none"), "No layer of the plan (FFFFFF) is sparse"),
        (("--pattern", "attention-sink", "--lengths", "1K"), "Give longer --lengths"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    refused: Callable[..., str], arguments: tuple[object, ...], words: str
) -> None:
    assert words in refused("bench", "train", *arguments, "--quick")


def test_without_a_model_only_quick_runs(refused: Callable[..., str]) -> None:
    assert "Give the folder of a checkpoint, or --shape" in refused("bench", "train")
