"""The table of a training benchmark, from its rows: for the terminal and for the documentation."""

from __future__ import annotations

from typing import Any

from longgen.bench.summary import Table, number
from longgen.bench.train_settings import STOCK, VARIANTS
from longgen.evaluate.results import Row, Rows, say_bytes, say_tokens

_BASE = "hybrid"

MFU_IS = (
    "MFU: model FLOPs over what the cards' datasheets say. Model FLOPs of a step: 3 x (2 x weights "
    "of linear layers x tokens + 4 x head size x heads x visible pairs of query and key); what is "
    "computed again is not counted."
)


def rows_of(rows: Rows) -> dict[tuple[int, str], Row]:
    """Return the rows by length and variant, in the order of tables."""
    found = {(row["length"], name): row for row in rows if (name := _variant(row)) is not None}
    return dict(sorted(found.items(), key=lambda one: (one[0][0], VARIANTS.index(one[0][1]))))


def _variant(row: Row) -> str | None:
    metric, _, name = str(row["case"]).partition(".")
    return name if metric == "train_step" and name in VARIANTS else None


def ratios(rows: Rows) -> list[dict[str, Any]]:
    """Return how many times the hybrid's time the others take at each length; `ceiling` is the same
    ratio of model FLOPs: that of times if all were equally efficient."""
    groups = rows_of(rows)
    found = []
    for (length, name), row in groups.items():
        base = groups.get((length, _BASE))
        if name != _BASE and base and row["value"] is not None and base["value"] is not None:
            found.append(
                {
                    "metric": "train_step",
                    "length": length,
                    "against": name,
                    "value": row["value"] / base["value"],
                    "ceiling": row["flops"] / base["flops"],
                }
            )
    return found


def train_table(rows: Rows) -> Table:
    """Return the table: its columns and lines."""
    head = ["tokens", "variant", "s a step", "tokens/s/GPU", "MFU", "peak", "planned", "hybrid is"]
    gains = {(one["length"], one["against"]): one for one in ratios(rows)}
    lines, last = [], 0
    for (length, name), row in rows_of(rows).items():
        cells = [say_tokens(length) if length != last else "", name]
        last = length
        if row["value"] is None:
            lines.append([*cells, "-", "", "", "", _planned(row), ""])
            continue
        gain = gains.get((length, name))
        lines.append(
            [
                *cells,
                number(row["value"]),
                number(row["tokens_per_second_per_gpu"]),
                f"{row['mfu']:.0%}" if row["mfu"] else "",
                say_bytes(row["peak_bytes"]) if row["peak_bytes"] else "",
                _planned(row),
                f"{gain['value']:.2f}x ({gain['ceiling']:.2f}x)" if gain else "",
            ]
        )
    return head, lines


def _planned(row: Row) -> str:
    return say_bytes(row["planned_bytes"]) if "planned_bytes" in row else ""


def checkpointing(rows: Rows) -> str:
    """Return the checkpointing of LongGen's variants, with whose it is where they differ."""
    whose: dict[str, list[str]] = {}
    for (length, name), row in rows_of(rows).items():
        if name != STOCK:
            whose.setdefault(row["checkpointing"], []).append(f"{name} {say_tokens(length)}")
    if len(whose) > 1:
        return ", ".join(f"{kept} ({', '.join(cases)})" for kept, cases in whose.items())
    # Of transformers' alone there is one; of nothing, nothing.
    return next((str(kept) for kept in (*whose, *(row["checkpointing"] for row in rows))), "")


def communication_share(row: Row) -> str:
    """Return how much of a step is communication, and how much of it nothing else hides."""
    busy, exposed = (row[f"communication_{name}"] for name in ("seconds", "exposed_seconds"))
    return (
        f"{busy / row['value']:.1%} of the step, {exposed / row['value']:.1%} with nothing beside"
    )


def communication(rows: Rows) -> list[str]:
    """Return the communication of each row of several GPUs, a line a row."""
    return [
        f"{row['case']}, {say_tokens(row['length'])}: communication is {communication_share(row)}."
        for row in rows
        if row["value"] is not None and "communication_seconds" in row
    ]


def failures(rows: Rows) -> list[str]:
    """Return what was not measured, a line a row."""
    return [
        f"{row['case']}, {say_tokens(row['length'])}: {row['error']}"
        for row in rows
        if row.get("error")
    ]
