"""Write the tables of README.md and docs/ from benchmarks/results: python -m benchmarks.tables.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; the newest results file of the
name is used. With --check nothing is written, and a table that is out of date is an error.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from longgen.evaluate.results import say_bytes, say_tokens

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = ("README.md", "docs/results.md")

Results = Mapping[str, Any]

LABELS = {
    "original": "original model (8K)",
    "hybrid": "**hybrid**, 10 of 30 layers full",
    "full": "twin, all layers full",
    "sparse": "twin, all layers sparse",
}


def newest(name: str) -> Results:
    """Return the newest results file of a name; files are named `<date>_<card>_<name>.json`."""
    found = sorted(RESULTS.glob(f"*_{name}.json"))
    if not found:
        raise SystemExit(f"There is no benchmarks/results/*_{name}.json.")
    data: Results = json.loads(found[-1].read_text(encoding="utf-8"))
    return {**data, "file": found[-1].name}


def rows_of(results: Results, metric: str) -> dict[str, dict[int, Any]]:
    """Return the rows of one metric as {variant: {length: row}}."""
    table: dict[str, dict[int, Any]] = {}
    for row in results["rows"]:
        kind, _, variant = row["case"].partition(".")
        if kind == metric:
            table.setdefault(variant, {})[row["length"]] = row
    return table


def grid(
    results: Results, metric: str, head: str, say: Callable[[Any], str], labels: Mapping[str, str]
) -> list[str]:
    """Return a Markdown table of one metric: a row a variant, a column a length."""
    table = rows_of(results, metric)
    lengths = sorted({length for rows in table.values() for length in rows})
    lines = [
        f"| {head} | " + " | ".join(say_tokens(length) for length in lengths) + " |",
        "|---|" + "---|" * len(lengths),
    ]
    for variant in [name for name in labels if name in table]:
        cells = [say(table[variant][n]) if n in table[variant] else "" for n in lengths]
        lines.append(f"| {labels[variant]} | " + " | ".join(cells) + " |")
    return lines


def provenance(results: Results) -> str:
    """Return the line that says where the figures come from."""
    versions = results["versions"]
    return (
        f"{results['card']}, {results['date'][:10]}, torch {versions['torch']}, transformers "
        f"{versions['transformers']}, seed {results['seed']}, `{results['command']}`, commit "
        f"{str(results['commit'])[:9]}; [{results['file']}](PATH/{results['file']})."
    )


def needle(name: str) -> list[str]:
    """Return the needle table of one results file, with 95 % intervals."""
    results = newest(name)

    def say(row: Any) -> str:
        low, high = row["interval"]
        return f"{row['value']:.3f} ({low:.2f}-{high:.2f})"

    lines = grid(results, "needle", "exact six digits found", say, LABELS)
    n = next(iter(next(iter(rows_of(results, "needle").values())).values()))["n"]
    return [
        *lines,
        "",
        f"n = {n} a cell of this table, 95 % Wilson intervals. " + provenance(results),
    ]


def costs(name: str) -> list[str]:
    """Return the table of cache bytes held and decode time."""
    results = newest(name)
    lines = grid(results, "kv_bytes", "KV cache held", lambda row: say_bytes(row["value"]), LABELS)
    return [*lines, "", provenance(results)]


TABLES: dict[str, Callable[[], list[str]]] = {
    "needle": lambda: needle("twins"),
    "kv": lambda: costs("demo"),
}


def fill(page: Path) -> str:
    """Return a page's text with its tables renewed."""
    link = "benchmarks/results" if page.parent == ROOT else "../benchmarks/results"

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
    stale = [page for page in PAGES if fill(ROOT / page) != (ROOT / page).read_text("utf-8")]
    for page in stale:
        if check:
            print(f"{page} is out of date: run python -m benchmarks.tables")
        else:
            (ROOT / page).write_text(fill(ROOT / page), encoding="utf-8")
            print(f"renewed the tables of {page}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
