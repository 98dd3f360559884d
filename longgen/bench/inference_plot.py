"""The picture of an inference benchmark: prefill, decoding, cache and throughput over length."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longgen.bench.inference_settings import VARIANTS
from longgen.bench.panels import BROKEN, draw_line, save_panels
from longgen.bench.summary import best, best_batches, number, rows_of
from longgen.errors import UsageError
from longgen.evaluate.figures import GREY, canvas, length_axis, tidy, write_ends
from longgen.evaluate.plots import STYLES as MODELS
from longgen.evaluate.results import Row, Rows, byte_unit, say_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STYLES = {
    "hybrid": MODELS["hybrid"],
    "hybrid_fp8": MODELS["hybrid_fp8"],
    "full": MODELS["full"],
    "full_fp8": MODELS["full_fp8"],
    "transformers": ("#000000", "s", ":"),
}
LABELS = {
    "hybrid": "hybrid",
    "hybrid_fp8": "hybrid with fp8 cache",
    "full": "the same engine, all layers full",
    "full_fp8": "all layers full with fp8 cache",
    "transformers": "transformers (sdpa, DynamicCache)",
}

_CEILING = "at the device's own matmul and copy rates"


def plot_inference(rows: Rows, path: str | Path, *, title: str) -> Path:
    """Draw four panels over length: prefill (the faster of in pieces and at once), decoding of one
    sequence, bytes of keys and values held, and tokens a second of as many sequences as are best.

    Bars reach from the low to the high end; thin lines are ceilings by what the device reaches.

    Args:
        rows: results rows of an inference benchmark; those without a figure are left out.
        path: the PNG to write.
        title: above the panels.

    Raises:
        UsageError: no row has a figure, or matplotlib is missing.
    """
    measured = [row for row in rows if row["value"] is not None]
    if not measured:
        raise UsageError("There is nothing to draw: no row of the benchmark has a figure.")
    unit, size = byte_unit(
        max((row["value"] for row in measured if row["unit"] == "bytes"), default=1)
    )
    batch = min((row["batch"] for row in measured if row["unit"] == "ms per token"), default=1)
    figure = canvas(11.6, 8.6)
    panels: Any = figure.subplots(2, 2).flatten()
    sequences = "one sequence" if batch == 1 else f"{batch} sequences"
    _panel(panels[0], measured, "prefill", 1, 1.0, "Prefill (s)", lambda y: f"{number(y)} s")
    _panel(
        panels[1],
        measured,
        "decode",
        batch,
        1.0,
        "Decode (ms per token)",
        lambda y: f"{number(y)} ms",
    )
    _panel(panels[2], measured, "kv_bytes", 1, size, f"Keys and values ({unit})", say_bytes)
    _throughput(panels[3], measured)
    for axes, name in zip(
        panels,
        (
            "Reading a prompt",
            f"Writing a token, {sequences}",
            "Cache held, one sequence",
            "Writing for as many at once as is best",
        ),
        strict=True,
    ):
        axes.set_title(name, fontsize=10)
    return save_panels(figure, panels, path, title=title, most_columns=3)


def _throughput(axes: Axes, rows: Rows) -> None:
    """Draw the most tokens a second of all sequences together; beside each point, how many."""
    most = best_batches(rows)
    ends = []
    for name in VARIANTS:
        line = sorted((length, row) for (length, other), row in most.items() if other == name)
        if not line:
            continue
        x = [length for length, _ in line]
        y = [row["tokens_per_second"] for _, row in line]
        draw_line(axes, x, y, STYLES[name], LABELS[name])
        ends.append(
            (x[-1], y[-1], f"{number(y[-1])}, {line[-1][1]['batch']} seq.", STYLES[name][0])
        )
    _finish_panel(axes, rows, "Tokens per second, all sequences")
    write_ends(axes, ends)


def _finish_panel(axes: Axes, rows: Rows, ylabel: str) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator

    axes.set_yscale("log")
    # Room for the words beside points that lie close together.
    axes.margins(y=0.14)
    length_axis(axes, sorted({row["length"] for row in rows}), right=2.2)
    axes.set_ylabel(ylabel)
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    tidy(axes)


def _panel(
    axes: Axes,
    rows: Rows,
    metric: str,
    batch: int,
    size: float,
    ylabel: str,
    say: Callable[[float], str],
) -> None:
    """Draw one metric, a line a variant."""
    groups = rows_of(rows, metric)
    ends = []
    for name in VARIANTS:
        found = [best(groups[key]) for key in groups if key[1:] == (batch, name)]
        line: list[Row] = [row for row in found if row]
        if not line:
            continue
        colour = STYLES[name][0]
        x = [row["length"] for row in line]
        y = [row["value"] / size for row in line]
        draw_line(axes, x, y, STYLES[name], LABELS[name])
        spreads = [[end / size for end in row["spread"]] for row in line]
        axes.vlines(x, *zip(*spreads, strict=True), color=colour, linewidth=1)
        if metric != "kv_bytes":
            least = [row["ceiling"] / size for row in line]
            # Of a single length there is no line to see.
            dash: dict[str, Any] = {"marker": "_", "markersize": 16} if len(x) == 1 else {}
            axes.plot(x, least, color=colour, linewidth=0.9, linestyle=BROKEN, zorder=1, **dash)
        ends.append((x[-1], y[-1], say(line[-1]["value"]), colour))
    if metric != "kv_bytes":
        axes.plot([], color=GREY, linewidth=0.9, linestyle=BROKEN, label=_CEILING)
    _finish_panel(axes, rows, ylabel)
    write_ends(axes, ends)
