"""Pictures of results: the needle heat map, loss by position, cache and decode time by length.

Every function takes rows as the results files hold them and writes one PNG. A model keeps its
colour, marker and line style in all of them; the colours (Okabe and Ito) and the scale of the heat
map (viridis) hold up for colour-blind readers and in grey print. matplotlib is an extra: `pip
install longgen[plots]`.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

from longgen.errors import UsageError
from longgen.evaluate.figures import GREY, canvas, length_axis, write_ends
from longgen.evaluate.figures import finish as _finish
from longgen.evaluate.figures import save as _save
from longgen.evaluate.results import (
    VARIANTS,
    Row,
    Rows,
    byte_unit,
    say_bytes,
    say_runtimes,
    say_tokens,
    select,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLES = {
    "original": ("#000000", "s", ":"),
    "full": ("#0072B2", "o", "--"),
    "hybrid": ("#D55E00", "D", "-"),
    "sparse": ("#009E73", "^", "-."),
    "full_fp8": ("#56B4E9", "P", "-."),
    "hybrid_fp8": ("#CC79A7", "v", "-."),
    "sparse_fp8": ("#E69F00", "X", ":"),
}
SPARE_STYLES = (("#CC79A7", "v", "-"), ("#56B4E9", "P", "--"), ("#E69F00", "X", "-."))


def plot_needle(
    rows: Rows, path: str | Path, *, model_name: str, variant: str | None = None
) -> Path:
    """Draw accuracy by length and depth for one model, the figure in every cell.

    Args:
        rows: results rows; those of `needle.*` are used.
        path: the PNG to write.
        model_name: stands in the title.
        variant: which model of the rows, needed where they hold several.

    Raises:
        UsageError: there are no needle rows, several models and no `variant`, or matplotlib is
            missing.
    """
    found = select(rows, "needle")
    if variant is None and len(found) == 1:
        variant = next(iter(found))
    if variant not in found:
        raise UsageError(
            f"Cannot draw the needle grid of {variant!r}: the rows hold {_listed(found)}."
        )
    chosen = found[variant]
    depths = sorted({depth for row in chosen for depth in row["depths"]})
    cells = [dict(zip(row["depths"], row["accuracy_by_depth"], strict=True)) for row in chosen]
    figure, axes = _figure(2.2 + 0.78 * len(chosen), 1.9 + 0.31 * len(depths), least=(4.8, 4.2))
    nan = float("nan")
    grid = [[column.get(depth, nan) for column in cells] for depth in depths]  # (depths, lengths)
    image = axes.imshow(
        grid, vmin=0, vmax=1, cmap="viridis", aspect="auto", interpolation="nearest"
    )
    for y, line in enumerate(grid):
        for x, value in enumerate(line):
            known = value == value
            colour = "white" if known and value < 0.5 else "black"
            axes.text(
                x,
                y,
                f"{value:.2f}" if known else "-",
                ha="center",
                va="center",
                color=colour,
                fontsize=9,
            )
    axes.set_xticks(
        range(len(chosen)),
        [f"{say_tokens(row['length'])}\nmean {row['value']:.2f}" for row in chosen],
        fontsize=9,
    )
    axes.set_yticks(range(len(depths)), [f"{100 * depth:.0f} %" for depth in depths], fontsize=9)
    for edges, set_ticks in ((len(chosen), axes.set_xticks), (len(depths), axes.set_yticks)):
        set_ticks([i - 0.5 for i in range(1, edges)], minor=True)
    axes.grid(which="minor", color="white", linewidth=1)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("Length (tokens)")
    axes.set_ylabel("Depth of the needle (0 % = start of the text)")
    bar = figure.colorbar(image, ax=axes, pad=0.03, aspect=30, ticks=[0, 0.25, 0.5, 0.75, 1])
    bar.set_label("Accuracy (all six digits exact)")
    bar.outline.set_visible(False)
    counts = " or ".join(str(count) for count in sorted({row["samples"] for row in chosen}))
    # Centred on the whole figure, where a long name has more room than over the grid alone.
    name = fill(f"Needle in a haystack: {model_name}", int(11.5 * figure.get_figwidth()))
    noun = "sample" if counts == "1" else "samples"
    figure.suptitle(f"{name}\n{counts} {noun} per cell", fontsize=11)
    return _save(figure, path)


def plot_loss(
    rows: Rows,
    path: str | Path,
    *,
    title: str = "Loss by position",
    labels: Mapping[str, str] | None = None,
    original_context: int | None = None,
) -> Path:
    """Draw the loss by position, one line per model, shaded by one standard error.

    Args:
        rows: results rows; those of `loss.*` are used.
        path: the PNG to write.
        title: above the axes.
        labels: words for the legend by model; by default those of `results.VARIANTS`.
        original_context: marks, in tokens, where the original model's context ends.

    Raises:
        UsageError: there are no such rows, or matplotlib is missing.
    """
    found = _found(rows, "loss")
    figure, axes = _figure(7.2, 4.4)
    windows: set[int] = set()
    right = 0
    for (name, group), style in zip(found.items(), _styles(found), strict=True):
        row = group[-1]  # the longest context measured
        middles = [(a + b) / 2 for a, b in zip(row["edges"], row["edges"][1:], strict=False)]
        style["markersize"] = 4
        axes.plot(middles, row["mean"], label=_label(name, labels), **style)
        if row["standard_error"]:
            low, high = zip(
                *((m - e, m + e) for m, e in zip(row["mean"], row["standard_error"], strict=True)),
                strict=True,
            )
            axes.fill_between(middles, low, high, color=style["color"], alpha=0.18, linewidth=0)
        windows.add(row["n"])
        right = max(right, row["edges"][-1])
    if original_context and original_context < right:
        axes.axvline(original_context, color=GREY, linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate(
            f" original context: {say_tokens(original_context)}",
            (original_context, 1),
            xycoords=("data", "axes fraction"),
            xytext=(2, -4),
            textcoords="offset points",
            va="top",
            fontsize=9,
            color=GREY,
        )
    axes.set_xlim(0, right)
    step = _round_step(right)
    ticks = list(range(0, right + 1, step))
    axes.set_xticks(ticks, [say_tokens(tick) for tick in ticks])
    axes.set_xlabel("Position in the context (tokens)")
    axes.set_ylabel("Loss (nats per token)")
    counts = " or ".join(str(count) for count in sorted(windows))
    axes.set_title(
        f"{title}\nmean over {counts} held-out windows, shaded: +/- 1 standard error", fontsize=11
    )
    _finish(axes, found)
    return _save(figure, path)


def plot_kv_bytes(
    rows: Rows,
    path: str | Path,
    *,
    title: str = "Key/value cache held, by length",
    labels: Mapping[str, str] | None = None,
) -> Path:
    """Draw the bytes of cache held by length, one line per model, the last figure written out.

    Args:
        rows: results rows; those of `kv_bytes.*` are used.
        path: the PNG to write.
        title: above the axes.
        labels: words for the legend by model; by default those of `results.VARIANTS`.

    Raises:
        UsageError: there are no such rows, none was measured, or matplotlib is missing.
    """
    found = _measured(rows, "kv_bytes")
    unit, size = byte_unit(max(row["value"] for group in found.values() for row in group))
    return _plot_by_length(
        rows, "kv_bytes", path, title, labels, f"Keys and values ({unit})", size, say_bytes
    )


def plot_decode_time(
    rows: Rows,
    path: str | Path,
    *,
    title: str = "Decode time by length of the prompt\nmedian; bars: fastest to slowest step",
    labels: Mapping[str, str] | None = None,
) -> Path:
    """Draw the median time per generated token by length, one line per model.

    Bars reach from the fastest to the slowest step.

    Args:
        rows: results rows; those of `decode.*` are used.
        path: the PNG to write.
        title: above the axes.
        labels: words for the legend by model; by default those of `results.VARIANTS`.

    Raises:
        UsageError: there are no such rows, none was measured, or matplotlib is missing.
    """
    return _plot_by_length(
        rows,
        "decode",
        path,
        title,
        labels,
        "Milliseconds per token",
        1.0,
        _say_ms,
    )


def _plot_by_length(
    rows: Rows,
    metric: str,
    path: str | Path,
    title: str,
    labels: Mapping[str, str] | None,
    ylabel: str,
    size: float,
    say: Callable[[float], str],
) -> Path:
    found = _measured(rows, metric)
    figure, axes = _figure(7.2, 4.4)
    lengths = sorted({row["length"] for row in rows if str(row["case"]).startswith(f"{metric}.")})
    ends = []
    top = highest = 0.0
    for (name, group), style in zip(found.items(), _styles(found), strict=True):
        x = [row["length"] for row in group]
        y = [row["value"] / size for row in group]
        spreads = [row.get("spread") or [row["value"]] for row in group]
        low, high = ([end(spread) / size for spread in spreads] for end in (min, max))
        axes.plot(x, y, label=_label(name, labels), **style)
        axes.vlines(x, low, high, color=style["color"], linewidth=1)
        ends.append((x[-1], y[-1], say(group[-1]["value"]), style["color"]))
        top, highest = max(top, *y), max(highest, *high)
    length_axis(axes, lengths)
    # What is written at the top has room, and one slow step does not press all lines flat.
    axes.set_ylim(0, 1.1 * min(highest, 1.5 * top))
    axes.set_ylabel(ylabel)
    axes.set_title(title, fontsize=11)
    _finish(axes, found)
    write_ends(axes, ends)
    notes = []
    for name, group in select(rows, metric).items():
        gaps = ", ".join(say_tokens(row["length"]) for row in group if row["value"] is None)
        notes += [f"{_label(name, labels)} not measured at {gaps}"] * bool(gaps)
    shown = [row for group in found.values() for row in group]
    lines = ["; ".join(notes), say_runtimes(shown, {**VARIANTS, **(labels or {})})]
    if any(lines):
        figure.supxlabel("\n".join(filter(None, lines)), fontsize=9, color=GREY)
    return _save(figure, path)


def _figure(
    width: float, height: float, least: tuple[float, float] = (0, 0)
) -> "tuple[Figure, Axes]":
    figure = canvas(max(width, least[0]), max(height, least[1]))
    return figure, figure.subplots()


def _styles(found: Mapping[str, object]) -> list[dict[str, Any]]:
    spare = iter(SPARE_STYLES * len(found))
    triples = [STYLES.get(name) or next(spare) for name in found]
    sizes = {"linewidth": 1.8, "markersize": 5.5}
    # Solid lines lie below, so that a broken line of the same figures shows on top of them.
    return [
        {"color": colour, "marker": marker, "linestyle": line, "zorder": 2 + (line != "-"), **sizes}
        for colour, marker, line in triples
    ]


def _label(name: str, labels: Mapping[str, str] | None) -> str:
    return (labels or {}).get(name) or VARIANTS.get(name, name)


def _found(rows: Rows, metric: str) -> dict[str, list[Row]]:
    found = select(rows, metric)
    if not found:
        raise UsageError(f"There is nothing to draw: the results hold no rows of {metric}.*.")
    return found


def _measured(rows: Rows, metric: str) -> dict[str, list[Row]]:
    found = {
        name: [row for row in group if row["value"] is not None]
        for name, group in _found(rows, metric).items()
    }
    if not any(found.values()):
        raise UsageError(f"There is nothing to draw: no length of {metric}.* could be measured.")
    return {name: group for name, group in found.items() if group}


def _round_step(right: int) -> int:
    """Give a distance between ticks, a power of two, that makes four to eight of them."""
    step = 1
    while right / step > 8:
        step *= 2
    return step


def _listed(found: Mapping[str, object]) -> str:
    return ", ".join(found) or "no needle rows"


def _say_ms(value: float) -> str:
    return f"{value:.1f} ms" if value < 100 else f"{value:,.0f} ms"
