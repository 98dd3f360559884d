"""What the pictures of benchmarks share: a line of one variant, and the legend below all panels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING

from longgen.evaluate.figures import save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Of thin lines: ceilings, and what was planned.
BROKEN = (0, (4, 3))


def draw_line(
    axes: Axes,
    x: Sequence[float],
    y: Sequence[float],
    style: tuple[str, str, str],
    label: str,
    *,
    is_bold: bool = False,
) -> None:
    """Draw one line with its markers; `style` is its colour, marker and line."""
    colour, marker, line = style
    axes.plot(
        x,
        y,
        color=colour,
        marker=marker,
        linestyle=line,
        linewidth=2.4 if is_bold else 1.8,
        markersize=6 if is_bold else 5.5,
        # Solid lines lie below, so that a broken line of the same figures shows on top.
        zorder=2 + (line != "-"),
        label=label,
    )


def save_panels(
    figure: Figure, panels: Iterable[Axes], path: str | Path, *, title: str, most_columns: int
) -> Path:
    """Put the title above all panels and one legend of all their labels below, and write the PNG.

    Args:
        figure: that holds the panels.
        panels: whose labels the legend has, each once.
        path: the PNG to write.
        title: broken into lines as wide as the figure.
        most_columns: of the legend.
    """
    handles = {
        text: handle
        for axes in panels
        for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=min(len(handles), most_columns),
        edgecolor="none",
        fontsize=9,
    )
    figure.suptitle(fill(title, int(10.5 * figure.get_figwidth())), fontsize=11)
    return save(figure, path)
