"""The 128K twins: what is prepared, which commands are run in which order, and what is reported."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from demo import twins_128k
from demo.commands import held
from demo.twins_128k import (
    FULL,
    QUICK,
    claim,
    collect,
    cut_pieces,
    data_recipe,
    queue_of,
    settings_of,
)
from longgen.cli.sources import read_data_recipe
from longgen.errors import UsageError
from longgen.evaluate.positions import LOSS_WINDOWS, lay_windows
from longgen.evaluate.results import write_results
from longgen.evaluate.text import tokenize_text
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
    assert [piece.name for piece in pieces] == ["0-a-0.txt", "1-a-100.txt", "2-c-0.txt"]
    ids = tokenize_text([tmp_path / "pieces"], tiny_tokenizer, 100).ids
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
    assert piece.name == "0-a-7.txt"
    assert piece.read_text(encoding="utf-8") == "\u00e9" * 75


def test_there_are_as_many_pieces_as_windows(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """The loss is then that of every piece; texts of one name are all there."""
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "text.txt").write_text(folder * 60)
    (tmp_path / "z.txt").write_text("z" * 1000)
    assert cut_pieces(tmp_path, tiny_tokenizer, 50, tmp_path / "out") == 8
    texts = [path.read_text() for path in sorted((tmp_path / "out").iterdir())]
    assert texts == [letter * 50 for letter in "xyzzzzzz"]
    text = tokenize_text([tmp_path / "out"], tiny_tokenizer, 49)
    windows = lay_windows(len(text), 50, 49, LOSS_WINDOWS, text.starts)
    assert windows == ([50 * i for i in range(8)], True)


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
        return [list(map(str, words)) for words in queue_of("hybrid", *places, FULL)]

    (begin, evaluation) = found()
    assert begin[:2] == ["extend", str(tmp_path / "base")]
    assert begin[3] == str(twins_128k.VARIANTS["hybrid"])
    assert evaluation[:2] == ["evaluate", str(tmp_path / "hybrid")]
    assert evaluation[-2:] == ["--kv-dtype", "both"]
    (tmp_path / "hybrid/training").mkdir(parents=True)
    (tmp_path / "hybrid/training/run.json").write_text("{}")
    assert found() == [[*begin, "--resume"], evaluation]
    (tmp_path / "hybrid/config.json").write_text("{}")
    assert found() == [evaluation]


def make_results(out: Path) -> None:
    """Write what both runs leave."""
    for variant, names in twins_128k.EVALUATIONS.items():
        folder = out / variant
        (folder / "training").mkdir(parents=True)
        lines = [{"step": step, "seconds": step} for step in (1, 2, 9)]
        (folder / "training/log.jsonl").write_text("\n".join(map(json.dumps, lines)))
        record = {
            "card": "a card",
            "training": {"seconds": 5.0, "tokens": 1536, "step": 3, "peak_bytes": None},
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
    # Of all steps, though 5 s are those since the run was gone on with.
    assert '<td>the hybrid</td><td class="r">12 s</td><td class="r">128</td>' in text
    assert '<td class="r">2.00 s</td>' in text
    saved = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert saved["name"] == "twins-128k" and saved["rows"] == rows
    for name in ("needle_hybrid.png", "needle_full.png", "loss.png"):
        assert (tmp_path / name).stat().st_size > 1000


def given_at(folder: Path, **changes: Any) -> argparse.Namespace:
    places = {name: folder / name for name in twins_128k.FOLDERS}
    for place in places.values():
        place.mkdir(exist_ok=True)
    return argparse.Namespace(**{**places, "quick": True, **changes})


def test_a_folder_is_one_runs(tmp_path: Path) -> None:
    out, given = tmp_path / "out", given_at(tmp_path)
    out.mkdir()
    claim(out, settings_of(given, QUICK))
    claim(out, settings_of(given, QUICK))
    other = given_at(tmp_path, quick=False)
    with pytest.raises(UsageError, match="quick was True and is now False"):
        claim(out, settings_of(other, FULL))
    (tmp_path / "more").mkdir()
    other = given_at(tmp_path, books=tmp_path / "more")
    with pytest.raises(UsageError, match=r"books was .*books' and is now .*more"):
        claim(out, settings_of(other, QUICK))
    foreign = tmp_path / "foreign"
    (foreign / "packed").mkdir(parents=True)
    with pytest.raises(UsageError, match="not empty"):
        claim(foreign, settings_of(given, QUICK))


def run_main(tmp_path: Path, *more: str) -> int:
    given = [f"--{name}={tmp_path / name}" for name in twins_128k.FOLDERS]
    return twins_128k.main([*given, *more])


def test_what_cannot_run_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(twins_128k.signal, "signal", lambda *_: None)
    monkeypatch.setattr(twins_128k.torch.cuda, "device_count", lambda: 0)
    out = f"--out={tmp_path / 'out'}"
    assert run_main(tmp_path, out) == 2
    assert "--quick takes the same path" in capsys.readouterr().err
    assert run_main(tmp_path, out, "--quick") == 2
    assert f"--books {tmp_path / 'books'} is not a folder" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    given_at(tmp_path)
    (tmp_path / "books/heldout").mkdir()
    assert run_main(tmp_path, f"--heldout={tmp_path / 'books/heldout'}", out, "--quick") == 2
    assert "what is held out must be in no other folder" in capsys.readouterr().err
    assert run_main(tmp_path, f"--out={tmp_path / 'heldout'}", "--quick") == 2
    assert "--heldout" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert run_main(tmp_path, f"--out={tmp_path / 'file'}", "--quick") == 2
    assert "error: " in capsys.readouterr().err
    (tmp_path / "out").mkdir()
    with held(tmp_path / "out"):
        assert run_main(tmp_path, out, "--quick") == 2
    assert "is at work in" in capsys.readouterr().err


def test_ctrl_c_is_told_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(twins_128k.signal, "signal", lambda *_: None)
    monkeypatch.setattr(twins_128k, "make", stopped)
    given_at(tmp_path)
    assert run_main(tmp_path, f"--out={tmp_path / 'out'}", "--quick") == 130
    assert "the same command goes on" in capsys.readouterr().err
