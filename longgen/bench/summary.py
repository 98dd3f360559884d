"""Tables of an inference benchmark, from its rows: for the terminal and for the documentation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from longgen.bench.inference_settings import VARIANTS
from longgen.evaluate.results import Row, Rows, say_bytes, say_tokens

# A table: its columns, and its lines.
Table = tuple[list[str], list[list[str]]]

_BASE = "hybrid"
_WHOLE = "full"
# What each metric's ceiling is counted in; equal efficiency would make ratios of it those of times.
_COUNTS = {"prefill": "flops", "decode": "bytes", "kv_bytes": "formula_bytes"}


def rows_of(rows: Rows, metric: str) -> dict[tuple[int, int, str], list[Row]]:
    """Return the rows of a metric by length, batch and variant, in the order of tables."""
    found: dict[tuple[int, int, str], list[Row]] = {}
    order = {f"{metric}.{name}": name for name in VARIANTS}
    for row in rows:
        name = order.get(row["case"])
        if name:
            found.setdefault((row["length"], row["batch"], name), []).append(row)
    place = list(VARIANTS).index
    return dict(sorted(found.items(), key=lambda item: (*item[0][:2], place(item[0][2]))))


def best(rows: Iterable[Row]) -> Row | None:
    """Return the row of the least value; None where nothing was measured."""
    measured = [row for row in rows if row["value"] is not None]
    return min(measured, key=lambda row: row["value"], default=None)


def ratios(rows: Rows) -> list[dict[str, Any]]:
    """Return how many times the hybrid's time or bytes the others take, at each length and batch.

    `ceiling` is the same ratio of what has to be computed or read: that of times if both were
    equally efficient. "throughput" is the hybrid's tokens per second at its best batch over the
    other's at its best.
    """
    found = []
    for metric, count in _COUNTS.items():
        groups = {key: best(group) for key, group in rows_of(rows, metric).items()}
        for (length, batch, name), row in groups.items():
            base = groups.get((length, batch, _BASE))
            if name != _BASE and row and base:
                found.append(
                    {
                        "metric": metric,
                        "length": length,
                        "batch": batch,
                        "against": name,
                        "value": row["value"] / base["value"],
                        "ceiling": row[count] / base[count],
                    }
                )
    return found + _throughputs(rows)


def best_batches(rows: Rows) -> dict[tuple[int, str], Row]:
    """Return the row of most tokens a second over all sequences, by length and variant.

    A variant whose run ended before as many sequences as others had, though more of its own fit,
    is left out: its best is not known.
    """
    found: dict[tuple[int, str], Row] = {}
    tried: dict[tuple[int, str], int] = {}
    for (length, batch, name), group in rows_of(rows, "decode").items():
        tried[length, name] = max(batch, tried.get((length, name), 0))
        for row in group:
            most = found.get((length, name))
            if row["value"] is not None and (
                most is None or row["tokens_per_second"] > most["tokens_per_second"]
            ):
                found[length, name] = row
    fits = _fits(rows)

    def is_whole(length: int, name: str) -> bool:
        most = max(batch for (other, _), batch in tried.items() if other == length)
        return tried[length, name] >= min(most, fits.get((length, name), most))

    return {key: row for key, row in found.items() if is_whole(*key)}


def _fits(rows: Rows) -> dict[tuple[int, str], int]:
    """Return how many sequences fit, by length and variant."""
    return {
        (length, name): row["max_sequences"]
        for (length, _, name), group in rows_of(rows, "kv_bytes").items()
        if (row := best(group))
    }


def _throughputs(rows: Rows) -> list[dict[str, Any]]:
    most = {key: row["tokens_per_second"] for key, row in best_batches(rows).items()}
    return [
        {
            "metric": "throughput",
            "length": length,
            "against": name,
            "value": most[length, _BASE] / speed,
        }
        for (length, name), speed in most.items()
        if name != _BASE and (length, _BASE) in most
    ]


def prefill_table(rows: Rows) -> Table:
    """Return seconds to read a prompt."""
    head = ["tokens", "variant", "in pieces, s", "at once, s", "of matmul", "hybrid is"]
    groups = rows_of(rows, "prefill")

    def line(key: tuple[int, int, str], group: list[Row]) -> list[str]:
        pieces = [row for row in group if row.get("prefill_chunk", key[0]) < key[0]]
        whole = [row for row in group if row not in pieces]
        row = best(group)
        return [
            _figure(best(pieces)) if pieces else "",
            _figure(best(whole)),
            f"{row['share_of_ceiling']:.0%}" if row else "",
            _advantage(rows, "prefill", key),
        ]

    return head, _lines(groups, line)


def decode_table(rows: Rows) -> Table:
    """Return milliseconds of a step that writes a token for every sequence."""
    head = ["tokens", "sequences", "variant", "ms a token", "of copy", "tokens/s", "hybrid is"]

    def line(key: tuple[int, int, str], group: list[Row]) -> list[str]:
        row = best(group)
        if row is None:
            return ["-", "", "", ""]
        return [
            number(row["value"]),
            f"{row['share_of_ceiling']:.0%}",
            number(row["tokens_per_second"]),
            _advantage(rows, "decode", key),
        ]

    return head, _lines(rows_of(rows, "decode"), line, batch=True)


def memory_table(rows: Rows) -> Table:
    """Return bytes of keys and values, of a prompt's reading, and how many sequences fit."""
    head = ["tokens", "variant", "KV held", "formula", "less than full", "prefill peak", "fit"]
    groups = rows_of(rows, "kv_bytes")

    def line(key: tuple[int, int, str], group: list[Row]) -> list[str]:
        row, whole = best(group), best(groups.get((*key[:2], _WHOLE), []))
        if row is None:
            return ["-", "", "", "", ""]
        work = row.get("work_bytes")
        less = 1 - row["value"] / whole["value"] if whole else 0
        return [
            say_bytes(row["value"]),
            say_bytes(row["formula_bytes"]),
            f"{less:.1%}" if less else "",
            "" if work is None else say_bytes(work),
            f"{row['max_sequences']:,}",
        ]

    return head, _lines(groups, line)


