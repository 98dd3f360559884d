"""The picture of a training benchmark: speed, utilisation and memory over length."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longgen.bench.inference_plot import STYLES
from longgen.bench.panels import BROKEN, draw_line, save_panels
from longgen.bench.summary import number
from longgen.bench.train_settings import VARIANTS
from longgen.bench.train_summary import rows_of
from longgen.errors import UsageError
from longgen.evaluate.figures import GREY, canvas, length_axis, tidy, write_ends
from longgen.evaluate.results import Row, Rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LABELS = {
    "hybrid": "hybrid",
    "full": "the same path, all layers full",
    "transformers": "transformers (sdpa)",
}
_GIB = 1 << 30
# Bars at its ends, so that a single length shows too.
_PLAN: dict[str, Any] = {
    "linewidth": 0.9,
    "linestyle": BROKEN,
    "marker": "_",
    "markersize": 18,
    "markeredgewidth": 1.2,
}


def plot_train(rows: Rows, path: str | Path, *, title: str) -> Path:
    """Draw panels over length: tokens per second and GPU, and where they are known MFU and peak
    memory, with the planned one as thin lines.

    Bars reach from the low to the high end of times.

    Args:
        rows: results rows of a training benchmark; those without a figure are left out.
        path: the PNG to write.
        title: above the panels.

    Raises:
        UsageError: no row has a figure, or matplotlib is missing.
    """
    measured = [row for row in rows_of(rows).values() if row["value"] is not None]
    if not measured:
        raise UsageError("There is nothing to draw: no row of the benchmark has a figure.")
    panels: list[tuple[str, str, Callable[[Row], float | None], Callable[[float], str]]] = [
        ("Speed", "Tokens per second and GPU", _rate, number),
        ("Share of the card's peak", "MFU (%)", _mfu, lambda y: f"{y:.0f} %"),
        ("Peak memory of a GPU", "GiB", _peak, lambda y: f"{y:.1f} GiB"),
    ]
    panels = [panel for panel in panels if any(panel[2](row) is not None for row in measured)]
    figure = canvas(4.4 * len(panels), 4.6)
    axes: Any = figure.subplots(1, len(panels), squeeze=False)[0]
    lengths = sorted({row["length"] for row in measured})
    for one, (name, ylabel, value, say) in zip(axes, panels, strict=True):
        _panel(one, measured, lengths, ylabel, value, say)
        one.set_title(name, fontsize=10)
    columns = 4 if len(panels) > 1 else 1
    return save_panels(figure, axes, path, title=title, most_columns=columns)


def _rate(row: Row) -> float:
    return float(row["tokens_per_second_per_gpu"])


def _mfu(row: Row) -> float | None:
    return 100 * row["mfu"] if row["mfu"] else None


def _peak(row: Row) -> float | None:
    return row["peak_bytes"] / _GIB if row["peak_bytes"] else None


def _panel(
    axes: Axes,
    rows: list[Row],
    lengths: list[int],
    ylabel: str,
    value: Callable[[Row], float | None],
    say: Callable[[float], str],
) -> None:
    """Draw one figure, a line a variant."""
    ends = []
    top = max(value(row) or 0.0 for row in rows)
    for name in VARIANTS:
        line = [row for row in rows if row["case"].endswith(f".{name}") and value(row) is not None]
        if not line:
            continue
        colour = STYLES[name][0]
        x, y = [row["length"] for row in line], [value(row) or 0.0 for row in line]
        draw_line(axes, x, y, STYLES[name], LABELS[name])
        if value is _rate:
            # A longer time is a lower speed.
            spreads = [
                [y * row["value"] / end for end in row["spread"]]
                for row, y in zip(line, y, strict=True)
            ]
            axes.vlines(x, *zip(*spreads, strict=True), color=colour, linewidth=1)
        if value is _peak and all("planned_bytes" in row for row in line):
            planned = [row["planned_bytes"] / _GIB for row in line]
            top = max(top, *planned)
            axes.plot(x, planned, color=colour, zorder=1, **_PLAN)
        ends.append((x[-1], y[-1], say(y[-1]), colour))
    if value is _peak:
        axes.plot([], color=GREY, label="planned", **_PLAN)
    if value is _rate:
        axes.set_yscale("log")
        from matplotlib.ticker import FuncFormatter, LogLocator

        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.0f}"))
        axes.yaxis.set_minor_formatter(FuncFormatter(lambda y, _: ""))
    else:
        # From 0, with room above the highest marker.
        axes.set_ylim(0, 1.12 * top)
    length_axis(axes, lengths, right=1.9 if len(lengths) < 4 else 2.4)
    axes.set_ylabel(ylabel)
    tidy(axes)
    write_ends(axes, ends)
