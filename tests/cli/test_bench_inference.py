"""`longgen bench inference`: end to end on a CPU, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from longgen.bench import inference
from longgen.bench.tasks import StockPrefill

SMALL = ("--block-size", 8, "--sink-blocks", 1, "--local-blocks", 2)
SHORT = ("--decode-tokens", 2, "--batches", "1")


@pytest.fixture(autouse=True)
def no_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "clear", lambda device: None)


def quick(run: Callable[..., Any], *arguments: object) -> Any:
    return run("bench", "inference", *arguments, "--quick", *SHORT)


def test_quick_without_a_model_takes_a_tiny_one(run: Callable[..., Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="an extra: longgen[plots]")
    folder = tmp_path / "out"
    result = quick(run, "--lengths", 256, "--out", folder)
    assert result.code == 0, result.err
    assert "no GPU: tiny on the CPU; these figures say nothing" in result.err
    assert "random weights of tiny: how long a model takes doesn't depend on them" in result.err
    for word in ("hybrid", "full", "transformers", "ms a token", "KV held", "times as fast"):
        assert word in result.out
    assert str(folder) in result.out
    found = json.loads((folder / "inference.json").read_text())
    for key in ("card", "gpus", "date", "commit", "command", "versions", "seed", "ceiling"):
        assert key in found
    assert "partial" not in found and found["name"] == "inference"
    assert found["layers"] == "SSFFSS" and found["timing"]["decode_tokens"] == 2
    assert {row["case"] for row in found["rows"]} == {
        f"{metric}.{name}"
        for metric in ("prefill", "decode", "kv_bytes")
        for name in ("hybrid", "full", "transformers")
    }
    assert all(row["value"] > 0 and row["length"] == 256 for row in found["rows"])
    assert {r["metric"] for r in found["ratios"]} == {"prefill", "decode", "kv_bytes", "throughput"}
    assert (folder / "inference.png").stat().st_size > 10_000


def test_a_hybrid_brings_its_own_plan(run: Callable[..., Any], tiny_hybrid: Path) -> None:
    result = quick(run, tiny_hybrid, "--lengths", "128,512", "--json")
    assert result.code == 0, result.err
    assert result.json["layers"] == "SFS" and result.json["pattern"]["local_blocks"] == 2
    assert {row["length"] for row in result.json["rows"]} == {128, 512}
    assert all(row["value"] for row in result.json["rows"])
    assert {row["shape"] for row in result.json["rows"]} == {str(tiny_hybrid)}


def test_a_plain_checkpoint_takes_the_options_plan(
    run: Callable[..., Any], tiny_checkpoint: Path
) -> None:
    result = quick(run, tiny_checkpoint, *SMALL, "--full-layers", "2", "--json")
    assert result.code == 0, result.err
    assert result.json["layers"] == "SSF"
    # 64 tokens of context: as long as leaves room to write.
    assert {row["length"] for row in result.json["rows"]} == {64 - 6}
    variants = "full,transformers"
    result = quick(run, tiny_checkpoint, *SMALL, "--variants", variants, "--json")
    assert {row["case"].partition(".")[2] for row in result.json["rows"]} == set(
        variants.split(",")
    )


def test_what_failed_is_said_and_the_rest_is_there(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(self: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: not enough memory")

    monkeypatch.setattr(StockPrefill, "read", read)
    result = quick(run, "--lengths", 256)
    assert result.code == 0
    assert "prefill.transformers, 256: Out of memory at 256 tokens." in result.out


def test_an_interrupt_keeps_the_rows(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def read(self: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(StockPrefill, "read", read)
    result = quick(run, "--lengths", 256, "--out", tmp_path)
    assert result.code == 130 and "the rows so far are kept" in result.err
    found = json.loads((tmp_path / "inference.json").read_text())
    assert found["partial"] is True
    assert {row["case"] for row in found["rows"]} >= {"prefill.hybrid", "decode.full"}


def test_a_gpu_is_asked_for(refused: Callable[..., str]) -> None:
    assert "no GPU" in refused("bench", "inference", "--shape", "llama-2-7b")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--shape", "gpt-2"), "shape 'gpt-2' is not known; choose from llama-2-7b"),
        (("folder", "--shape", "llama-2-7b"), "Both the model folder and --shape llama-2-7b"),
        (("llama-2-7b",), "llama-2-7b names a shape, which has no weights; write --shape"),
        (("no-such-folder",), "neither a named model nor a folder"),
        (("--variants", "hybrid,vllm"), "--variants has 'vllm'; choose from hybrid"),
        (("--variants", ","), "--variants has no name"),
        (("--batches", "1,0"), "--batches has '0'; give numbers"),
        (("--batches", "many"), "--batches has 'many'"),
        (("--lengths", ","), "at least one length of 2 tokens"),
        (("--lengths", "8K,lots"), "number of tokens 'lots'"),
        (("--dtype", "int8"), "dtype 'int8' is not known"),
        (("--pattern", "none"), "No layer of the plan (FFFFFF) is sparse"),
        (("--full-layers", "all"), "No layer of the plan (FFFFFF) is sparse"),
        (("--pattern", "sinks"), "The pattern 'sinks' is not known"),
        (("--pattern", "attention-sink", "--lengths", "1K"), "Give longer --lengths"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    refused: Callable[..., str], arguments: tuple[object, ...], words: str
) -> None:
    assert words in refused("bench", "inference", *arguments, "--quick")


def test_a_seed_that_no_generator_takes_is_refused(run: Callable[..., Any]) -> None:
    result = run("bench", "inference", "--quick", "--seed", 2**64)
    assert result.code == 2 and "--seed" in result.err


def test_without_a_model_only_quick_runs(refused: Callable[..., str]) -> None:
    assert "Give the folder of a checkpoint, or --shape" in refused("bench", "inference")


def test_a_checkpoint_has_its_limits(refused: Callable[..., str], tiny_hybrid: Path) -> None:
    command = ("bench", "inference", tiny_hybrid, "--quick", *SHORT)
    error = refused(*command, "--lengths", "1K")
    assert "--lengths has 1,024 tokens, and 6 more are written" in error
    assert "Give at most 1,018" in error
    assert "is a LongGen hybrid already" in refused(*command, "--pattern", "attention-sink")


def test_what_does_not_fit_is_refused_with_numbers(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference, "free_bytes", lambda device: 1 << 30)
    result = quick(run, "--shape", "llama-2-7b", "--lengths", "4K")
    assert (result.code, result.out) == (2, "")
    assert "llama-2-7b does not fit: its weights take 25.1 GiB in fp32" in result.err
    assert "1.00 GiB of memory are free on cpu" in result.err


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("--resident-layers", "2"), "is for the random weights of --shape"),
        (
            ("--shape", "llama-2-70b", "--resident-layers", "80"),
            "--resident-layers is 80, but llama-2-70b has 80 layers; give fewer",
        ),
    ],
)
def test_resident_layers_that_cannot_be(
    run: Callable[..., Any], arguments: tuple[str, ...], part: str
) -> None:
    result = run("bench", "inference", *arguments, "--quick", "--device", "cpu")
    assert result.code != 0 and part in " ".join(result.err.split())
