"""`longgen export`: a checkpoint of a run becomes a model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from longgen.checkpoint import RECORD, load_model, load_tokenizer
from longgen.pattern import SparsePattern
from longgen.train.config import ExtendConfig
from longgen.train.extend import extend
from longgen.train.saving import WHOLE


@pytest.fixture(scope="module")
def base(make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("base") / "base", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def finished(base: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run of 4 steps with checkpoints at 2 and 4, not to be written to."""
    out = tmp_path_factory.mktemp("run") / "run"
    config = ExtendConfig(
        model=str(base),
        out=str(out),
        context=128,
        data=(str(text_file),),
        layers="SFS",
        pattern=SparsePattern(block_size=16, sink_blocks=1, local_blocks=2).to_dict(),
        steps=4,
        batch_tokens=128,
        allow_repeat=True,
        learning_rate=1e-2,
        save_steps=2,
    )
    extend(config, say=lambda line: None)
    return out


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_model(folder, dtype="auto").state_dict()


def assert_same(one: Path, other: Path) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, second[name]), name


def test_the_newest_checkpoint_of_a_finished_run_is_its_model(
    run: Callable[..., Any], finished: Path, tmp_path: Path
) -> None:
    result = run("export", finished, "--out", tmp_path / "model", "--json")
    assert result.code == 0 and "hybrid of step 4 written to" in result.err
    assert result.json == json.loads((tmp_path / "model" / RECORD).read_text())
    assert result.json["training"] == {"step": 4} and result.json["finished"] is False
    assert_same(tmp_path / "model", finished)
    config = load_model(tmp_path / "model").config
    assert config.layer_plan == load_model(finished).config.layer_plan and config.use_cache
    assert load_tokenizer(tmp_path / "model")("rain")["input_ids"]


def test_a_run_that_is_not_finished_gives_its_newest_whole_checkpoint(
    run: Callable[..., Any], finished: Path, base: Path, tmp_path: Path
) -> None:
    stopped = tmp_path / "stopped"
    shutil.copytree(finished / "training", stopped / "training")
    (stopped / "training" / "checkpoint-4" / WHOLE).unlink()
    assert "of step 2" in run("export", stopped, "--out", tmp_path / "a").err
    named = finished / "training" / "checkpoint-2"
    assert "of step 2" in run("export", named, "--out", tmp_path / "b").err
    assert_same(tmp_path / "a", tmp_path / "b")
    for other in (finished, base):
        first, second = weights(tmp_path / "a"), weights(other)
        assert any(not torch.equal(first[name], second[name]) for name in first)


def test_what_is_no_run_is_refused_and_leaves_nothing(
    refused: Callable[..., str], finished: Path, base: Path, tmp_path: Path
) -> None:
    out = ("--out", tmp_path / "model")
    assert "no whole checkpoint" in refused("export", base, *out)
    assert "no whole checkpoint" in refused("export", tmp_path / "nowhere", *out)
    alone = tmp_path / "checkpoint-2"
    assert "is not a whole checkpoint" in refused("export", alone, *out)
    shutil.copytree(finished / "training" / "checkpoint-2", alone)
    assert "no record of a run" in refused("export", alone, *out)
    shutil.copytree(finished / "training", tmp_path / "cut" / "training")
    shutil.rmtree(tmp_path / "cut" / "training" / "checkpoint-4" / "weights")
    assert "has no weights" in refused("export", tmp_path / "cut", *out)
    assert not (tmp_path / "model").exists()
    assert "not empty" in refused("export", finished, "--out", base)
