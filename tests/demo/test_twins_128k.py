"""The 128K twins: what is prepared, which commands are run in which order, and what is reported."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from demo import twins_128k
from demo.twins_128k import FULL, QUICK, collect, commands, cut_pieces, data_recipe, run_twins
from longgen.cli.sources import read_data_recipe
from longgen.errors import UsageError
from longgen.evaluate.results import write_results
from longgen.evaluate.run import tokenize_text
from longgen.train.config import read_recipe


def test_the_twins_differ_in_their_full_layers_alone() -> None:
    hybrid, full = (read_recipe(path) for path in twins_128k.VARIANTS.values())
    assert (hybrid.pop("full_layers"), full.pop("full_layers")) == ("middle", "all")
    assert hybrid.pop("pattern") == "default"
    assert hybrid == full


@pytest.mark.parametrize("sizes", [FULL, QUICK], ids=["full", "quick"])
def test_the_data_recipe_is_filled_in(sizes: Any, tmp_path: Path) -> None:
    books, code = tmp_path / 'my "books"', tmp_path / "code"
    found = read_data_recipe(data_recipe(tmp_path, books, code, sizes))
    assert found.context == sizes.context
    data = {name: source["data"] for name, source in found.sources.items()}
    assert {name: [str(path) for path in paths] for name, paths in data.items()} == {
        f"{kind}-{length}": [str(path)]
        for length in ("128k", "32k")
        for kind, path in (("books", books), ("code", code))
    }
    longest = [source.get("max_length", sizes.context) for source in found.sources.values()]
    assert max(longest) == sizes.context and min(longest) == sizes.context // 4


def test_pieces_are_of_one_text_and_windows_lie_upon_them(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    texts = tmp_path / "texts"
    (texts / "more").mkdir(parents=True)
    (texts / "a.txt").write_text("a" * 250)
    (texts / "b.txt").write_text("b" * 99)
    (texts / "more/c.txt").write_text("c" * 100)
    (texts / "d.md").write_text("d" * 500)
    assert cut_pieces(texts, tiny_tokenizer, 100, tmp_path / "pieces") == 3
    pieces = sorted((tmp_path / "pieces").iterdir())
    assert [piece.read_text() for piece in pieces] == ["a" * 100, "a" * 100, "c" * 100]
    ids = tokenize_text([tmp_path / "pieces"], tiny_tokenizer, 100)
    assert len(ids) == 300
    assert all(len(set(ids[start : start + 100])) == 1 for start in (0, 100, 200))
    # A second time they are taken as they are.
    assert cut_pieces(tmp_path / "nowhere", tiny_tokenizer, 100, tmp_path / "pieces") == 3


def test_a_piece_begins_where_its_text_keeps_its_tokens(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Of two tokens for a letter, half a letter at an end would become another's three."""
    (tmp_path / "a.txt").write_text("\u00e9" * 3 + "x" + "\u00e9" * 78, encoding="utf-8")
    assert cut_pieces(tmp_path, tiny_tokenizer, 150, tmp_path / "pieces") == 1
    (piece,) = (tmp_path / "pieces").iterdir()
    assert piece.name == "a-7.txt"
    assert piece.read_text(encoding="utf-8") == "\u00e9" * 75


