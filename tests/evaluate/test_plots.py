import struct
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from longgen.errors import UsageError
from longgen.evaluate import plots
from longgen.evaluate.cost import Cost
from longgen.evaluate.needle import NeedleCell, NeedleResult, NeedleTask
from longgen.evaluate.plots import plot_decode_time, plot_kv_bytes, plot_loss, plot_needle
from longgen.evaluate.positions import PositionLoss
from longgen.evaluate.results import Rows

pytest.importorskip("matplotlib", reason="an extra: longgen[plots]")
NAME = "SmolLM2-135M-Instruct, hybrid at 32K with a name that is rather long"


def needle_rows(variant: str = "hybrid", lengths: int = 4, depths: int = 11) -> Rows:
    task = NeedleTask(lengths=tuple(4096 << i for i in range(lengths)), num_depths=depths)
    cells = tuple(
        NeedleCell(n, d, tuple(s < (10 - i) for s in range(10)))
        for i, n in enumerate(task.lengths)
        for d in task.depths
    )
    return NeedleResult(task, cells, 10**6).rows(variant)


def loss_rows(*variants: str) -> Rows:
    edges = tuple(range(0, 32769, 2048))
    mean = [1.5 + 1 / (b + 1) for b in range(16)]
    return [
        row
        for i, variant in enumerate(variants)
        for row in PositionLoss(
            context=32768,
            num_windows=8,
            edges=edges,
            mean=tuple(m + i / 10 for m in mean),
            standard_error=(0.05,) * 16 if i else None,
        ).rows(variant)
    ]


def cost_rows(*variants: str, scale: int = 2**20, fail: bool = False) -> Rows:
    rows: list[dict[str, object]] = []
    for i, variant in enumerate(variants):
        for n in range(5):
            cost = Cost(
                length=4096 << n,
                prefill_chunk=8192,
                kv_bytes=scale * (1 << n) * (i + 1),
                prefill_seconds=(0.1 * 2**n,),
                decode_ms=(10 + n + i, 11 + n + i, 14 + n + i),
                error="Out of memory." if fail and i == 0 and n > 2 else None,
            )
            rows += cost.rows(variant)
    return rows


ALL = ("original", "full", "hybrid", "sparse")
DRAWINGS: dict[str, Callable[[Path], object]] = {
    "needle-4x11": lambda p: plot_needle(needle_rows(), p, model_name=NAME),
    "needle-6x10": lambda p: plot_needle(needle_rows(lengths=6, depths=10), p, model_name=NAME),
    "needle-1x21": lambda p: plot_needle(needle_rows(lengths=1, depths=21), p, model_name=NAME),
    "loss": lambda p: plot_loss(loss_rows(*ALL, "mine"), p, original_context=8192),
    "kv": lambda p: plot_kv_bytes(cost_rows(*ALL), p),
    "kv-equal": lambda p: plot_kv_bytes(cost_rows("hybrid") + cost_rows("full"), p),
    "kv-gib": lambda p: plot_kv_bytes(cost_rows("hybrid", "mine", "yours", scale=2**31), p),
    "decode": lambda p: plot_decode_time(cost_rows(*ALL, fail=True), p, labels={"full": "twin"}),
}


@pytest.mark.parametrize("name", DRAWINGS)
def test_every_drawing_is_a_png_with_all_text_inside(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Any] = []
    save = plots._save
    monkeypatch.setattr(plots, "_save", lambda fig, path: (figures.append(fig), save(fig, path))[1])
    file = tmp_path / "new" / f"{name}.png"
    assert DRAWINGS[name](file) == file
    data = file.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    (figure,) = figures
    width, height = struct.unpack(">II", data[16:24])
    assert (width, height) == tuple(int(150 * inches) for inches in figure.get_size_inches())
    assert not list(file.parent.glob(".*"))

    from matplotlib.text import Text

    figure.canvas.draw()
    page = figure.bbox
    for text in figure.findobj(Text):
        box = text.get_window_extent()
        if text.get_visible() and text.get_text() and box.width:
            inside = box.x0 >= 0 and box.y0 >= 0 and box.x1 <= page.x1 and box.y1 <= page.y1
            # A tick outside the limits is never drawn and has no place of its own.
            assert inside or not drawn(figure, text), text.get_text()


