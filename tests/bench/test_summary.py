"""Ratios, tables and the picture of an inference benchmark, from rows made up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from longgen.bench import panels, summary
from longgen.bench.inference_plot import LABELS, plot_inference
from longgen.errors import UsageError

Row = dict[str, Any]
# variant: seconds of a prefill, milliseconds a token, GiB of cache, at 128K tokens
FIGURES = {
    "hybrid": (5.8, 10.2, 24.7),
    "full": (10.2, 20.0, 64.0),
    "transformers": (11.5, 118.0, 64.0),
}


def rows(*lengths: int, fit: int = 1 << 18) -> list[Row]:
    """Give rows of every variant; all but the hybrid fail where a length is above `fit`."""
    found: list[Row] = []

    def add(case: str, unit: str, length: int, batch: int, value: float, **extra: Any) -> None:
        row: Row = {"case": case, "unit": unit, "length": length, "batch": batch, **extra}
        if length > fit and not case.endswith("hybrid"):
            found.append(row | {"value": None, "error": "It does not fit."})
            return
        measured = {"value": value, "spread": [0.97 * value, 1.1 * value]}
        found.append(row | measured | {"ceiling": 0.8 * value, "share_of_ceiling": 0.8})

    for length in lengths:
        for name, (prefill, decode, cache) in FIGURES.items():
            scale = length / 131072
            for chunk in (length,) if name == "transformers" else (8192, length):
                seconds = prefill * scale * (1.03 if chunk < length else 1)
                flops = 1e15 * (1.0 if name == "hybrid" else 1.8)
                more = {"prefill_chunk": chunk, "flops": flops}
                add(f"prefill.{name}", "s", length, 1, seconds, **more)
            size = cache * scale * 2**30
            more = {"formula_bytes": size, "work_bytes": 2 << 30, "max_sequences": 4}
            add(f"kv_bytes.{name}", "bytes", length, 1, size, **more)
            for batch in (1, 4):
                ms = decode * scale * (1 + batch / 4)
                more = {"bytes": decode, "tokens_per_second": 1000 * batch / ms}
                add(f"decode.{name}", "ms per token", length, batch, ms, **more)
    return found


def test_ratios_are_of_the_better_way_of_each() -> None:
    found = {
        (ratio["metric"], ratio["length"], ratio.get("batch"), ratio["against"]): ratio
        for ratio in summary.ratios(rows(32768, 131072, 1048576))
    }
    ratio = found["prefill", 131072, 1, "full"]
    assert ratio["value"] == pytest.approx(10.2 / 5.8) and ratio["ceiling"] == 1.8
    ratio = found["decode", 131072, 4, "transformers"]
    assert ratio["value"] == ratio["ceiling"] == pytest.approx(118 / 10.2)
    assert found["kv_bytes", 32768, 1, "full"]["value"] == pytest.approx(64 / 24.7)
    assert found["throughput", 32768, None, "full"]["value"] == pytest.approx(20 / 10.2)
    assert not any(length == 1048576 for _, length, _, _ in found)


def test_tables_say_who_is_how_much_faster() -> None:
    given = rows(131072, 1048576)
    for table in (summary.prefill_table, summary.decode_table, summary.memory_table):
        head, lines = table(given)
        assert all(len(line) == len(head) for line in lines)
    _, lines = summary.prefill_table(given)
    assert lines[0] == ["128K", "hybrid", "5.97", "5.80", "80%", ""]
    assert lines[1] == ["", "full", "10.5", "10.2", "80%", "1.76x (1.80x)"]
    assert lines[2] == ["", "transformers", "", "11.5", "80%", "1.98x (1.80x)"]
    assert lines[4] == ["", "full", "-", "-", "", ""]
    _, lines = summary.decode_table(given)
    assert lines[0] == ["128K", "1", "hybrid", "12.8", "80%", "78.4", ""]
    assert lines[3][:3] == ["", "4", "hybrid"] and lines[4][-1] == "1.96x (1.96x)"
    _, lines = summary.memory_table(given)
    assert lines[0] == ["128K", "hybrid", "24.7 GiB", "24.7 GiB", "61.4%", "2.00 GiB", "4"]
    assert lines[1] == ["", "full", "64.0 GiB", "64.0 GiB", "", "2.00 GiB", "4"]
    # Where full does not fit there is nothing to hold less than.
    assert lines[3] == ["1M", "hybrid", "198 GiB", "198 GiB", "", "2.00 GiB", "4"]
    failed = summary.failures(given)
    assert "prefill.full, 1M: It does not fit." in failed
    assert "decode.full, 1M, 4 sequences: It does not fit." in failed
    (line,) = [x for x in summary.throughput_lines(given) if x.endswith("full.")]
    assert "1.96 times" in line


def test_tables_of_nothing_are_empty() -> None:
    for table in (summary.prefill_table, summary.decode_table, summary.memory_table):
        assert table([])[1] == []
    assert summary.ratios([]) == summary.failures([]) == summary.throughput_lines([]) == []


def test_the_picture_holds_all_lines_and_all_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib", reason="an extra: longgen[plots]")
    figures: list[Any] = []
    save = panels.save
    monkeypatch.setattr(panels, "save", lambda fig, path: (figures.append(fig), save(fig, path))[1])
    given = rows(32768, 131072, 262144, 1048576)
    file = plot_inference(given, tmp_path / "i.png", title="A model on a card " * 9)
    assert file.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and file.stat().st_size > 20_000
    (figure,) = figures
    figure.canvas.draw()
    assert len(figure.axes) == 4
    texts = [figure._suptitle, *figure.legends]
    for axes in figure.axes:
        texts += [axes.title, *axes.texts]
        # Three variants, the last figure of each written out.
        assert len(axes.texts) == 3
        points = {len(line.get_xdata()) for line in axes.lines} - {0}
        assert points == {4, 3}
    page = figure.bbox
    for text in texts:
        box = text.get_window_extent()
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= page.x1 and box.y1 <= page.y1
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == [
        *(LABELS[name] for name in FIGURES),
        "at the device's own matmul and copy rates",
    ]


def test_one_row_is_a_picture_and_none_is_not(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="an extra: longgen[plots]")
    given = rows(32768)
    assert plot_inference(given[:1], tmp_path / "one.png", title="").is_file()
    empty = [{**row, "value": None} for row in given]
    with pytest.raises(UsageError, match="nothing to draw"):
        plot_inference(empty, tmp_path / "none.png", title="")


def test_the_best_batch_of_each() -> None:
    found = rows(131072)
    head, lines = summary.throughput_table(found)
    assert head == ["tokens", "variant", "fit", "best with", "tokens/s in all", "hybrid is"]
    assert [line[:4] for line in lines] == [
        ["128K", "hybrid", "4", "4"],
        ["", "full", "4", "4"],
        ["", "transformers", "4", "4"],
    ]
    # 4 sequences in 2 x 10.2 ms, and in 2 x 20 ms.
    assert [line[4] for line in lines[:2]] == ["196", "100"] and lines[1][5] == "1.96x"
    slow = [
        row | {"tokens_per_second": 1.0} if row["batch"] == 4 else row
        for row in found
        if row["case"].startswith("decode")
    ]
    assert [row["batch"] for row in summary.best_batches(slow).values()] == [1, 1, 1]


def test_the_best_batch_is_not_known_where_a_run_ended_early() -> None:
    whole = rows(131072)
    short = [row for row in whole if (row["case"], row["batch"]) != ("decode.full", 4)]
    assert [name for _, name in summary.best_batches(short)] == ["hybrid", "transformers"]
    assert [line[1] for line in summary.throughput_table(short)[1]] == ["hybrid", "transformers"]
    assert not any("as full" in line for line in summary.throughput_lines(short))
    # Where no more would fit, nothing is missing.
    one = [row | {"max_sequences": 1} if row["case"] == "kv_bytes.full" else row for row in short]
    assert [name for _, name in summary.best_batches(one)] == ["hybrid", "full", "transformers"]
    assert any("as full" in line for line in summary.throughput_lines(one))
