"""What all pictures share: the canvas, the look of axes, and how a PNG is written.

Colours are those of Okabe and Ito, which hold up for colour-blind readers. matplotlib is an extra:
`pip install longgen[plots]`.
"""

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from longgen.errors import UsageError
from longgen.evaluate.results import say_tokens, write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 150
GREY = "#595959"


def canvas(width: float, height: float) -> "Figure":
    """Return an empty figure of a size in inches.

    Raises:
        UsageError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        raise UsageError(
            "Drawing needs matplotlib, which is not installed; run: pip install 'longgen[plots]'."
        ) from error
    # A bare Figure, without pyplot: no window system, no global state, nothing to close.
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)
    return Figure((width, height), dpi=DPI, layout=layout)


def tidy(axes: "Axes") -> None:
    """Give axes a light grid behind the lines and no box around it."""
    axes.grid(color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def length_axis(axes: "Axes", lengths: Sequence[int], right: float = 1.2) -> None:
    """Give axes lengths in tokens along the bottom, each in its place whether measured or not.

    Args:
        axes: of the picture.
        lengths: in ascending order.
        right: room behind the last, as a factor on it.
    """
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [say_tokens(length) for length in lengths])
    axes.minorticks_off()
    axes.set_xlim(lengths[0] / 1.2, lengths[-1] * right)
    axes.set_xlabel("Length (tokens)")


def finish(axes: "Axes", found: Mapping[str, object]) -> None:
    """Tidy axes and put a legend of the lines in `found` on them."""
    tidy(axes)
    axes.legend(edgecolor="none", framealpha=0.8, fontsize=9, ncols=1 if len(found) < 5 else 2)


def write_ends(axes: "Axes", ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Write the last figure of every line beside its last point, pushed up where two overlap.

    Args:
        axes: whose limits and scales are set already.
        ends: x, y, text and colour of every line's end.
    """
    lowest = 0.0
    for x, y, text, colour in sorted(ends, key=lambda end: end[1]):
        height = axes.transAxes.inverted().transform(axes.transData.transform((x, y)))[1]
        place = max(height, lowest)
        lowest = place + 0.055
        axes.annotate(
            text,
            (x, place),
            xycoords=("data", "axes fraction"),
            xytext=(9, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=colour,
            annotation_clip=False,
        )


def save(figure: "Figure", path: str | Path) -> Path:
    """Write a figure as a PNG, whole or not at all."""
    image = BytesIO()
    figure.savefig(image, facecolor="white", format="png")
    write_atomically(Path(path), image.getvalue())
    return Path(path)
