"""The tables of the docs are those of the committed results."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import filed, tables, training_tables
from longgen.pattern import SparsePattern


def test_the_docs_show_the_newest_results() -> None:
    assert tables.main(["--check"]) == 0, "run python -m benchmarks.tables"


def test_an_outdated_table_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    newest = filed.newest

    def changed(name: str) -> filed.Results:
        results = newest(name)
        rows = [
            row | ({"value": 0.5} if row["value"] is not None else {}) for row in results["rows"]
        ]
        return {**results, "rows": rows}

    monkeypatch.setattr(filed, "newest", changed)
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
    monkeypatch.setattr(filed, "RESULTS", tmp_path)
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


def test_inference_tables_put_the_hybrid_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    common = {"length": 131072, "batch": 1, "spread": [1.0, 2.0], "share_of_ceiling": 0.8}
    rows = []
    for name, seconds in (("full", 10.4), ("hybrid", 5.8)):
        row = {"case": f"prefill.{name}", "value": seconds, "flops": seconds, **common}
        rows += [row | {"prefill_chunk": 131072}]
        row = {"case": f"decode.{name}", "value": seconds, "bytes": 1, **common}
        rows += [row | {"tokens_per_second": 100.0}]
        row = {"case": f"kv_bytes.{name}", "value": seconds * 2**30, **common}
        rows += [row | {"formula_bytes": 1, "work_bytes": 2**30, "max_sequences": 4}]
    rows += [{**rows[0], "case": "prefill.transformers", "value": None, "error": "No memory."}]
    results = {
        "card": "NVIDIA H200",
        "date": "2026-12-01T00:00:00+00:00",
        "commit": "0" * 40,
        "command": "longgen bench inference --shape llama-2-7b",
        "seed": 0,
        "versions": {"torch": "2", "transformers": "5"},
        "ceiling": {"matmul_tflops": 760.0, "matmul_size": 8192, "copy_terabytes_per_second": 4.3},
        "shape": "llama-2-7b",
        "layers": "SFS",
        "pattern": SparsePattern.attention_sink().to_dict(),
        "weight_bytes": 13 * 2**30,
        "rows": rows,
    }
    monkeypatch.setattr(filed, "RESULTS", tmp_path)
    assert tables.TABLES["inference"]() == ["Not measured yet."]
    (tmp_path / "2026-12-01_nvidia-h200_inference.json").write_text(json.dumps(results))
    lines = tables.TABLES["inference"]()
    assert "| 128K | **hybrid** |  | 5.80 | 80% |  |" in lines
    assert "|  | full |  | 10.4 | 80% | 1.79x (1.79x) |" in lines
    assert "| 128K | **hybrid** | 5.80 GiB | 1 bytes | 44.2% | 1.00 GiB | 4 |" in lines
    text = "\n".join(lines)
    assert "- prefill.transformers, 128K: No memory." in text
    assert "llama-2-7b: 1 of 3 layers full, 1 sink + 32 local" in text


def test_the_training_table_has_every_variant_and_how_it_ran(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert training_tables.train("no-such-results") == ["Not measured yet."]
    row = {"length": 131072, "context_parallel": 4, "sharding": "fsdp", "checkpointing": "full"}
    row |= {"flops": 2.0, "mfu": 0.47, "peak_bytes": 60 << 30, "planned_bytes": 62 << 30}
    row |= {"tokens_per_second_per_gpu": 6000.0, "spread": [5.4, 5.6], "n": 5}
    rows = [
        {**row, "case": "train_step.hybrid", "value": 5.5},
        {**row, "case": "train_step.full", "value": 9.9, "flops": 3.6},
        {**row, "case": "train_step.transformers", "value": None, "error": "Out of memory."},
    ]
    results = {
        "card": "NVIDIA H200",
        "gpus": 4,
        "date": "2026-11-25T00:00:00+00:00",
        "commit": "0123456789abcdef",
        "command": "longgen bench train",
        "versions": {"torch": "2.11.0", "transformers": "5.17.0"},
        "seed": 0,
        "shape": "llama-2-7b",
        "layers": "SSFFFSSS",
        "layers_of": 32,
        "pattern": SparsePattern.attention_sink().to_dict(),
        "ceiling": {
            "matmul_tflops": 790.0,
            "matmul_size": 8192,
            "copy_terabytes_per_second": 4.3,
        },
        "mfu_is": "MFU: so.",
        "timing": {"a_step_is": "forward, backward"},
        "rows": rows,
    }
    (tmp_path / "2026-11-25_nvidia-h200_train.json").write_text(json.dumps(results))
    monkeypatch.setattr(filed, "RESULTS", tmp_path)
    text = "\n".join(training_tables.train("train"))
    assert "| 128K | **hybrid** | 5.50 | 6,000 | 47% | 60.0 GiB | 62.0 GiB |  |" in text
    assert "1.80x (1.80x)" in text and "train_step.transformers, 128K: Out of memory." in text
    assert "llama-2-7b, 8 of 32 layers: 3 full" in text
    assert "4 GPUs; 4 share a sequence; sharding fsdp; checkpointing full; forward, back" in text
    assert "MFU: so." in text and "2026-11-25_nvidia-h200_train.json" in text

    for one in rows[:2]:
        one["checkpointing"] = "elementwise"
    (tmp_path / "2026-11-25_nvidia-h200_train.json").write_text(json.dumps(results))
    assert "checkpointing elementwise (transformers full);" in "\n".join(
        training_tables.train("train")
    )
    # The short one has what was measured.
    short = training_tables.training("train")
    assert short[0].startswith("| 128K tokens, forward, backward | a step |") and len(short) == 6
    assert short[2] == (
        "| **hybrid** | 5.50 s | 6,000 | 47% | 60.0 GiB | what lies between products |"
    )


def test_recipes_are_planned_for_the_gpus_in_their_names() -> None:
    text = "\n".join(training_tables.recipes())
    assert "64 x H100-80GB | 27 of 80" in text
    assert len(training_tables.planned_recipes()) == len(training_tables.recipes()) - 2