def drawn(figure: Any, text: Any) -> bool:
    """Say whether a text belongs to a tick that is out of view."""
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in axis.get_major_ticks() + axis.get_minor_ticks():
                if text in (tick.label1, tick.label2):
                    return low <= tick.get_loc() <= high
    return True


def texts(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    from matplotlib.text import Text

    figures: list[Any] = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.append(figure))
    DRAWINGS[name](tmp_path / "a.png")
    return [text.get_text() for text in figures[0].findobj(Text)]


def test_needle_prints_cells_and_title(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = texts("needle-4x11", tmp_path, monkeypatch)
    assert [found.count(cell) for cell in ("1.00", "0.90", "0.80", "0.70")] == [11] * 4
    assert "32K\nmean 0.70" in found and "0 %" in found and "100 %" in found
    assert f"Needle in a haystack: {NAME} 10 samples per cell" in [
        " ".join(t.split()) for t in found
    ]


def test_failed_lengths_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = texts("decode", tmp_path, monkeypatch)
    runtimes = "Cache and times: original, twin, hybrid, all sparse by transformers."
    assert f"original not measured at 32K, 64K\n{runtimes}" in found
    assert "twin" in found and "full attention" not in found


def test_unit_follows_the_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "Keys and values (MiB)" in texts("kv", tmp_path, monkeypatch)
    assert "Keys and values (GiB)" in texts("kv-gib", tmp_path, monkeypatch)


def test_last_figures_stand_beside_their_points(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Any] = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.append(figure))
    for name in ("kv", "kv-equal"):
        DRAWINGS[name](tmp_path / "a.png")
        figures[-1].canvas.draw()
        axes = figures[-1].axes[0]
        boxes = [text.get_window_extent() for text in axes.texts]
        ends = [axes.transData.transform(line.get_xydata()[-1]) for line in axes.get_lines()]
        boxes.sort(key=lambda box: box.y0)
        ends.sort(key=lambda end: end[1])
        assert all(above.y0 >= below.y1 for below, above in pairwise(boxes)), name
        for place, (box, (x, y)) in enumerate(zip(boxes, ends, strict=True)):
            assert box.x0 > x
            if name == "kv" or place == 0:  # apart: each at the height of its own point
                assert abs((box.y0 + box.y1) / 2 - y) < box.height


def test_a_model_keeps_its_colour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Any] = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.append(figure))
    plot_loss(loss_rows("hybrid", "full"), tmp_path / "a.png")
    plot_kv_bytes(cost_rows("original", "hybrid"), tmp_path / "b.png")
    colours = [
        {line.get_label(): line.get_color() for line in figure.axes[0].get_lines()}
        for figure in figures
    ]
    assert colours[0]["hybrid"] == colours[1]["hybrid"]
    assert len({*colours[0].values(), *colours[1].values()}) == 3


def test_partial_grid_is_drawn(tmp_path: Path) -> None:
    rows = [dict(row) for row in needle_rows(lengths=2)]
    for key in ("depths", "accuracy_by_depth", "hits"):
        rows[1][key] = rows[1][key][:4]
    assert plot_needle(rows, tmp_path / "a.png", model_name="m").stat().st_size > 0


def test_wrong_rows_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    both = [*needle_rows("hybrid"), *needle_rows("original")]
    with pytest.raises(UsageError, match="original, hybrid"):
        plot_needle(both, file, model_name="m")
    plot_needle(both, file, model_name="m", variant="hybrid")
    with pytest.raises(UsageError, match="no needle rows"):
        plot_needle([], file, model_name="m")
    with pytest.raises(UsageError, match=r"loss\.\*"):
        plot_loss(both, file)
    with pytest.raises(UsageError, match=r"no rows of kv_bytes\.\*"):
        plot_kv_bytes(both, file)
    failed = Cost(length=1, prefill_chunk=1, error="Out of memory.").rows("full")
    with pytest.raises(UsageError, match=r"no length of decode\.\*"):
        plot_decode_time(failed, file)


def test_missing_matplotlib_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UsageError, match=r"longgen\[plots\]"):
        plot_loss(loss_rows("full"), tmp_path / "a.png")
