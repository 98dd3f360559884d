import json
import math
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longgen.errors import UsageError
from longgen.evaluate import results
from longgen.evaluate.results import (
    commit,
    read_results,
    say_bytes,
    say_tokens,
    select,
    variant,
    wilson_interval,
    write_atomically,
    write_results,
)

ROWS = [{"case": "needle.hybrid", "length": 4096, "value": 0.5, "unit": "accuracy", "n": 10}]


def test_round_trip(tmp_path: Path) -> None:
    file = write_results(
        tmp_path / "deep" / "needle.json",
        "needle",
        ROWS,
        command="longgen evaluate DIR",
        seed=7,
        extra={"model": tmp_path, "minutes": 1.5},
        device="cpu",
    )
    document = read_results(file)
    assert document["rows"] == ROWS
    assert (document["command"], document["seed"]) == ("longgen evaluate DIR", 7)
    assert (document["model"], document["minutes"]) == (str(tmp_path), 1.5)
    assert document["card"].startswith("CPU: ") and document["gpus"] == 0
    assert {"python", "torch", "transformers", "longgen"} <= document["versions"].keys()
    assert document["versions"]["torch"] == torch.__version__
    assert list(document)[-1] == "rows"  # what made the figures stands above them


def test_folder_gets_a_file_named_by_date_card_and_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "card_name", lambda device: "NVIDIA H200")
    file = write_results(tmp_path, "Needle grid", ROWS, command="c", seed=0, device="cuda", gpus=2)
    document = read_results(file)
    assert file.name == f"{document['date'][:10]}_nvidia-h200_needle-grid.json"
    assert (document["card"], document["gpus"]) == ("NVIDIA H200", 2)


def test_figures_become_plain_json(tmp_path: Path) -> None:
    row = {
        "case": "x.y",
        "value": np.float32(0.5),
        "n": np.int64(3),
        "grid": np.eye(2),
        "tensor": torch.ones(2),
        "tuple": (1, math.nan),
        "path": Path("a"),
        "inf": math.inf,
        "ok": True,
    }
    (read,) = read_results(write_results(tmp_path / "a.json", "a", [row], command="c", seed=0))[
        "rows"
    ]
    assert read == {
        "case": "x.y",
        "value": 0.5,
        "n": 3,
        "grid": [[1, 0], [0, 1]],
        "tensor": [1, 1],
        "tuple": [1, None],
        "path": "a",
        "inf": None,
        "ok": True,
    }


def test_extra_may_not_replace_the_shape(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="card, rows"):
        write_results(
            tmp_path, "a", ROWS, command="c", seed=0, extra={"rows": 1, "card": 2, "fine": 3}
        )


def test_interrupted_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.json"
    write_atomically(file, "old")

    def interrupt(fd: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(file, "new")
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "Cannot read results"),
        ("{", "Cannot read results"),
        ("[]", "lacks card"),
        (json.dumps({"card": "x", "rows": []}), "lacks gpus, date, commit, command"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, text: str | None, words: str) -> None:
    file = tmp_path / "bad.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UsageError, match=words) as info:
        read_results(file)
    assert "bad.json" in str(info.value)


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_commit_in_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tmp_path / "longgen" / "evaluate" / "results.py"
    module.parent.mkdir(parents=True)
    module.write_text("")
    monkeypatch.setattr(results, "__file__", str(module))

    def git(*words: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        done = subprocess.run(
            ["git", *who, *words], cwd=tmp_path, check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    assert commit() == f"longgen {results.versions()['longgen']}"
    git("init", "-q")
    assert commit().startswith("longgen ")  # nothing committed yet
    git("add", ".")
    git("commit", "-q", "-m", "one")
    git("tag", "v1")
    assert commit() == git("rev-parse", "HEAD")
    module.write_text("changed")
    assert commit() == git("rev-parse", "HEAD") + "-dirty"


def test_select_sorts_models_and_lengths() -> None:
    cases = ["hybrid", "mine", "full", "original"]
    rows = [{"case": f"decode.{case}", "length": n} for n in (2, 1) for case in cases]
    found = select([*rows, {"case": "decode.x.full", "length": 1}], "decode")
    assert list(found) == ["original", "full", "hybrid", "mine"]
    assert [row["length"] for row in found["full"]] == [1, 2]
    assert variant(rows[0]) == "hybrid"


# Published values of the interval, to four places: Newcombe 1998 (81/263, 15/148, 0/20, 1/29).
@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_known_values(hits: int, n: int, low: float, high: float) -> None:
    assert wilson_interval(hits, n) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_ends_solve_the_score_test(counts: tuple[int, int]) -> None:
    """Each end p is where the observed share lies 1.96 of p's own standard errors away."""
    hits, n = counts
    low, high = wilson_interval(hits, n)
    assert 0 <= low <= hits / n <= high <= 1
    for end in (low, high):
        squared = (hits / n - end) ** 2
        assert squared == pytest.approx(1.959963984540054**2 * end * (1 - end) / n, abs=1e-12)
    assert wilson_interval(n - hits, n) == pytest.approx((1 - high, 1 - low))


def test_words_for_sizes() -> None:
    assert [say_tokens(n) for n in (512, 1000, 1024, 4096, 5000, 131072, 3 << 19, 2**20)] == [
        "512", "1,000", "1K", "4K", "5,000", "128K", "1536K", "1M",
    ]  # fmt: skip
    sizes = (0, 1023, 1536, 2**20 - 1, 2**20, 45 * 2**20 + 2**19, 900 * 2**20, 64 * 2**30, 2**41)
    assert [say_bytes(n) for n in sizes] == [
        "0 bytes", "1,023 bytes", "1.50 KiB", "1,024 KiB", "1.00 MiB", "45.5 MiB", "900 MiB",
        "64.0 GiB", "2,048 GiB",
    ]  # fmt: skip
