"""`longgen bench`: end to end on a CPU, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from longgen.bench import checks
from longgen.bench import settings as quick

SMALL = ("--block-size", 16, "--sink-blocks", 1, "--local-blocks", 2)


@pytest.fixture(autouse=True)
def short_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_SHORTEST", 128)


def quick_run(run: Callable[..., Any], *arguments: object) -> Any:
    return run("bench", "attention", "--quick", "--lengths", "256", *arguments)


def test_quick_on_a_cpu_writes_results_and_a_picture(
    run: Callable[..., Any], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib", reason="an extra: longgen[plots]")
    folder = tmp_path / "out"
    result = quick_run(run, "--patterns", "full", *SMALL, "--out", folder)
    assert result.code == 0, result.err
    assert "no GPU: tiny lengths on the CPU" in result.err
    for word in ("full", "custom", "ours", "blocked", "reference", "matmul", str(folder)):
        assert word in result.out
    found = json.loads((folder / "attention.json").read_text())
    for key in ("card", "gpus", "date", "commit", "command", "versions", "seed", "ceiling"):
        assert key in found
    assert "partial" not in found and found["name"] == "attention"
    assert found["timing"]["rounds"] >= 2 and found["ceiling"]["matmul_tflops"] > 0
    cases = {row["case"] for row in found["rows"]}
    assert cases == {
        f"attention.{name}.{direction}"
        for name in ("full", "custom")
        for direction in ("forward", "backward")
    }
    assert all(row["value"] > 0 and row["length"] == 256 for row in found["rows"])
    assert (folder / "attention.png").stat().st_size > 10_000


def test_quick_by_itself_chooses_patterns_and_lengths(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quick, "_CPU_LENGTHS", (2560,))
    result = run(
        "bench", "attention", "--quick", "--providers", "ours", "--directions", "forward", "--json"
    )
    assert result.code == 0, result.err
    rows = result.json["rows"]
    assert [(row["case"], row["length"]) for row in rows] == [
        ("attention.full.forward", 2560),
        ("attention.sink_2k.forward", 2560),
    ]


def test_json_prints_one_object(run: Callable[..., Any]) -> None:
    result = quick_run(
        run, "--patterns", "full", "--providers", "ours,fa4", "--directions", "forward", "--json"
    )
    assert result.code == 0
    (row,) = result.json["rows"]
    assert (row["provider"], row["heads"], row["kv_heads"]) == ("ours", 2, 1)
    (skip,) = result.json["skipped"]
    assert skip["provider"] == "fa4" and skip["reason"]


def test_heads_come_from_a_shape_or_options(run: Callable[..., Any]) -> None:
    options = ("--patterns", "full", "--providers", "ours", "--directions", "forward", "--json")
    shaped = quick_run(run, "--shape", "smollm2-135m", *options).json["rows"][0]
    assert (shaped["heads"], shaped["kv_heads"], shaped["head_dim"]) == (9, 3, 64)
    own = quick_run(run, "--heads", 3, "--head-dim", 16, *options).json["rows"][0]
    assert (own["heads"], own["kv_heads"], own["head_dim"]) == (3, 3, 16)


def test_a_gpu_is_asked_for(refused: Callable[..., str]) -> None:
    assert "no GPU" in refused("bench", "attention")
    assert "torch sees 0 GPUs" in refused("bench", "attention", "--device", "cuda", "--quick")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--providers", "ours,fa5"), "'fa5'; choose from ours"),
        (("--patterns", "sinks"), "'sinks'; choose from full"),
        (("--patterns", ","), "choose from full"),
        (("--pattern", "sink"), "The pattern 'sink' is not known"),
        (("--lengths", "8K,lots"), "number of tokens 'lots'"),
        (("--pattern", "none"), "--patterns full measures; leave it out"),
        (("--lengths", ","), "at least one length"),
        (("--lengths", "1"), "at least one length of 2 tokens"),
        (("--providers", ","), "--providers has no name"),
        (("--heads", 10, "--kv-heads", 4), "10 query heads are not a multiple of 4"),
        (("--shape", "gpt-2"), "shape 'gpt-2' is not known"),
        (("--dtype", "int8"), "dtype 'int8' is not known"),
        (("--directions", "sideways"), "'sideways'; choose from forward"),
        (("--providers", "fa4"), "No provider is left"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    run: Callable[..., Any], arguments: tuple[object, ...], words: str
) -> None:
    result = run("bench", "attention", "--quick", *arguments)
    assert (result.code, result.out) == (2, "")
    assert words in result.err.splitlines()[-1]
    assert result.err.splitlines()[-1].startswith("error: ")


def test_other_results_are_not_overwritten(run: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "attention.json").write_text("{}")
    result = run("bench", "attention", "--quick", "--out", tmp_path)
    assert result.code == 2 and "is not a results file" in result.err
    assert (tmp_path / "attention.json").read_text() == "{}"


def test_a_length_is_measured_once_however_it_is_written(run: Callable[..., Any]) -> None:
    result = run(
        *("bench", "attention", "--quick", "--patterns", "full", "--providers", "ours"),
        *("--lengths", "1K,1024,1_024", "--directions", "forward", "--json"),
    )
    assert [row["length"] for row in result.json["rows"]] == [1024]


def test_names_are_whole_on_a_narrow_screen(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "72")
    result = quick_run(run, "--patterns", "full", *SMALL)
    assert result.code == 0
    assert all(word in result.out for word in ("custom", "reference", "blocked"))


def test_figures_are_shown_where_no_picture_can_be_written(
    run: Callable[..., Any], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib", reason="an extra: longgen[plots]")
    (tmp_path / "attention.png").mkdir()
    result = quick_run(run, "--patterns", "full", "--providers", "ours", "--out", tmp_path)
    assert result.code == 0 and "picture could not be written" in result.err
    assert "ours" in result.out and (tmp_path / "attention.json").is_file()


def test_a_full_disk_is_said_in_one_line(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("longgen.evaluate.results.write_atomically", full)
    result = quick_run(run, "--patterns", "full", "--providers", "ours", "--out", tmp_path)
    assert result.code == 2
    last = result.err.splitlines()[-1]
    assert last.startswith("error: Cannot write") and "No space left on device" in last


def test_the_group_lists_its_commands(run: Callable[..., Any]) -> None:
    result = run("bench", "--help")
    assert result.code == 0 and "attention" in result.out
