"""Runs on packed data: a resumed one sees the same sequences, and notices other data."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from longgen.data.pack import PackSource, pack_sources
from longgen.data.packed import PackOptions
from longgen.data.tokenize import TokenizeSettings, tokenize
from longgen.errors import UsageError
from longgen.train import extend as extend_module
from longgen.train.config import ExtendConfig
from longgen.train.data import DATA
from longgen.train.extend import HELDOUT, extend, training_folder
from longgen.train.trainer import LongGenTrainer


def quiet(line: str) -> None:
    """Print nothing."""


@pytest.fixture
def packed(tiny_checkpoint: Path, text: Path, tmp_path: Path) -> Callable[..., Path]:
    """Return a packer of the text as two sources: (name, **options)."""
    for name, files in (("few", "0*.txt"), ("many", "[12]*.txt")):
        settings = TokenizeSettings(model=str(tiny_checkpoint), data=(str(text / files),))
        tokenize(settings, tmp_path / name, say=quiet)

    def make(name: str = "packed", **options: Any) -> Path:
        chosen = PackOptions(**{"context": 128, **options})
        sources = [
            PackSource(name=one, tokens=str(tmp_path / one), options=chosen, weight=weight)
            for one, weight in (("few", 0.25), ("many", 0.75))
        ]
        pack_sources(sources, tmp_path / name, plot=False, say=quiet)
        return tmp_path / name

    return make


def interrupted(config: ExtendConfig, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run until the checkpoint of a step, which a power cut takes."""
    save = LongGenTrainer._save_optimizer_and_scheduler

    def crash(this: Any, folder: Any) -> None:
        if this.state.global_step == step:
            raise RuntimeError("power cut")
        save(this, folder)

    with monkeypatch.context() as patch:
        patch.setattr(LongGenTrainer, "_save_optimizer_and_scheduler", crash)
        with pytest.raises(RuntimeError, match="power cut"):
            extend(config, say=quiet)


def losses(config: ExtendConfig) -> list[float]:
    lines = (training_folder(config.out) / "log.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def test_a_resumed_run_equals_the_whole_one(
    settings: Callable[..., ExtendConfig],
    packed: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = (str(packed()),)
    changes = {"data": data, "recall_share": 0.5, "recall_records": 1}
    whole, cut = settings("whole", **changes), settings("cut", **changes)
    record = extend(whole, say=quiet)
    assert [one["sequences"] for one in record["packing"]["sets"]] == [6, 18]
    interrupted(cut, 4, monkeypatch)
    seen: list[int] = []
    item = extend_module.Mixture.item
    monkeypatch.setattr(extend_module.Mixture, "item", lambda m, i: (seen.append(i), item(m, i))[1])
    lines: list[str] = []
    extend(cut, resume=True, say=lines.append)
    assert seen == list(range(8, 24)) and "resuming from checkpoint-2" in lines
    assert losses(cut) == losses(whole)
    models = [AutoModelForCausalLM.from_pretrained(c.out).state_dict() for c in (whole, cut)]
    assert all(torch.equal(tensor, models[1][name]) for name, tensor in models[0].items())


def test_held_out_text_is_that_of_the_sets(
    settings: Callable[..., ExtendConfig], packed: Callable[..., Path]
) -> None:
    folder = packed(heldout_tokens=300)
    config = settings(data=(str(folder),), steps=1, heldout_tokens=200)
    extend(config, say=quiet)
    held = np.load(training_folder(config.out) / HELDOUT)
    assert len(held) == 200
    bare = settings("bare", data=(str(packed("none", heldout_tokens=0)),), steps=1)
    with pytest.raises(UsageError, match="no held-out text"):
        extend(bare, say=quiet)
    assert not Path(bare.out).exists()


def test_other_data_at_resuming_are_refused(
    settings: Callable[..., ExtendConfig],
    packed: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = packed()
    config = settings(data=(str(folder),))
    interrupted(config, 4, monkeypatch)
    assert json.loads((training_folder(config.out) / DATA).read_text())["sets"]
    moved, other = folder.with_name("moved"), packed("other", seed=3)
    folder.rename(moved)
    other.rename(folder)
    with pytest.raises(UsageError, match=r"packed data have changed .*few"):
        extend(config, resume=True, say=quiet)
    folder.rename(other)
    moved.rename(folder)
    assert extend(config, resume=True, say=quiet)["finished"]


def test_sets_that_run_out_are_repeated_if_allowed(
    settings: Callable[..., ExtendConfig], packed: Callable[..., Path]
) -> None:
    config = settings(data=(str(packed()),), steps=40)
    with pytest.raises(UsageError, match=r"few holds \d+ and 40 are to be taken"):
        extend(config, say=quiet)
    assert not Path(config.out).exists()
    again = settings(data=config.data, steps=40, allow_repeat=True)
    lines: list[str] = []
    extend(again, say=lines.append)
    assert any(line.startswith("  few: 25.0%") and "times over" in line for line in lines)
