"""benchmarks.recall_probe asks for what was planted, and counts what a model answers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import filed, recall_probe, tables
from longgen.data import RecallText
from longgen.data.recall import Planted
from longgen.recall_kinds import KINDS

LENGTH = 20_000


class Oracle:
    """Foretell the tokens at the positions that it knows, and others wrong."""

    device = torch.device("cpu")

    def __init__(self, size: int, known: Callable[[int], bool]) -> None:
        self.size, self.known = size, known

    def model(self, ids: torch.Tensor, use_cache: bool) -> Any:
        shifted = torch.roll(ids, -1, 1)
        wrong = torch.tensor([[not self.known(i + 1) for i in range(ids.shape[1])]])
        return SimpleNamespace(last_hidden_state=((shifted + wrong) % self.size)[..., None])

    def lm_head(self, hidden: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = torch.nn.functional.one_hot(hidden[..., 0], self.size) * 20.0
        return found


@pytest.fixture
def text() -> list[int]:
    return np.random.default_rng(0).integers(2, 8, LENGTH).tolist()


def test_each_kind_is_asked_for_its_own(tiny_tokenizer: Any, text: list[int]) -> None:
    for kind in KINDS:
        recall = RecallText(tiny_tokenizer, kinds=kind, records_per_sequence=30)
        ids, pairs = recall.plant(np.array(text), np.random.default_rng(1))
        numbers = 0
        for pair in pairs:
            places = recall_probe.asked(pair, ids, tiny_tokenizer)
            told = tiny_tokenizer.decode(ids[list(pair.second)])
            found = tiny_tokenizer.decode(ids[places]) if places else ""
            if kind == "copies":
                assert places == list(pair.second)[8:]
                continue
            # The last number of the line, if it is long enough: what words and letters lead.
            expected = re.findall(r"\d+", told)[-1:]
            assert found == "".join(one for one in expected if len(one) >= 3), told
            numbers += bool(found)
            if found:
                assert found in tiny_tokenizer.decode(ids[list(pair.first)])
        assert kind == "copies" or numbers >= 15


def test_answers_are_counted(tiny_tokenizer: Any, text: list[int]) -> None:
    size = len(tiny_tokenizer)
    all_known = recall_probe.probe(Oracle(size, lambda i: True), tiny_tokenizer, [text, text])
    assert {row["kind"] for row in all_known} == set(KINDS)
    assert {row["text"] for row in all_known} == {0, 1}
    assert all(row["right"] and row["share"] == 1 and row["loss"] < 0.01 for row in all_known)
    none = recall_probe.probe(Oracle(size, lambda i: False), tiny_tokenizer, [text, text])
    assert [row["distance"] for row in none] == [row["distance"] for row in all_known]
    assert not any(row["right"] or row["share"] for row in none)
    half = recall_probe.probe(Oracle(size, lambda i: i % 2 == 0), tiny_tokenizer, [text])
    codes = [row for row in half if row["kind"] == "codes"]
    assert {row["share"] for row in codes} == {0.5} and not any(row["right"] for row in codes)
    assert recall_probe.summarize(half, "hybrid", LENGTH)[0]["token_value"] == 0.5


def test_rows_are_by_distance() -> None:
    rows = [
        {"kind": "codes", "distance": distance, "right": right, "share": 0.5 + right / 2, "loss": 1}
        for distance, right in ((0, True), (99, False), (100, True), (1599, False), (1200, True))
    ]
    (row,) = recall_probe.summarize(rows, "full", 1600)
    assert row["case"] == "recall_codes.full" and row["length"] == 1600 and row["n"] == 5
    assert row["edges"] == [0, 100, 200, 400, 800, 1200, 1600]
    assert row["value"] == pytest.approx(0.6) and row["token_value"] == pytest.approx(0.8)
    assert row["n_by_distance"] == [2, 1, 0, 0, 0, 2]
    assert row["by_distance"] == [0.5, 1, None, None, None, 0.5]


def test_the_command_writes_results_that_make_a_table(
    make_checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = make_checkpoint(tmp_path / "model", max_position_embeddings=512)
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "long.txt").write_text("the river runs past the mill. " * 100)
    (texts / "short.txt").write_text("no.")
    out = tmp_path / "2026-12-01_cpu_recall-test.json"
    given = [f"hybrid={folder}", f"full={folder}", "--text", str(texts)]
    given += ["--context", "512", "--out", str(out)]
    assert recall_probe.main(given) == 0
    rows = json.loads(out.read_text())["rows"]
    assert {row["case"] for row in rows} == {
        f"recall_{kind}.{name}" for kind in KINDS for name in ("hybrid", "full")
    }
    monkeypatch.setattr(filed, "RESULTS", tmp_path)
    table = tables.recall("recall-test")
    assert len([line for line in table if line.startswith("| ") and "planted" not in line]) == 6
    written = out.read_bytes()
    assert "answered" in capsys.readouterr().out
    for wrong, words in (
        ([str(folder), *given[1:]], "is not NAME=DIR"),
        ([f"={folder}", *given[1:]], "is not NAME=DIR"),
        ([given[0], given[0], *given[2:]], "hybrid is there twice"),
        ([given[0], "full=/nowhere", *given[2:]], "/nowhere"),
        ([*given[:-3], "64K", "--out", str(out)], "has 65,536 tokens"),
        ([*given[:-3], "40", "--out", str(out)], "no room for every kind"),
    ):
        assert recall_probe.main(wrong) == 2
        printed = capsys.readouterr()
        assert words in printed.err and "answered" not in printed.out
    assert out.read_bytes() == written


def test_a_number_that_shares_a_token_is_not_asked_for() -> None:
    class Words:
        """Spell a line as whole words."""

        words = ("the code of ", "Ada", " is ", "968", "015", ".", "15.")

        def decode(self, ids: Any) -> str:
            return "".join(self.words[i] for i in ids)

    pair = Planted("facts", range(0, 1), range(1, 7))
    whole, shared = (np.array([0, 0, 1, 2, 3, last, 5]) for last in (4, 6))
    assert recall_probe.asked(pair, whole, Words()) == [4, 5]
    assert recall_probe.asked(pair, shared, Words()) == []
