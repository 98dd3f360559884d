"""Write the tables of README.md and docs/ from benchmarks/results: python -m benchmarks.tables.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; the newest results file of the
name is used. With --check nothing is written, and a table that is out of date is an error.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks import filed, training_tables
from longgen.bench import summary
from longgen.bench.plots import cases_of, providers_of
from longgen.bench.providers import registry
from longgen.bench.work import DIRECTIONS
from longgen.evaluate.results import VARIANTS, say_bytes, say_runtimes, say_tokens
from longgen.pattern import SparsePattern
from longgen.plan import LayerPlan

PAGES = ("README.md", "docs/results.md", "docs/recipes.md")

LABELS = {
    "original": "original model (8K)",
    "hybrid": "**hybrid**, 10 of 30 layers full",
    "hybrid_fp8": "**hybrid**, keys and values in 8 bits",
    "full": "twin, all layers full",
    "sparse": "twin, all layers sparse",
}


def grid(
    results: filed.Results,
    metric: str,
    head: str,
    say: Callable[[Any], str],
    labels: Mapping[str, str],
) -> list[str]:
    """Return a Markdown table of one metric: a row a variant, a column a length."""
    table = filed.rows_of(results, metric)
    lengths = sorted({length for rows in table.values() for length in rows})
    lines = [
        f"| {head} | " + " | ".join(say_tokens(length) for length in lengths) + " |",
        "|---|" + "---|" * len(lengths),
    ]
    for variant in [name for name in labels if name in table]:
        cells = [say(table[variant][n]) if n in table[variant] else "" for n in lengths]
        lines.append(f"| {labels[variant]} | " + " | ".join(cells) + " |")
    return lines


def needle(name: str) -> list[str]:
    """Return the needle table of one results file, with 95 % intervals."""
    results = filed.newest(name)

    def say(row: Any) -> str:
        low, high = row["interval"]
        return f"{row['value']:.3f} ({low:.2f}-{high:.2f})"

    lines = grid(results, "needle", "exact six digits found", say, LABELS)
    n = next(iter(next(iter(filed.rows_of(results, "needle").values())).values()))["n"]
    return [
        *lines,
        "",
        f"n = {n} a cell of this table, 95 % Wilson intervals. " + filed.provenance(results),
    ]


def recall(name: str) -> list[str]:
    """Return the table of benchmarks.recall_probe: what was planted, and found, by distance."""
    results = filed.newest(name)
    edges = results["rows"][0]["edges"]
    bins = [f"{say_tokens(a)} to {say_tokens(b)}" for a, b in pairwise(edges)]
    bins[0] = f"up to {say_tokens(edges[1])}"
    lines = [
        f"| planted in {say_tokens(edges[-1])}, asked for later | by | {' | '.join(bins)} | all |",
        "|---|---|" + "---|" * (len(bins) + 1),
    ]
    for metric, words, prefix in (
        ("recall_facts", "facts, in many wordings: whole numbers", ""),
        ("recall_copies", "copies: their tokens", "token_"),
        ("recall_codes", "records of codes: whole numbers", ""),
    ):
        found = filed.rows_of(results, metric)
        for variant in [name for name in LABELS if name in found]:
            (row,) = found[variant].values()
            cells = ["" if x is None else f"{x:.2f}" for x in row[f"{prefix}by_distance"]]
            cells.append(f"{row[f'{prefix}value']:.3f} of {row['n']}")
            label = LABELS[variant].partition(",")[0]
            lines.append(f"| {words} | {label} | {' | '.join(cells)} |")
            words = ""
    notes = [f"- {results['note']}", ""] if "note" in results else []
    return [*lines, "", *notes, filed.provenance(results)]


def attention_lengths(*names: str) -> list[str]:
    """Return the table of attention benchmarks over lengths, of one card: forward and backward
    rates."""
    runs = [filed.newest(name) for name in names]
    assert len({run["card"] for run in runs}) == 1
    rows = [row for run in runs for row in run["rows"]]
    lengths = sorted({row["length"] for row in rows})
    labels = {name: provider.label for name, provider in registry().items()}
    found = {(row["case"], row["provider"], row["length"]): row for row in rows if row["value"]}
    lines = [
        "| forward / backward | by | " + " | ".join(map(say_tokens, lengths)) + " |",
        "|---|---|" + "---|" * len(lengths),
    ]
    for pattern in cases_of(rows):
        head = pattern
        for provider in providers_of(rows):
            cells = []
            for length in lengths:
                keys = [(f"attention.{pattern}.{d}", provider, length) for d in DIRECTIONS]
                pair = [found[key]["value"] for key in keys if key in found]
                cells.append(" / ".join(f"{value:.0f}" for value in pair))
            if any(cells):
                lines.append(f"| {head} | {labels[provider]} | " + " | ".join(cells) + " |")
                head = ""
    return [*lines, "", "TFLOP/s. " + " ".join(map(filed.provenance, runs))]


def costs(name: str) -> list[str]:
    """Return the table of cache bytes held and decode time."""
    results = filed.newest(name)
    lines = grid(results, "kv_bytes", "KV cache held", lambda row: say_bytes(row["value"]), LABELS)
    rows = [row for row in results["rows"] if row["case"].startswith("kv_bytes.")]
    runtimes = say_runtimes(rows, VARIANTS)
    return [*lines, "", " ".join(filter(None, [runtimes, filed.provenance(results)]))]


def attention(name: str) -> list[str]:
    """Return the table of one attention benchmark at 128K tokens, or at its greatest length."""
    if not filed.files(name):
        return ["Not measured yet."]
    results = filed.newest(name)
    lengths = {row["length"] for row in results["rows"]}
    length = filed.ACCEPTANCE_LENGTH if filed.ACCEPTANCE_LENGTH in lengths else max(lengths)
    rows = [row for row in results["rows"] if row["length"] == length]
    found = {(row["case"], row["provider"]): row for row in rows}
    labels = {name: provider.label for name, provider in registry().items()}
    lines = [
        f"| at {say_tokens(length)} | by | "
        + " | ".join(f"{d} TFLOP/s | of matmul | ms" for d in DIRECTIONS)
        + " |",
        "|---|---|" + "---|" * 3 * len(DIRECTIONS),
    ]
    for pattern in cases_of(rows):
        head = pattern
        for provider in providers_of(rows):
            pair = [found.get((f"attention.{pattern}.{d}", provider)) for d in DIRECTIONS]
            if not any(pair):
                continue
            cells = " | ".join(_speed(row) for row in pair)
            label = labels.get(provider, provider)
            label = f"**{label}**" if provider == "ours" else label
            lines.append(f"| {head} | {label} | {cells} |")
            head = ""
    notes: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for reason in filter(None, (row.get("note"), row.get("error"))):
            of = notes.setdefault((labels.get(row["provider"], row["provider"]), reason), [])
            _, pattern, _ = row["case"].split(".")
            of += [pattern] if pattern not in of else []
    row, rate = rows[0], results["ceiling"]
    shape = f"{row['heads']}/{row['kv_heads']} heads x {row['head_dim']}, {row['dtype']}, batch 1"
    return [
        *lines,
        "",
        *(f"- {who} ({', '.join(of)}): {reason}" for (who, reason), of in notes.items()),
        *_share_of_full(found),
        f"- {shape}; {rate['matmul_size']}^3 matmul {rate['matmul_tflops']:.0f} TFLOP/s, copy "
        f"{rate['copy_terabytes_per_second']:.2f} TB/s."
        + (" The run was interrupted." if results.get("partial") else ""),
        "",
        filed.provenance(results),
    ]


def _speed(row: Any) -> str:
    if row is None or row["value"] is None:
        return "- | - | -"
    digits = 0 if row["value"] >= 10 else 2
    return f"{row['value']:.{digits}f} | {row['share_of_matmul']:.0%} | {row['ms']:.4g}"


def _share_of_full(found: Mapping[tuple[str, str], Any]) -> list[str]:
    """Return what a layer that keeps 2K tokens takes of a full one's time, forward and backward."""

    def time(pattern: str) -> float | None:
        rows = [found.get((f"attention.{pattern}.{d}", "ours")) for d in DIRECTIONS]
        times = [row.get("ms") for row in rows if row]
        return sum(times) if len(times) == len(DIRECTIONS) and all(times) else None

    full, sparse = time("full"), time("sink_2k")
    if full is None or sparse is None:
        return []
    return [f"- LongGen's sink_2k, forward + backward: {sparse / full:.1%} of the full one's time."]


