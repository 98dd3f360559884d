"""Plans against measurements that are made up from known rates."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import calibrate
from longgen.calibration import changed_rates, compare, fit_rates
from longgen.coefficients import COEFFICIENTS
from longgen.errors import UsageError
from longgen.gpus import parse_gpus
from longgen.pattern import SparsePattern
from longgen.plan import LayerPlan
from longgen.shapes import SHAPES
from longgen.training_setup import TrainingSetup
from longgen.training_time import training_time

SHAPE = replace(SHAPES["llama-2-7b"], num_hidden_layers=8)
HYBRID = LayerPlan.build(8, "middle:3", SparsePattern.attention_sink())
FULL = LayerPlan.build(8, "all")


def rows(**true: float) -> list[dict[str, Any]]:
    """Return rows that were planned by the coefficients and measured by others."""
    found = []
    rates = replace(COEFFICIENTS, **true)  # type: ignore[arg-type]
    for name, plan in (("hybrid", HYBRID), ("full", FULL)):
        for length in (16384, 65536, 262144):
            planned, measured = (
                training_time(SHAPE, plan, length, parse_gpus("H200"), TrainingSetup(), 1, c)
                for c in (COEFFICIENTS, rates)
            )
            assert planned is not None and measured is not None
            found.append(
                {
                    "case": f"train_step.{name}",
                    "length": length,
                    "value": measured.seconds,
                    "planned_seconds": planned.seconds,
                    "planned_parts": planned.parts,
                    "planned_bytes": 10,
                    "peak_bytes": 9,
                }
            )
    return found


def test_rates_are_found_again() -> None:
    true = {"matmul": 0.6, "full_forward": 0.585, "full_backward": 0.558}
    fitted = fit_rates(rows(**true))
    for name, rate in true.items():
        assert getattr(fitted, name) == pytest.approx(rate, rel=0.02)
    # What takes next to no time is hardly known, and stays near what it was.
    assert fitted.sparse_forward == pytest.approx(COEFFICIENTS.sparse_forward, rel=0.1)
    # Under the fitted rates the times are those measured.
    for name, plan in (("hybrid", HYBRID), ("full", FULL)):
        again = training_time(SHAPE, plan, 65536, parse_gpus("H200"), TrainingSetup(), 1, fitted)
        measured = next(
            row for row in rows(**true) if row["case"].endswith(name) and row["length"] == 65536
        )
        assert again is not None and again.seconds == pytest.approx(measured["value"], rel=0.01)


def test_right_rates_stay() -> None:
    for before, after in changed_rates(fit_rates(rows())).values():
        assert after == pytest.approx(before, rel=1e-6)


def test_figures_are_compared_where_there_are_two() -> None:
    found = compare([*rows(), {"case": "train_step.transformers", "length": 1, "value": 2.0}])
    assert {one.what for one in found} == {"bytes", "seconds"} and len(found) == 12
    size = next(one for one in found if one.what == "bytes")
    assert size.ratio == pytest.approx(10 / 9) and size.is_close
    assert not replace(size, measured=8.0).is_close


def test_nothing_to_fit_is_said() -> None:
    with pytest.raises(UsageError, match="nothing to fit"):
        fit_rates([{"case": "train_step.hybrid", "length": 1, "value": None}])


def test_the_command_prints_what_is_off(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    top = {"card": "NVIDIA H200", "gpus": 1, "date": "", "commit": "", "command": ""}
    top |= {"versions": {}, "seed": 0}
    file = tmp_path / "train.json"
    file.write_text(json.dumps({**top, "rows": rows(matmul=0.5)}))
    assert calibrate.main([str(file)]) == 0
    text = capsys.readouterr().out
    assert "train_step.hybrid 64K: planned 10 bytes, measured 9 bytes: 1.11" in text
    assert "matmul: 0.700 in the plan, 0.5" in text and "OFF" in text
    off = [{**row, "peak_bytes": 5} for row in rows()]
    file.write_text(json.dumps({**top, "rows": off}))
    assert calibrate.main([str(file)]) == 1
    assert calibrate.main([str(tmp_path / "missing.json"), str(file)]) == 2
    assert "missing.json" in capsys.readouterr().out
