"""Keys and values in 8 bits beside the model's own format: differences, files and report."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from longgen.engine import Engine
from longgen.errors import UsageError
from longgen.evaluate import asking, positions, reading
from longgen.evaluate import run as run_module
from longgen.evaluate.kv_dtypes import differences, say_difference
from longgen.evaluate.results import read_results
from longgen.evaluate.run import evaluate_model

TEXT = np.random.default_rng(0).integers(5, 600, 900)


def needle(variant: str, hits: list[list[int]]) -> dict[str, Any]:
    flat = [hit for cell in hits for hit in cell]
    value = sum(flat) / len(flat)
    case = f"needle.{variant}"
    return {"case": case, "length": 64, "value": value, "hits": hits, "n": len(flat)}


def loss(variant: str, windows: list[float]) -> dict[str, Any]:
    value = sum(windows) / len(windows)
    row = {"case": f"loss.{variant}", "length": 64, "value": value, "n": len(windows)}
    return row | {"by_window": windows, "mean": [value, value], "edges": [0, 32, 64]}


def test_differences_are_those_of_pairs() -> None:
    rows = [
        needle("hybrid", [[1, 1], [0, 1]]),
        needle("hybrid_fp8", [[1, 0], [1, 0]]),
        loss("hybrid", [2.0, 3.0]),
        loss("hybrid_fp8", [2.1, 3.3]),
        {"case": "kv_bytes.hybrid", "length": 64, "value": 2000},
        {"case": "kv_bytes.hybrid_fp8", "length": 64, "value": 1000},
        {"case": "kv_bytes.hybrid_fp8", "length": 128, "value": 1000},
    ]
    first, second, third = differences(rows, "hybrid", "hybrid_fp8")
    assert first["value"] == -0.25 and (first["only_own"], first["only_other"]) == (2, 1)
    assert second["value"] == pytest.approx(0.2)
    assert second["standard_error"] == pytest.approx(0.1)
    assert second["perplexity_ratio"] == pytest.approx(math.exp(0.2))
    assert third["value"] == 0.5 and third["length"] == 64
    assert [row["case"] for row in (first, second, third)] == [
        "needle_difference.hybrid_fp8",
        "loss_difference.hybrid_fp8",
        "kv_bytes_ratio.hybrid_fp8",
    ]
    lines = [say_difference(row) for row in (first, second, third)]
    assert lines[0] == (
        "Needle at 64: accuracy -0.250; of 4 questions 2 are answered only without fp8, 1 only "
        "with it."
    )
    assert lines[1].startswith("Loss at 64: +0.2000 nats a token (standard error 0.1000, 2 windows")
    assert lines[2] == "Keys and values at 64: 1,000 bytes instead of 1.95 KiB."


def test_both_formats_in_one_run(
    hybrid: Any,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(run_module, "REPEATS", 1)
    monkeypatch.setattr(run_module, "DECODE_STEPS", 2)
    kept: list[tuple[str, torch.dtype]] = []

    def watched(place: Any) -> type[Engine]:
        class Watched(Engine):
            def __init__(self, *args: Any, **options: Any) -> None:
                super().__init__(*args, **options)
                kept.append((place.__name__.rpartition(".")[2], self.cache.keys[0].dtype))

        return Watched

    for place in (asking, positions, reading):
        monkeypatch.setattr(place, "Engine", watched(place))
    settings: dict[str, Any] = {"lengths": (200,), "num_depths": 10, "samples": 1}
    settings |= {"kv_dtypes": (None, "fp8"), "model_name": "tiny", "loss_windows": 2}
    lines: list[str] = []
    rows = evaluate_model(hybrid, tokenizer, TEXT, tmp_path, say=lines.append, **settings)
    found = {row["case"]: row for row in rows}
    assert set(found) == {
        f"{metric}.hybrid{end}"
        for metric in ("needle", "loss", "kv_bytes", "prefill", "decode")
        for end in ("", "_fp8")
    }
    assert 4 * found["kv_bytes.hybrid_fp8"]["value"] == found["kv_bytes.hybrid"]["value"]
    assert found["loss.hybrid"]["value"] != found["loss.hybrid_fp8"]["value"]
    assert {row.get("runtime") for row in rows} == {"longgen.engine"}
    compared: Any = read_results(tmp_path / "kv_dtypes.json")["rows"]
    assert [row["case"].partition(".")[0] for row in compared] == [
        "needle_difference",
        "loss_difference",
        "kv_bytes_ratio",
    ]
    difference = found["loss.hybrid_fp8"]["value"] - found["loss.hybrid"]["value"]
    assert compared[1]["value"] == pytest.approx(difference)
    report = (tmp_path / "report.md").read_text()
    for part in ("hybrid with fp8 cache", f"{difference:+.4f} nats a token", "(<loss_fp8.png>)"):
        assert part in report
    assert sum("nats a token (standard" in line for line in lines) == 1

    assert list(dict.fromkeys(kept)) == [
        (place, dtype)
        for dtype in (torch.float32, torch.float8_e4m3fn)
        for place in ("asking", "positions", "reading")
    ]

    # All is taken over, each from its own files.
    lines.clear()
    again = evaluate_model(hybrid, tokenizer, TEXT, tmp_path, say=lines.append, **settings)
    assert again == rows
    assert not any("replaced" in line for line in lines)
    assert sum("cells were measured before" in line for line in lines) == 2


def test_eight_bits_are_refused_for_other_models(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="are for hybrids"):
        evaluate_model(model, tokenizer, TEXT, tmp_path, lengths=(200,), kv_dtypes=("fp8",))
    assert not any(tmp_path.iterdir())
