"""`longgen evaluate`: its files, its table, going on after an interrupt, what it refuses."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longgen.checkpoint import load_model
from longgen.evaluate import asking
from longgen.evaluate.needle import NeedleTask
from longgen.evaluate.results import read_results

# The tiny tokenizer writes needle and question with about 170 tokens.
FAST = ("--lengths", "192,256", "--depths", 10, "--samples", 1, "--device", "cpu")


@pytest.fixture
def arguments(tiny_hybrid: Path, text_file: Path, tmp_path: Path) -> tuple[object, ...]:
    return ("evaluate", tiny_hybrid, "--text", text_file, "--out", tmp_path / "results", *FAST)


def rows(folder: Path, metric: str) -> list[dict[str, Any]]:
    found: Any = read_results(folder / f"{metric}.json")["rows"]
    return list(found)


def test_it_writes_files_and_pictures_and_prints_a_table(
    run: Callable[..., Any], arguments: tuple[object, ...], tmp_path: Path
) -> None:
    result = run(*arguments)
    assert result.code == 0
    header, *lines, runtimes, last = result.out.splitlines()
    assert runtimes == "Cache and times: hybrid by longgen.engine."
    words = "tokens needles found loss (nats) keys and values prefill a token"
    assert " ".join(header.split()) == words
    assert [line.split()[0] for line in lines] == ["192", "256"]
    assert "of 10" in lines[0]
    folder = tmp_path / "results"
    assert str(folder) in last
    assert sorted(path.name for path in folder.iterdir()) == [
        "cost.json",
        "decode.png",
        "kv.png",
        "loss.json",
        "loss.png",
        "needle.json",
        "needle.png",
    ]
    found = {(row["case"], row["length"]) for row in rows(folder, "needle")}
    assert found == {("needle.hybrid", 192), ("needle.hybrid", 256)}
    assert [row["n"] for row in rows(folder, "needle")] == [10, 10]
    assert {row["runtime"] for m in ("needle", "cost") for row in rows(folder, m)} == {
        "longgen.engine"
    }
    [loss] = rows(folder, "loss")
    assert (loss["case"], loss["length"]) == ("loss.hybrid", 256)
    assert {row["case"] for row in rows(folder, "cost")} == {
        "kv_bytes.hybrid",
        "prefill.hybrid",
        "decode.hybrid",
    }
    assert read_results(folder / "cost.json")["command"].startswith("longgen")
    for words in ("needle at 192", "loss over 256", "cost at 256"):
        assert words in result.err


def test_windows_of_the_loss_keep_to_documents(
    run: Callable[..., Any], tiny_hybrid: Path, text_file: Path, tmp_path: Path
) -> None:
    """If none is long enough, all that is printed says so."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for name in "ab":
        (texts / f"{name}.txt").write_text(name + text_file.read_text()[:299])
    arguments = ("evaluate", tiny_hybrid, "--text", texts, "--only", "loss", "--device", "cpu")
    words = "no document that was read is long enough, so windows lie across documents"

    result = run(*arguments, "--out", tmp_path / "long", "--lengths", "200")
    assert result.code == 0 and words not in " ".join((result.out + result.err).split())
    [row] = rows(tmp_path / "long", "loss")
    assert row["within_documents"] is True and row["n"] == 2 and row["starts"][0] == 0

    both = ("--out", tmp_path / "short", "--lengths", "350", "--kv-dtype", "both")
    result = run(*arguments, *both)
    assert result.code == 0
    for printed in (result.out, (tmp_path / "short" / "report.html").read_text()):
        assert words in " ".join(printed.split())
    [row] = rows(tmp_path / "short", "loss")
    assert row["within_documents"] is False