def inference(name: str) -> list[str]:
    """Return the tables of one inference benchmark."""
    if not filed.files(name):
        return ["Not measured yet."]
    results = filed.newest(name)
    rows, rate = results["rows"], results["ceiling"]
    lines: list[str] = []
    for make in (summary.prefill_table, summary.decode_table, summary.memory_table):
        head, body = make(rows)
        lines += [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
        for cells in body:
            words = (f"**{cell}**" if cell == "hybrid" else cell for cell in cells)
            lines.append(f"| {' | '.join(words)} |")
        lines.append("")
    notes = [*summary.throughput_lines(rows), *summary.failures(rows)]
    plan = LayerPlan(results["layers"], SparsePattern.from_dict(results["pattern"]))
    return [
        *lines,
        *(f"- {note}" for note in notes),
        f"- {results['shape']}: {len(plan.full_layers)} of {plan.num_layers} layers full, "
        f"{plan.pattern}; weights {say_bytes(results['weight_bytes'])}; "
        f"{rate['matmul_size']}^3 matmul {rate['matmul_tflops']:.0f} TFLOP/s, copy "
        f"{rate['copy_terabytes_per_second']:.2f} TB/s."
        + (" The run was interrupted." if results.get("partial") else ""),
        "",
        filed.provenance(results),
    ]


def serving(name: str) -> list[str]:
    """Return the short table of one inference benchmark: a prompt of 128K tokens, its cache, one
    sequence's tokens and those of as many as fit."""
    results = filed.newest(name)
    rows = [row for row in results["rows"] if row["length"] == filed.ACCEPTANCE_LENGTH]
    prompts, caches, tokens = (
        {variant: group for (_, batch, variant), group in found.items() if batch == 1}
        for found in (summary.rows_of(rows, name) for name in ("prefill", "kv_bytes", "decode"))
    )
    batches = summary.best_batches(rows)
    lines = [
        f"| {say_tokens(filed.ACCEPTANCE_LENGTH)} tokens | prompt read | cache | one sequence | "
        "as many as fit |",
        "|---|---|---|---|---|",
    ]
    for variant, label in filed.SERVED.items():
        # In pieces, as prompts are read unless asked otherwise.
        prompt = min(prompts[variant], key=lambda row: row["prefill_chunk"])
        cache, token = caches[variant][0], tokens[variant][0]
        most = batches[filed.ACCEPTANCE_LENGTH, variant]
        lines.append(
            f"| {label} | {prompt['value']:.1f} s | {say_bytes(cache['value'])} | "
            f"{token['value']:.1f} ms a token | {most['tokens_per_second']:.0f} tokens/s "
            f"({most['batch']}) |"
        )
    return [*lines, "", f"{results['shape']}. " + filed.provenance(results)]


TABLES: dict[str, Callable[[], list[str]]] = {
    "needle": lambda: needle("twins"),
    "needle_128k": lambda: needle("twins-128k"),
    "recall_128k": lambda: recall("recall-128k"),
    "needle_128k_codes": lambda: needle("twins-128k-230-steps"),
    "needle_128k_dense": lambda: needle("twins-128k-400-steps"),
    "kv": lambda: costs("demo"),
    "attention": lambda: attention("attention"),
    "attention_lengths": lambda: attention_lengths(
        "attention-lengths", "attention-lengths-strided"
    ),
    "attention_gqa": lambda: attention("attention-gqa"),
    "serving": lambda: serving("inference"),
    "inference": lambda: inference("inference"),
    "inference_gqa": lambda: inference("inference-gqa"),
    "inference_qwen3": lambda: inference("inference-qwen3"),
    "inference_1m": lambda: inference("inference-1m"),
    "inference_70b": lambda: inference("inference-70b"),
    "attention_small": lambda: attention("attention-small"),
    "training": lambda: training_tables.training("train"),
    "train": lambda: training_tables.train("train"),
    "train_slice_1gpu": lambda: training_tables.train("train-slice-1gpu"),
    "train_slice_2gpus": lambda: training_tables.train("train-slice-2gpus"),
    "train_2gpus": lambda: training_tables.train("train-2gpus"),
    "train_whole": lambda: training_tables.train("train-whole"),
    "recipes": training_tables.recipes,
}


def fill(page: Path) -> str:
    """Return a page's text with its tables renewed."""
    link = "benchmarks/results" if page.parent == filed.ROOT else "../benchmarks/results"

    def table(match: re.Match[str]) -> str:
        name = match[1]
        if name not in TABLES:
            raise SystemExit(f"{page.name} asks for a table {name!r}; there are {sorted(TABLES)}.")
        body = "\n".join(TABLES[name]()).replace("(PATH/", f"({link}/")
        return f"<!-- table: {name} -->\n{body}\n<!-- end -->"

    text = page.read_text(encoding="utf-8")
    return re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end -->", table, text, flags=re.DOTALL)


def main(argv: Sequence[str] | None = None) -> int:
    """Renew the tables, or with --check say which are out of date."""
    parser = argparse.ArgumentParser(description="Write the tables of the docs from the results.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if out of date")
    check = parser.parse_args(argv).check
    stale = [
        page for page in PAGES if fill(filed.ROOT / page) != (filed.ROOT / page).read_text("utf-8")
    ]
    for page in stale:
        if check:
            print(f"{page} is out of date: run python -m benchmarks.tables")
        else:
            (filed.ROOT / page).write_text(fill(filed.ROOT / page), encoding="utf-8")
            print(f"renewed the tables of {page}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
