"""The picture of an attention benchmark: TFLOP/s over length, a panel for each pattern and
direction."""

from __future__ import annotations

from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

from longgen.bench.panels import BROKEN, draw_line, save_panels
from longgen.bench.providers import registry
from longgen.bench.work import DIRECTIONS, PATTERNS
from longgen.errors import UsageError
from longgen.evaluate.figures import GREY, canvas, length_axis, tidy
from longgen.evaluate.results import Row, Rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# A provider keeps its colour, marker and line in every picture.
STYLES = {
    "ours": ("#D55E00", "D", "-"),
    "flash": ("#E69F00", "o", "--"),
    "flex": ("#CC79A7", "v", "-."),
    "sdpa_flash": ("#56B4E9", "s", ":"),
    "sdpa_cudnn": ("#0072B2", "s", "--"),
    "fa4": ("#000000", "^", "-"),
    "fa4_window": ("#000000", "P", ":"),
    "fsa": ("#009E73", "X", "-."),
}
_OTHER = (("#595959", "<", "--"), ("#999999", ">", ":"))


def cases_of(rows: Rows) -> dict[str, list[str]]:
    """Return {pattern name: directions} of the rows, in the order of `PATTERNS`, others after."""
    found: dict[str, set[str]] = {}
    for row in rows:
        _, name, direction = str(row["case"]).split(".")
        found.setdefault(name, set()).add(direction)
    order = [name for name in PATTERNS if name in found]
    order += [name for name in found if name not in PATTERNS]
    return {name: [d for d in DIRECTIONS if d in found[name]] for name in order}


def providers_of(rows: Rows) -> list[str]:
    """Return the providers of the rows, LongGen's own first."""
    found = {str(row["provider"]) for row in rows}
    order = list(registry())
    return sorted(found, key=lambda name: order.index(name) if name in order else len(order))


def plot_attention(rows: Rows, path: str | Path, *, title: str) -> Path:
    """Draw TFLOP/s over length, one line a provider; bars reach from the low to the high end.

    Args:
        rows: results rows of `attention.*`; those without a figure are left out.
        path: the PNG to write.
        title: above the panels.

    Raises:
        UsageError: no row has a figure, or matplotlib is missing.
    """
    measured = [row for row in rows if row["value"] is not None]
    if not measured:
        raise UsageError("There is nothing to draw: no row of attention.* has a figure.")
    cases = cases_of(measured)
    directions = [d for d in DIRECTIONS if any(d in have for have in cases.values())]
    width, height = 1.2 + 4.6 * len(directions), 1.4 + 2.9 * len(cases)
    figure = canvas(max(width, 6.4), height)
    grid: Any = figure.subplots(len(cases), len(directions), sharex=True, squeeze=False)
    providers = providers_of(measured)
    spare = iter(_OTHER * len(providers))
    styles = {name: STYLES.get(name) or next(spare) for name in providers}
    lengths = sorted({row["length"] for row in measured})
    for line, name in zip(grid, cases, strict=True):
        for axes, direction in zip(line, directions, strict=True):
            chosen = [row for row in measured if row["case"] == f"attention.{name}.{direction}"]
            _panel(axes, chosen, providers, styles, lengths)
            pattern = chosen[0]["pattern"] if chosen else ""
            axes.set_title(f"{name}, {direction}\n{fill(pattern, 46)}", fontsize=9.5)
        line[0].set_ylabel("TFLOP/s over visible pairs")
    for axes in grid[:-1].flat:
        axes.set_xlabel("")
    columns = 3 if len(directions) > 1 else 2
    return save_panels(figure, grid.flat, path, title=title, most_columns=columns)


def _panel(
    axes: Axes,
    rows: list[Row],
    providers: list[str],
    styles: dict[str, tuple[str, str, str]],
    lengths: list[int],
) -> None:
    """Draw one pattern and direction."""
    known = registry()
    for place, name in enumerate(providers, 1):
        line = sorted((r for r in rows if r["provider"] == name), key=lambda r: r["length"])
        if not line:
            continue
        x, y = [row["length"] for row in line], [row["value"] for row in line]
        if len(lengths) == 1:
            # Side by side: without lines, a marker would hide others.
            x = [lengths[0] * 1.12 ** (2 * place / (len(providers) + 1) - 1)]
        label = known[name].label if name in known else name
        draw_line(axes, x, y, styles[name], label, is_bold=name == "ours")
        axes.vlines(x, *zip(*(row["spread"] for row in line), strict=True), color=styles[name][0])
    if rows:
        ceiling = rows[0]["ceiling"]
        axes.axhline(ceiling, color=GREY, linewidth=1, linestyle=BROKEN, label="matmul")
    length_axis(axes, lengths)
    axes.set_ylim(bottom=0)
    tidy(axes)