def test_what_was_measured_is_taken_over(
    run: Callable[..., Any],
    arguments: tuple[object, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    only = (*arguments, "--only", "needle", "--json")
    build, num_built, stop_at = NeedleTask.build, 0, 13

    def interrupted(*args: Any) -> Any:
        nonlocal num_built
        num_built += 1
        file = tmp_path / "results" / "needle.json"
        saved = rows(file.parent, "needle") if file.exists() else []
        if sum(len(row["depths"]) for row in saved) == stop_at:
            raise KeyboardInterrupt
        return build(*args)

    monkeypatch.setattr(NeedleTask, "build", interrupted)
    # One question at a time: the next is built when the last is answered.
    monkeypatch.setattr(asking, "free_bytes", lambda device: 0)
    stopped = run(*only)
    assert (stopped.code, stopped.out) == (130, "")
    assert "the same command goes on from here" in stopped.err
    saved = rows(tmp_path / "results", "needle")
    assert [len(row["depths"]) for row in saved] == [10, 3]

    stop_at = 0
    finished = run(*only)
    assert "needle: 13 cells were measured before" in finished.err
    # Fourteen questions before, the last of them cut short, and seven that were missing.
    assert num_built == 14 + 7
    again = run(*only)
    assert num_built == 21
    assert again.json["rows"] == finished.json["rows"] == rows(tmp_path / "results", "needle")
    assert finished.json["rows"][0]["hits"] == saved[0]["hits"]

    # More lengths join those that are there; another seed begins anew.
    run(*only, "--lengths", "320")
    assert [row["length"] for row in rows(tmp_path / "results", "needle")] == [192, 256, 320]
    result = run(*only, "--lengths", "320", "--seed", 5)
    assert "of another model, text or setting and will be replaced" in result.err
    assert [row["length"] for row in rows(tmp_path / "results", "needle")] == [320]


def test_a_plain_model_is_measured_beyond_its_context(
    run: Callable[..., Any], tiny_checkpoint: Path, text_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "results"
    arguments = ("--text", text_file, "--out", out, "--only", "cost,loss", "--json", *FAST)
    result = run("evaluate", tiny_checkpoint, *arguments)
    assert {row["case"] for row in result.json["rows"]} == {
        "loss.original",
        "kv_bytes.original",
        "prefill.original",
        "decode.original",
    }
    assert {row["length"] for row in result.json["rows"]} == {192, 256}
    assert {row["runtime"] for row in rows(out, "cost")} == {"transformers"}
    assert not (out / "needle.json").exists()
    # Nothing of transformers comes between the lines of progress.
    assert all(line.startswith(("loss over", "cost at")) for line in result.err.splitlines())


def test_figures_of_a_hybrid_from_before_the_engine_are_replaced(
    run: Callable[..., Any], arguments: tuple[object, ...], tmp_path: Path
) -> None:
    only = (*arguments, "--only", "cost", "--json")
    run(*only)
    file = tmp_path / "results" / "cost.json"
    old = json.loads(file.read_text())
    assert old["identity"].pop("runtime") == "longgen.engine"
    for row in old["rows"]:
        del row["runtime"]
    file.write_text(json.dumps(old))
    result = run(*only)
    assert "of another model, text or setting and will be replaced" in result.err
    assert {row["runtime"] for row in rows(file.parent, "cost")} == {"longgen.engine"}


def test_the_runs_own_heldout_text_and_the_folder_beside_it_are_the_default(
    run: Callable[..., Any], tiny_hybrid: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_hybrid, tmp_path / "run"))
    (folder / "training").mkdir()
    # Ends of documents (id 1) are special tokens, which neither test is to see.
    text = np.where(np.arange(3000) % 50 == 0, 1, 100).astype(np.uint16)
    np.save(folder / "training" / "heldout.npy", text)
    seen: list[np.ndarray] = []
    with pytest.MonkeyPatch.context() as patch:
        measure = "longgen.evaluate.run.loss_by_position"
        patch.setattr(measure, lambda model, tokens, *a, **k: seen.append(tokens) or stop())
        assert run("evaluate", folder, "--only", "loss").code == 130
    assert len(seen[0]) == 2940 and set(seen[0].tolist()) == {100}
    result = run("evaluate", folder, "--only", "loss", "--json")
    assert result.json["folder"] == str(folder / "evaluation")
    assert result.json["lengths"] == [128, 256, 512, 1024]
    assert result.json["rows"][0]["length"] == 1024
    assert (folder / "evaluation" / "loss.png").exists()


def stop() -> None:
    raise KeyboardInterrupt


def test_without_matplotlib_the_figures_are_kept(
    run: Callable[..., Any],
    arguments: tuple[object, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    result = run(*arguments, "--only", "cost")
    assert result.code == 0 and "no pictures: Drawing needs matplotlib" in result.err
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["cost.json"]


def test_bad_input_is_refused_before_a_model_is_loaded(
    refused: Callable[..., str],
    tiny_hybrid: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("longgen.cli.models.load_model", fail)
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"\x00\x01")
    text = ("--text", text_file)
    for arguments, words in (
        ([], "no text held out for it"),
        (["--text", tmp_path / "none"], "does not exist"),
        (["--text", binary], "skipped: 1 binary"),
        ([*text, "--lengths", "4K"], "4,096 needs 4,096"),
        ([*text, "--lengths", "4K", "--only", "loss"], "4,096 needs 4,097"),
        ([*text, "--lengths", "4K,many"], "'many'"),
        ([*text, "--only", "needle,taste"], "'taste'; choose from needle, loss, cost"),
        ([*text, "--out", text_file], "is a file"),
        ([*text, "--dtype", "int3"], "'int3'"),
        ([*text, "--device", "cuda:77"], "torch sees"),
    ):
        assert words in refused("evaluate", tiny_hybrid, *arguments), arguments
    assert not (tiny_hybrid / "evaluation").exists()
    assert "no checkpoint" in refused("evaluate", tmp_path, *text)


def test_short_text_is_repeated_only_if_asked(
    run: Callable[..., Any], refused: Callable[..., str], tiny_hybrid: Path, tmp_path: Path
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("rain on the mill, " * 9)
    arguments = ("evaluate", tiny_hybrid, "--text", short, "--out", tmp_path / "r", *FAST)
    only = ("--only", "needle", "--json")
    assert "192 needs 192" in refused(*arguments, *only)
    found = run(*arguments, *only, "--repeat-text").json["rows"]
    assert [row["haystack_repeated"] for row in found] == [True, True]


def test_files_of_another_model_are_not_taken_over(
    run: Callable[..., Any],
    arguments: tuple[object, ...],
    tiny_hybrid: Path,
    tmp_path: Path,
) -> None:
    only = ("--only", "loss", "--json")
    first = run(*arguments, *only).json["rows"]
    other = Path(shutil.copytree(tiny_hybrid, tmp_path / "other"))
    model = load_model(other)
    model.model.norm.weight.data[3] += 1
    model.save_pretrained(other)
    second = run(arguments[0], other, *arguments[2:], *only)
    assert "of another model" in second.err
    assert second.json["rows"][0]["value"] != first[0]["value"]
    third = run(*arguments, *only)
    assert third.json["rows"] == first
    assert json.loads((tmp_path / "results" / "loss.json").read_text())["rows"] == first


@pytest.mark.parametrize("name", ["notes.txt", "loss.json"])
def test_a_folder_with_other_content_is_refused(
    refused: Callable[..., str], arguments: tuple[object, ...], tmp_path: Path, name: str
) -> None:
    """Also where a file only has the name of a result."""
    other = tmp_path / "results" / name
    other.parent.mkdir()
    other.write_text('{"mine": 1}')
    assert f"({name})" in refused(*arguments, "--only", "loss")
    assert other.read_text() == '{"mine": 1}'


def test_eight_bits_beside_the_models_own_format(
    run: Callable[..., Any], arguments: tuple[object, ...], tmp_path: Path
) -> None:
    few = (*arguments, "--lengths", "192", "--only", "loss")
    result = run(*few, "--kv-dtype", "both")
    assert result.code == 0
    header, *lines, _ = result.out.splitlines()
    assert " ".join(header.split()) == "tokens model loss (nats)"
    assert [" ".join(line.split()[:-1]) for line in lines] == [
        "192 hybrid",
        "192 hybrid with fp8 cache",
    ]
    assert "nats a token" in result.err
    # Lines of the second say so.
    assert any(line.strip().startswith("fp8 ") for line in result.err.splitlines())
    folder = tmp_path / "results"
    names = ["kv_dtypes.json", "loss.json", "loss.png", "loss_fp8.json", "loss_fp8.png"]
    assert sorted(path.name for path in folder.iterdir()) == [*names, "report.html", "report.md"]
    (row,) = rows(folder, "loss_fp8")
    assert row["case"] == "loss.hybrid_fp8"
    # Its own files are no other content.
    assert run(*few, "--kv-dtype", "fp8").code == 0


def test_eight_bits_that_cannot_be(
    run: Callable[..., Any], arguments: tuple[object, ...], tiny_checkpoint: Path
) -> None:
    result = run(*arguments, "--kv-dtype", "int4")
    assert result.code != 0 and "'int4' is not known; give fp8, both" in result.err
    other = (arguments[0], tiny_checkpoint, *arguments[2:])
    result = run(*other, "--kv-dtype", "both")
    assert result.code != 0 and "is for hybrids, and the model isn't one" in result.err
