"""The table, ratios and picture of a training benchmark, from rows that are made up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from longgen.bench.train_plot import plot_train
from longgen.bench.train_summary import (
    checkpointing,
    communication,
    failures,
    ratios,
    rows_of,
    train_table,
)
from longgen.errors import UsageError

SECONDS = {"hybrid": 5.5, "full": 10.1, "transformers": 13.9}


def make_rows(**changes: Any) -> list[dict[str, Any]]:
    """Return rows at three lengths; time grows with the length, all full faster."""
    rows = []
    for length, factor in ((32768, 0.2), (131072, 1.0), (524288, 6.0)):
        for name, seconds in SECONDS.items():
            value = seconds * factor * (1.0 if name == "hybrid" else max(factor, 1) ** 0.3)
            row = {
                "case": f"train_step.{name}",
                "length": length,
                "value": value,
                "spread": [0.98 * value, 1.03 * value],
                "n": 5,
                "flops": 2.0 if name == "hybrid" else 3.6,
                "mfu": 0.45 / (1 + SECONDS[name] / 50),
                "tokens_per_second_per_gpu": length / value,
                "peak_bytes": int(length * 3e5),
            }
            if name != "transformers":
                row["planned_bytes"] = int(length * 3.1e5)
            rows.append(row | changes)
    return rows


def broken(rows: list[dict[str, Any]], index: int) -> list[dict[str, Any]]:
    error = {"value": None, "n": 0, "error": "Out of memory at 524,288 tokens."}
    kept = {key: rows[index][key] for key in ("case", "length", "flops")}
    return [*rows[:index], kept | error, *rows[index + 1 :]]


def test_rows_come_in_the_order_of_tables() -> None:
    rows = make_rows()
    other = {**rows[0], "case": "prefill.hybrid"}
    found = list(rows_of([other, *reversed(rows)]))
    assert found[:3] == [(32768, "hybrid"), (32768, "full"), (32768, "transformers")]
    assert len(found) == 9


def test_communication_is_said_where_it_was_measured() -> None:
    rows = make_rows()
    assert communication(rows) == []
    rows[3] |= {"communication_seconds": 0.55, "communication_exposed_seconds": 0.11}
    assert communication(broken(rows, 4)) == [
        "train_step.hybrid, 128K: communication is 10.0% of the step, 2.0% with nothing beside."
    ]


def test_checkpointing_is_said_for_each_where_it_differs() -> None:
    rows = make_rows(checkpointing="selective")
    for row in rows:
        if row["case"].endswith(".transformers"):
            row["checkpointing"] = "full"
    assert checkpointing(rows) == "selective"
    rows[0] |= {"checkpointing": "off"}
    assert (
        checkpointing(rows[:6]) == "off (hybrid 32K), selective (full 32K, hybrid 128K, full 128K)"
    )
    assert checkpointing(rows[2:3]) == "full" and checkpointing([]) == ""


def test_ratios_stand_beside_those_of_flops() -> None:
    found = ratios(broken(make_rows(), 7))
    assert len(found) == 5
    one = next(r for r in found if (r["length"], r["against"]) == (131072, "full"))
    assert one["value"] == pytest.approx(10.1 / 5.5) and one["ceiling"] == pytest.approx(1.8)


def test_the_table_says_what_is_there_and_what_is_not() -> None:
    rows = broken(make_rows(), 8)
    head, lines = train_table(rows)
    assert all(len(line) == len(head) for line in lines)
    assert lines[0][:3] == ["32K", "hybrid", "1.10"] and lines[1][0] == ""
    assert lines[4] == [
        "",
        "full",
        "10.1",
        "12,977",
        "37%",
        "36.6 GiB",
        "37.8 GiB",
        "1.84x (1.80x)",
    ]
    assert lines[8][:3] == ["", "transformers", "-"]
    assert failures(rows) == ["train_step.transformers, 512K: Out of memory at 524,288 tokens."]


@pytest.mark.parametrize("changes", [{}, {"mfu": None, "peak_bytes": None}])
def test_a_picture_is_drawn_of_what_is_known(changes: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="an extra: longgen[plots]")
    path = plot_train(broken(make_rows(**changes), 8), tmp_path / "train.png", title="A title")
    assert path.stat().st_size > 10_000
    with pytest.raises(UsageError, match="nothing to draw"):
        plot_train([{**row, "value": None} for row in make_rows()], path, title="")


def test_what_was_planned_shows_of_a_single_length_too(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="an extra: longgen[plots]")
    from matplotlib.image import imread

    rows = [row for row in make_rows() if row["length"] == 131072][:2]
    pictures = []
    for factor in (1, 2):
        planned = [{**row, "planned_bytes": factor * 10**10} for row in rows]
        pictures.append(imread(plot_train(planned, tmp_path / f"{factor}.png", title="")))
    # Both are below what was taken, so that bars alone differ, in the last panel.
    shape, width = pictures[0].shape, pictures[0].shape[1]
    assert pictures[1].shape == shape
    differs = (pictures[0] != pictures[1]).any((0, 2))
    assert not differs[: width // 2].any() and differs[2 * width // 3 :].any()
