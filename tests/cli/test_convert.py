"""`longgen convert`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from longgen.checkpoint import RECORD, load_model
from longgen.pattern import SparsePattern
from longgen.plan import LayerPlan

SMALL = ("--block-size", 8, "--local-blocks", 2)


def test_it_writes_a_hybrid_and_says_what_it_is(
    run: Callable[..., Any], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "hybrid"
    result = run("convert", tiny_checkpoint, "--out", out, "--context", "1K", *SMALL)
    assert result.code == 0
    lines = result.out.splitlines()
    assert lines[:2] == ["Layers   SFS", "Pattern  1 sink + 2 local of 8-token blocks"]
    assert "1,024 tokens" in lines[2] and str(out) in lines[3]
    plan = load_model(out).config.layer_plan
    assert plan == LayerPlan("SFS", SparsePattern(block_size=8, local_blocks=2))


def test_json_is_the_record(run: Callable[..., Any], tiny_checkpoint: Path, tmp_path: Path) -> None:
    arguments = ("--full-layers", "top:2", "--rope-theta", "5e5", "--json", *SMALL)
    result = run("convert", tiny_checkpoint, "--out", tmp_path / "h", *arguments)
    assert result.json["layers"] == "SFF" and result.json["rope_theta"] == 500000.0
    assert result.out == (tmp_path / "h" / RECORD).read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--full-layers", "middle:4", *SMALL], "4 full layers; the model has only 3"),
        (["--context", "32", *SMALL], "32 tokens is below the 64"),
        ([], "nothing would be sparse"),
        (["--context", "1K"], "nothing would be sparse"),
        (["--rope-theta", "-3", *SMALL], "rotary base is -3"),
    ],
)
def test_what_does_not_fit_is_refused_and_leaves_nothing(
    refused: Callable[..., str],
    tiny_checkpoint: Path,
    tmp_path: Path,
    arguments: list[object],
    words: str,
) -> None:
    out = tmp_path / "hybrid"
    assert words in refused("convert", tiny_checkpoint, "--out", out, *arguments)
    assert not out.exists()


def test_other_models_and_folders_are_refused(
    refused: Callable[..., str],
    make_checkpoint: Callable[..., Path],
    tiny_checkpoint: Path,
    tiny_hybrid: Path,
    tmp_path: Path,
) -> None:
    out = ("--out", tmp_path / "hybrid", *SMALL)
    assert "hybrid already (layers SFS)" in refused("convert", tiny_hybrid, *out)
    assert "There is no checkpoint in nowhere" in refused("convert", "nowhere", *out)
    assert "names a shape" in refused("convert", "llama-2-7b", *out)
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "gpt2"}')
    assert "'gpt2'" in refused("convert", other, *out)
    window = make_checkpoint(tmp_path / "window", "mistral", sliding_window=16)
    assert "sliding window of 16" in refused("convert", window, *out)
    assert not (tmp_path / "hybrid").exists()
    assert "not empty" in refused("convert", tiny_checkpoint, "--out", other, *SMALL)
    assert [path.name for path in other.iterdir()] == ["config.json"]