def test_text_too_short_for_a_piece_is_refused(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("a" * 99)
    with pytest.raises(UsageError, match="has 100 tokens, which the loss"):
        cut_pieces(tmp_path, tiny_tokenizer, 100, tmp_path / "pieces")
    assert not (tmp_path / "pieces").exists()


def test_training_is_begun_gone_on_with_and_left_out(tmp_path: Path) -> None:
    def found() -> list[list[str]]:
        places = tmp_path / "base", tmp_path / "packed", tmp_path / "pieces", tmp_path
        return [list(map(str, words)) for words in commands("hybrid", *places, FULL)]

    (begin, evaluation) = found()
    assert begin[:2] == ["extend", str(tmp_path / "base")]
    assert begin[3] == str(twins_128k.VARIANTS["hybrid"])
    assert evaluation[:2] == ["evaluate", str(tmp_path / "hybrid")]
    assert evaluation[-2:] == ["--kv-dtype", "both"]
    (tmp_path / "hybrid/training").mkdir(parents=True)
    (tmp_path / "hybrid/training/run.json").write_text("{}")
    assert found() == [["extend", "--out", str(tmp_path / "hybrid"), "--resume"], evaluation]
    (tmp_path / "hybrid/config.json").write_text("{}")
    assert found() == [evaluation]


class Script:
    """Stands for `longgen`: runs a line of Python, and notes when it began and on which GPU."""

    def __init__(self) -> None:
        self.began: list[tuple[str, int | None]] = []
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.beside: list[int] = []

    def __call__(self, name: str, code: str, *, log: Path, gpu: int | None) -> Any:
        self.beside.append(sum(one.poll() is None for one in self.running.values()))
        self.began.append((name, gpu))
        with log.open("ab") as stream:
            process = subprocess.Popen([sys.executable, "-c", code], stdout=stream, stderr=stream)
        self.running[name] = process
        return process


@pytest.mark.parametrize("gpus", [0, 1, 2])
def test_twins_run_beside_each_other_if_there_is_a_gpu_for_each(
    gpus: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = Script()
    monkeypatch.setattr(twins_128k, "longgen", script)
    wait = "import time; time.sleep(1.5)"
    queues: Any = {
        "hybrid": [["h1", wait], ["h2", "print('found all')"]],
        "full": [["f1", wait], ["f2", ""]],
    }
    run_twins(queues, tmp_path, gpus)
    if gpus == 2:
        assert script.began[:2] == [("h1", 0), ("f1", 1)] and script.beside[1] == 1
        assert set(script.began[2:]) == {("h2", 0), ("f2", 1)}
    else:
        assert script.began == [(name, None) for name in ("h1", "h2", "f1", "f2")]
        assert script.beside == [0, 0, 0, 0]
    assert (tmp_path / "hybrid.log").read_text() == "found all\n"


def test_a_twin_that_fails_stops_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = Script()
    monkeypatch.setattr(twins_128k, "longgen", script)
    saves = (
        "import pathlib, signal, sys, time\n"
        f"def save(*_): pathlib.Path({str(tmp_path / 'saved')!r}).touch(); sys.exit(130)\n"
        "signal.signal(signal.SIGINT, save)\n"
        f"pathlib.Path({str(tmp_path / 'ready')!r}).touch()\n"
        "time.sleep(60)\n"
    )
    fails = (
        "import pathlib, sys, time\n"
        f"while not pathlib.Path({str(tmp_path / 'ready')!r}).exists(): time.sleep(0.05)\n"
        "sys.exit('error: the disk is full')\n"
    )
    began = time.monotonic()
    queues: Any = {"hybrid": [["h", saves]], "full": [["f", fails], ["f2", ""]]}
    with pytest.raises(UsageError, match=r"all layers full stopped with exit status 1.*\n.*disk"):
        run_twins(queues, tmp_path, 2)
    assert time.monotonic() - began < 50
    assert (tmp_path / "saved").exists()
    assert [name for name, _ in script.began] == ["h", "f"]


def make_results(out: Path) -> None:
    """Write what both runs leave."""
    for variant, names in twins_128k.EVALUATIONS.items():
        folder = out / variant
        (folder / "training").mkdir(parents=True)
        lines = [{"step": step, "seconds": step} for step in (1, 2, 9)]
        (folder / "training/log.jsonl").write_text("\n".join(map(json.dumps, lines)))
        record = {
            "training": {"seconds": 12.0, "tokens": 1536, "step": 3, "peak_bytes": None},
            "config": {"model": "base", "out": "o", "data": ["d"], "steps": 3},
            "rope_theta": 1e6,
            "packing": {
                "sets": [
                    {
                        "name": "books",
                        "weight": 1.0,
                        "sequences": 3,
                        "rows": 9,
                        "packed_tokens": 4608,
                        "folder": "private",
                    }
                ]
            },
        }
        (folder / "longgen.json").write_text(json.dumps(record))
        for name in names:
            metric, _, kind = name.partition("_")
            row: dict[str, Any] = {
                "case": f"{metric}.{variant}" + (f"_{kind}" if kind else ""),
                "length": 512,
                "value": 0.5,
                "n": 2,
            }
            if metric == "needle":
                row |= {
                    "unit": "accuracy",
                    "interval": [0.1, 0.9],
                    "depths": [0.0, 1.0],
                    "accuracy_by_depth": [0.0, 1.0],
                    "hits": [[0], [1]],
                    "samples": 1,
                }
            else:
                row |= {
                    "unit": "nats per token",
                    "edges": [0, 256, 512],
                    "mean": [0.6, 0.4],
                    "standard_error": [0.1, 0.1],
                }
            write_results(folder / "evaluation" / f"{name}.json", metric, [row], command="", seed=0)


def test_results_and_the_page_are_of_both(tmp_path: Path) -> None:
    make_results(tmp_path)
    rows, trainings = collect(tmp_path)
    cases = [row["case"] for row in rows]
    assert cases == [
        *("needle.hybrid", "loss.hybrid", "needle.hybrid_fp8", "loss.hybrid_fp8"),
        *("needle.full", "loss.full"),
    ]
    assert trainings["full"]["step_seconds"] == {"median": 2.0, "sum": 12.0}
    assert trainings["full"]["config"] == {"steps": 3}
    assert "folder" not in trainings["full"]["sets"][0]
    page = twins_128k.write_page(tmp_path, rows, trainings, QUICK, "command")
    text = page.read_text(encoding="utf-8")
    assert "128" in text and "2.00 s" in text  # tokens a second, and of the median step
    saved = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert saved["name"] == "twins-128k" and saved["rows"] == rows
    for name in ("needle_hybrid.png", "needle_full.png", "loss.png"):
        assert (tmp_path / name).stat().st_size > 1000


def test_what_cannot_run_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(twins_128k.torch.cuda, "device_count", lambda: 0)
    given = [f"--{name}={tmp_path / name}" for name in ("books", "code", "heldout")]
    assert twins_128k.main(given) == 2
    assert "--quick takes the same path" in capsys.readouterr().err
    assert twins_128k.main([*given, "--quick"]) == 2
    assert f"--books {tmp_path / 'books'} is not a folder" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
