"""The tables of the docs are those of the committed results."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import tables


def test_the_docs_show_the_newest_results() -> None:
    assert tables.main(["--check"]) == 0, "run python -m benchmarks.tables"


def test_an_outdated_table_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    newest = tables.newest

    def changed(name: str) -> tables.Results:
        results = newest(name)
        rows = [{**row, "value": 0.5} for row in results["rows"]]
        return {**results, "rows": rows}

    monkeypatch.setattr(tables, "newest", changed)
    assert tables.main(["--check"]) == 1


def attention_row(case: str, provider: str, **fields: Any) -> dict[str, Any]:
    row = {"case": f"attention.{case}", "provider": provider, "length": 131072, "value": 620.4}
    row |= {"ms": 100.0, "share_of_matmul": 0.81, "heads": 32, "kv_heads": 8, "head_dim": 128}
    return row | {"dtype": "bf16", **fields}


def test_attention_tables_put_longgen_first_and_say_what_failed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rows = [
        attention_row(f"{case}.{direction}", provider, ms=4.0 if case == "sink_2k" else 100.0)
        for case in ("sink_2k", "full")
        for direction in ("forward", "backward")
        for provider in ("fa4", "ours")
    ]
    rows[0] |= {"value": None, "ms": None, "error": "Out of memory at 131,072 tokens."}
    rows += [attention_row("full.forward", "ours", length=8192)]
    results = {
        "card": "NVIDIA H200",
        "date": "2026-12-01T00:00:00+00:00",
        "commit": "0" * 40,
        "command": "longgen bench attention",
        "seed": 0,
        "versions": {"torch": "2", "transformers": "5", "flash-attn-4": "4.0"},
        "ceiling": {"matmul_tflops": 760.0, "matmul_size": 8192, "copy_terabytes_per_second": 4.3},
        "rows": rows,
    }
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert tables.TABLES["attention"]() == ["Not measured yet."]
    (tmp_path / "2026-12-01_nvidia-h200_attention.json").write_text(json.dumps(results))
    lines = tables.TABLES["attention"]()
    body = [line for line in lines if line.startswith("| ") and "TFLOP/s" not in line]
    assert [line.split(" | ")[:2] for line in body] == [
        ["| full", "**LongGen (auto)**"],
        ["| ", "FlashAttention-4"],
        ["| sink_2k", "**LongGen (auto)**"],
        ["| ", "FlashAttention-4"],
    ]
    assert body[0].endswith("620 | 81% | 100 | 620 | 81% | 100 |")
    assert body[3].startswith("|  | FlashAttention-4 | - | - | - | 620")
    text = "\n".join(lines)
    assert "Out of memory at 131,072 tokens." in text
    assert "forward + backward: 4.0% of the full one's time" in text
    assert "flash-attn-4 4.0, seed 0" in text and "32/8 heads x 128" in text
