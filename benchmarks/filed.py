"""The results files of benchmarks/results, and what their tables share."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

ACCEPTANCE_LENGTH = 131072

Results = Mapping[str, Any]

SERVED = {
    "hybrid": "**hybrid**",
    "hybrid_fp8": "**hybrid**, cache in 8 bits",
    "full": "same engine, all layers full",
    "transformers": "transformers (sdpa)",
}


def files(name: str) -> list[Path]:
    """Return the results files of a name, oldest first: `<date>_<card>_<name>.json`."""
    return sorted(RESULTS.glob(f"*_{name}.json"))


def newest(name: str) -> Results:
    """Return the newest results file of a name."""
    found = files(name)
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


def provenance(results: Results) -> str:
    """Return the line that says where the figures come from."""
    versions = results["versions"]
    kernels = ("flash-attn-4", "nvidia-cutlass-dsl", "flash-sparse-attn")
    others = "".join(
        f"{name} {versions[name]}, "
        for name in kernels
        if versions.get(name, "not installed") != "not installed"
    )
    return (
        f"{results['card']}, {results['date'][:10]}, torch {versions['torch']}, transformers "
        f"{versions['transformers']}, {others}seed {results['seed']}, "
        f"`{results['command']}`, commit {str(results['commit'])[:9]}; "
        f"[{results['file']}](PATH/{results['file']})."
    )