def throughput_table(rows: Rows) -> Table:
    """Return tokens per second of all sequences together, at the best number of them."""
    head = ["tokens", "variant", "fit", "best with", "tokens/s in all", "hybrid is"]
    most = best_batches(rows)
    fits = _fits(rows)
    groups = {(length, 1, name): [row] for (length, name), row in most.items()}

    def line(key: tuple[int, int, str], group: list[Row]) -> list[str]:
        length, _, name = key
        (row,) = group
        fit, base = fits.get((length, name)), most.get((length, _BASE))
        speed = row["tokens_per_second"]
        times = base["tokens_per_second"] / speed if base and name != _BASE else None
        return [
            "" if fit is None else f"{fit:,}",
            f"{row['batch']:,}",
            number(speed),
            f"{times:.2f}x" if times else "",
        ]

    place = list(VARIANTS).index
    order = sorted(groups.items(), key=lambda item: (item[0][0], place(item[0][2])))
    return head, _lines(dict(order), line)


def _lines(
    groups: dict[tuple[int, int, str], list[Row]],
    line: Callable[[tuple[int, int, str], list[Row]], list[str]],
    *,
    batch: bool = False,
) -> list[list[str]]:
    """Put lengths, batches and variants in front of cells, each where it changes."""
    lines, last = [], (-1, -1)
    for key, group in groups.items():
        length, number_of, name = key
        new = length != last[0]
        cells = [say_tokens(length) if new else ""]
        if batch:
            cells.append(str(number_of) if new or number_of != last[1] else "")
        last = (length, number_of)
        lines.append([*cells, name, *line(key, group)])
    return lines


def _ratio(rows: Rows, metric: str, key: tuple[int, int, str]) -> dict[str, Any] | None:
    for ratio in ratios(rows):
        found = (ratio["length"], ratio.get("batch"), ratio["against"])
        if ratio["metric"] == metric and found == key:
            return ratio
    return None


def _advantage(rows: Rows, metric: str, key: tuple[int, int, str]) -> str:
    """Say how many times as fast the hybrid is, and how many times at equal efficiency."""
    ratio = _ratio(rows, metric, key)
    return f"{ratio['value']:.2f}x ({ratio['ceiling']:.2f}x)" if ratio else ""


def failures(rows: Rows) -> list[str]:
    """Return what was not measured, a line a row."""
    found = []
    for row in rows:
        if row.get("error"):
            batch = f", {row['batch']} sequences" if row["batch"] > 1 else ""
            found.append(f"{row['case']}, {say_tokens(row['length'])}{batch}: {row['error']}")
    return list(dict.fromkeys(found))


def throughput_lines(rows: Rows) -> list[str]:
    """Return a line for each length and rival: tokens per second at each one's best batch."""
    return [
        f"{say_tokens(ratio['length'])}: at the best batch of each, the hybrid writes "
        f"{ratio['value']:.2f} times as many tokens a second as {ratio['against']}."
        for ratio in ratios(rows)
        if ratio["metric"] == "throughput"
    ]


def number(value: float) -> str:
    """Write a figure with three digits, or all of them before the point."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:#.3g}"


def _figure(row: Row | None) -> str:
    return "-" if row is None else number(row["value"])


TABLES = (prefill_table, decode_table, memory_table, throughput_table)
