"""The picture of an inference benchmark: prefill, decoding and cache over length."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

from longgen.bench.inference_settings import VARIANTS
from longgen.bench.summary import best, number, rows_of
from longgen.errors import UsageError
from longgen.evaluate.figures import GREY, canvas, length_axis, save, tidy, write_ends
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
    "hybrid_fp8": "hybrid, fp8 cache",
    "full": "the same engine, all layers full",
    "full_fp8": "all layers full, fp8 cache",
    "transformers": "transformers (sdpa, DynamicCache)",
}

_CEILING = "at the device's own matmul and copy rates"
_BROKEN = (0, (4, 3))


def plot_inference(rows: Rows, path: str | Path, *, title: str) -> Path:
    """Draw three panels over length: prefill (the faster of in pieces and at once), decoding of one
    sequence, and bytes of keys and values held.

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
    figure = canvas(13.2, 4.6)
    panels: Any = figure.subplots(1, 3)
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
    for axes, name in zip(
        panels,
        ("Reading a prompt", f"Writing a token, {sequences}", "Cache held, one sequence"),
        strict=True,
    ):
        axes.set_title(name, fontsize=10)
    handles = {
        text: handle
        for axes in panels
        for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=len(handles),
        edgecolor="none",
        fontsize=9,
    )
    figure.suptitle(fill(title, int(10.5 * figure.get_figwidth())), fontsize=11)
    return save(figure, path)


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
    from matplotlib.ticker import FuncFormatter, LogLocator

    groups = rows_of(rows, metric)
    ends = []
    for name in VARIANTS:
        found = [best(groups[key]) for key in groups if key[1:] == (batch, name)]
        line: list[Row] = [row for row in found if row]
        if not line:
            continue
        colour, marker, style = STYLES[name]
        x = [row["length"] for row in line]
        y = [row["value"] / size for row in line]
        axes.plot(
            x,
            y,
            color=colour,
            marker=marker,
            linestyle=style,
            linewidth=1.8,
            markersize=5.5,
            # Solid lines lie below, so that a broken line of the same figures shows on top.
            zorder=2 + (style != "-"),
            label=LABELS[name],
        )
        spreads = [[end / size for end in row["spread"]] for row in line]
        axes.vlines(x, *zip(*spreads, strict=True), color=colour, linewidth=1)
        if metric != "kv_bytes":
            least = [row["ceiling"] / size for row in line]
            axes.plot(x, least, color=colour, linewidth=0.9, linestyle=_BROKEN, zorder=1)
        ends.append((x[-1], y[-1], say(line[-1]["value"]), colour))
    if metric != "kv_bytes":
        axes.plot([], color=GREY, linewidth=0.9, linestyle=_BROKEN, label=_CEILING)
    axes.set_yscale("log")
    length_axis(axes, sorted({row["length"] for row in rows}), right=1.9)
    axes.set_ylabel(ylabel)
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    tidy(axes)
    write_ends(axes, ends)
