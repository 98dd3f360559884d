"""What keys and values in 8 bits cost a hybrid: its figures beside those in its own format."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from longgen.evaluate.report import Picture, Section, Table, comparison_table, write_report
from longgen.evaluate.results import Row, Rows, say_bytes, say_tokens, select
from longgen.evaluate.saved import SavedResults

# Figures beside each other, JSON and report.
COMPARISON = "kv_dtypes"


def differences(rows: Rows, own: str, other: str) -> list[dict[str, object]]:
    """Compare two variants of a model at every length that both were measured at.

    Both answered the same questions and read the same windows, so differences are taken question by
    question and window by window.

    Args:
        rows: results rows.
        own: the variant with keys and values in the model's own format.
        other: the other one.

    Returns:
        rows `needle_difference` (accuracy; questions that only one of them answered),
        `loss_difference` (nats per token, its standard error over windows, and the ratio of
        perplexities) and `kv_bytes_ratio`, all of `other` against `own`.
    """
    found: list[dict[str, object]] = []
    for metric, compare in (
        ("needle", _needle),
        ("loss", _loss),
        ("kv_bytes", _bytes),
    ):
        groups = select(rows, metric)
        first = {row["length"]: row for row in groups.get(own, [])}
        for row in groups.get(other, []):
            base = first.get(row["length"])
            if base and base["value"] is not None and row["value"] is not None:
                found.append({"length": row["length"], "against": own, **compare(base, row, other)})
    return found


def _needle(base: Row, row: Row, name: str) -> dict[str, object]:
    hits = [np.array(one["hits"], dtype=bool) for one in (base, row)]
    return {
        "case": f"needle_difference.{name}",
        "value": row["value"] - base["value"],
        "unit": "accuracy",
        "n": row["n"],
        "only_own": int((hits[0] & ~hits[1]).sum()),
        "only_other": int((hits[1] & ~hits[0]).sum()),
    }


def _loss(base: Row, row: Row, name: str) -> dict[str, object]:
    each = np.array(row["by_window"]) - np.array(base["by_window"])
    error = float(each.std(ddof=1) / math.sqrt(len(each))) if len(each) > 1 else None
    return {
        "case": f"loss_difference.{name}",
        "value": row["value"] - base["value"],
        "unit": "nats per token",
        "n": row["n"],
        "standard_error": error,
        "perplexity_ratio": math.exp(row["value"] - base["value"]),
        "edges": row["edges"],
        "by_position": [b - a for a, b in zip(base["mean"], row["mean"], strict=True)],
    }


def _bytes(base: Row, row: Row, name: str) -> dict[str, object]:
    return {
        "case": f"kv_bytes_ratio.{name}",
        "value": row["value"] / base["value"],
        "unit": "of the bytes",
        "n": 1,
        "bytes": [base["value"], row["value"]],
    }


def say_difference(row: Row) -> str:
    """Say a difference in a line."""
    at = f"at {say_tokens(row['length'])}"
    metric = str(row["case"]).partition(".")[0]
    if metric == "needle_difference":
        return (
            f"Needle {at}: accuracy {row['value']:+.3f}; of {row['n']} questions {row['only_own']} "
            f"are answered only without fp8, {row['only_other']} only with it."
        )
    if metric == "loss_difference":
        error = row["standard_error"]
        sure = f" (standard error {error:.4f}, {row['n']} windows)" if error is not None else ""
        return (
            f"Loss {at}: {row['value']:+.4f} nats a token{sure}, a perplexity "
            f"{row['perplexity_ratio']:.4f} times as high."
        )
    before, after = row["bytes"]
    return f"Keys and values {at}: {say_bytes(after)} instead of {say_bytes(before)}."


def write_comparison(
    saved: SavedResults, rows: Rows, own: str, title: str, pictures: Sequence[Picture]
) -> list[dict[str, object]]:
    """Write `kv_dtypes.json`, and a report with all figures, and return the differences.

    Args:
        saved: of the variant in 8 bits.
        rows: of both variants.
        own: the other variant's name.
        title: of the report.
        pictures: to show.
    """
    found = differences(rows, own, saved.variant)
    saved.write_as(COMPARISON, found)
    table: Table = comparison_table(rows)
    lines = [say_difference(row) for row in found]
    write_report(
        Path(saved.folder),
        title=title,
        summary_rows=[("command", saved.command), ("seed", saved.seed)],
        sections=[Section("Figures", [table]), Section("What fp8 changes", lines)],
        figures=[picture for picture in pictures if picture.path.is_file()],
        notes=[
            "Both variants answered the same questions and read the same text, all through the "
            "engine's cache."
        ],
    )
    return found
