"""How long documents are, in figures and as a picture, and where their tokens went."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

# What a token can become, in the words of the picture: counts of `PackedReport` and colours.
FATES = (
    ("packed", ("packed_tokens",), "#0072B2"),
    ("held out", ("heldout_tokens",), "#009E73"),
    ("too short, left out", ("short_tokens", "rest_tokens"), "#E69F00"),
    ("too long, left out", ("dropped_tokens", "truncated_tokens"), "#D55E00"),
)
_PIECES = "#D55E00"
_DOCUMENTS = "#56B4E9"
_INCHES_A_SOURCE = 1.15


def length_statistics(lengths: np.ndarray) -> dict[str, Any]:
    """Describe lengths in tokens.

    Args:
        lengths: int64 [documents], at least one.

    Returns:
        count, tokens, mean, median, p90, p99, longest, and `histogram`: for each power of two
        from the shortest to the longest, documents and tokens of documents up to that length and
        above half of it.
    """
    lengths = lengths[lengths > 0]
    if not len(lengths):
        return {"count": 0, "tokens": 0, "histogram": []}
    part, power = np.frexp(lengths.astype(np.float64))  # exact, unlike a logarithm
    power = power - (part == 0.5)
    documents = np.bincount(power)
    tokens = np.bincount(power, weights=lengths.astype(np.float64))
    median, p90, p99 = np.percentile(lengths, (50, 90, 99))
    return {
        "count": len(lengths),
        "tokens": int(lengths.sum()),
        "mean": float(lengths.mean()),
        "median": float(median),
        "p90": float(p90),
        "p99": float(p99),
        "longest": int(lengths.max()),
        "histogram": [
            {"up_to": 1 << i, "documents": int(documents[i]), "tokens": int(tokens[i])}
            for i in range(int(power.min()), len(documents))
        ],
    }


def plot_lengths(sources: Sequence[dict[str, Any]], path: str | Path, *, title: str) -> Path:
    """Draw for each source how long its documents and its pieces in rows are, and what became of
    its tokens.

    Args:
        sources: name, weight (a share, or None), context, report, document_lengths, piece_lengths.
        path: the PNG to write.
        title: above the panels.

    Raises:
        UsageError: matplotlib is missing.
    """
    from longgen.evaluate.figures import GREY, canvas, save, tidy
    from longgen.evaluate.results import say_tokens

    figure = canvas(11, 1.5 + _INCHES_A_SOURCE * len(sources))
    grid: Any = figure.subplots(
        len(sources), 2, sharex="col", squeeze=False, width_ratios=[1.55, 1]
    )
    bars = [
        bar
        for one in sources
        for kind in ("document_lengths", "piece_lengths")
        for bar in one[kind]["histogram"]
    ]
    lowest = min(bar["up_to"] for bar in bars) / 2
    highest = max(bar["up_to"] for bar in bars)
    for (left, right), one in zip(grid, sources, strict=True):
        for kind, colour, name in (
            ("document_lengths", _DOCUMENTS, "documents"),
            ("piece_lengths", _PIECES, "pieces in rows"),
        ):
            histogram = one[kind]["histogram"]
            whole = max(one[kind]["tokens"], 1)
            edges = [histogram[0]["up_to"] / 2, *(bar["up_to"] for bar in histogram)]
            shares = [100 * bar["tokens"] / whole for bar in histogram]
            left.stairs(
                shares,
                edges,
                color=colour,
                fill=name == "documents",
                linewidth=1.8,
                label=name,
                zorder=3 if name == "documents" else 4,
            )
        left.axvline(
            one["context"],
            color=GREY,
            linewidth=1,
            linestyle=(0, (4, 3)),
            label="length of a row",
            zorder=5,
        )
        left.set_xscale("log", base=2)
        step = 2 if highest / lowest > 2**12 else 1
        first = max(int(lowest), 1).bit_length() - 1
        ticks = [1 << i for i in range(first, highest.bit_length(), step)]
        names = [f"{t >> 20}M" if t >= 1 << 20 else say_tokens(t) for t in ticks]
        left.set_xticks(ticks, names, fontsize=8.5)
        left.minorticks_off()
        left.set_xlim(lowest, highest)
        left.set_ylim(bottom=0)
        left.yaxis.set_major_formatter("{x:.0f} %")
        tidy(left)
        share = "" if one["weight"] is None else f"{100 * one['weight']:.3g} % of the mixture"
        figures = one["report"]
        words = f"{figures['documents']:,} documents, {figures['tokens'] / 1e6:,.3g}M tokens"
        left.set_title(f"{one['name']}   ", loc="left", fontsize=10, fontweight="bold")
        left.set_title(", ".join(filter(None, (words, share))), loc="right", fontsize=9)
        _bar(right, figures)
        tidy(right)
    grid[-1][0].set_xlabel("Length (tokens)")
    grid[len(sources) // 2 if len(sources) % 2 else 0][0].set_ylabel("Share of tokens")
    grid[-1][1].set_xlabel("Share of the source's tokens")
    handles = {
        text: handle
        for axes in grid.flat
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
    figure.suptitle(title, fontsize=11)
    return save(figure, path)


def _bar(axes: Any, report: dict[str, Any]) -> None:
    """Draw what became of a source's tokens as one bar, its parts adding up to all of them."""
    at = 0.0
    for name, counts, colour in FATES:
        share = 100 * sum(report[count] for count in counts) / max(report["tokens"], 1)
        if not share:
            continue
        axes.barh(0, share, left=at, height=0.5, color=colour, label=name, zorder=3)
        if share >= 9:
            axes.text(
                at + share / 2,
                0,
                f"{share:.1f} %" if share < 99.95 else "100 %",
                ha="center",
                va="center",
                fontsize=8.5,
                color="white",
                zorder=4,
            )
        at += share
    axes.set_xlim(0, 100)
    axes.set_ylim(-0.5, 0.5)
    axes.set_yticks([])
    axes.xaxis.set_major_formatter("{x:.0f} %")
    axes.set_title(
        f"{report['rows']:,} rows, {100 * report['padding_rate']:.2g} % padding, "
        f"cut to fill: {report['cut_documents']:,}",
        loc="right",
        fontsize=9,
    )
