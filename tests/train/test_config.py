"""Settings of a run: what is refused, what a resumed run may change, what recipes hold."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from longgen.errors import UsageError
from longgen.train.config import ExtendConfig, read_recipe
from longgen.train.folder import read_run

FIELDS: dict[str, Any] = {
    "model": "base",
    "out": "out",
    "context": 1000,
    "data": ["text"],
    "layers": "SFS",
    "pattern": {"block_size": 64},
}


def config(**changes: Any) -> ExtendConfig:
    return ExtendConfig(**{**FIELDS, **changes})


def test_a_step_has_by_default_as_many_whole_sequences_as_131072_tokens_hold() -> None:
    assert config().batch_tokens == 131000 and config().sequences_per_step == 131
    assert config(context=131072).sequences_per_step == 1
    assert config(context=500_000).batch_tokens == 500_000
    assert config(steps=7, batch_tokens=4000).num_sequences == 28


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"context": 1}, "context is 1; give at least 2"),
        ({"context": 0}, "context is 0"),
        ({"steps": 0}, "steps is 0"),
        ({"steps": "many"}, "steps is 'many'; give a whole number"),
        ({"steps": 2.5}, "steps is 2.5; give a whole number"),
        ({"steps": True}, "steps is True; give a whole number"),
        ({"save_steps": 0}, "save_steps is 0"),
        ({"seed": -1}, "seed is -1; give at least 0"),
        ({"heldout_tokens": 0}, "heldout_tokens is 0"),
        ({"recall_records": 0}, "recall_records is 0"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        (
            {"batch_tokens": 1500},
            r"batch_tokens is 1,500; give a multiple of the context \(1,000\)",
        ),
        ({"batch_tokens": 0}, "batch_tokens is 0"),
        ({"learning_rate": 0}, "learning_rate is 0; give a number above 0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"rope_theta": -1.0}, "rope_theta is -1.0"),
        ({"recall_share": 1.5}, "recall_share is 1.5; give a number from 0 to 1"),
        (
            {"recall_kinds": "facts,tales"},
            "recall_kinds is 'facts,tales'; give one or more of codes",
        ),
        ({"compile": "yes"}, "compile is 'yes'; give auto, on or off"),
        ({"sharding": "zero3"}, "sharding is 'zero3'; give auto, fsdp or ddp"),
        (
            {"gradient_checkpointing": "some"},
            "gradient_checkpointing is 'some'; give auto, off, elementwise, selective or full",
        ),
        ({"gradient_checkpointing": "off", "offload": True}, "gradient_checkpointing is off"),
        (
            {"gradient_checkpointing": "elementwise", "offload": True},
            "gradient_checkpointing is elementwise. Give selective or full, or leave offload out",
        ),
        (
            {"gradient_checkpointing": "elementwise", "fp8": True},
            "fp8 products give none to keep. Give selective, or leave fp8 out",
        ),
        ({"strict": "yes"}, "strict is 'yes'; give true or false"),
        ({"data": "text"}, "data is 'text'; give a list of paths"),
        ({"data": []}, "No data were given"),
        ({"model": 3}, "model is 3; give text"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        config(**changes)


def test_on_is_the_old_name_of_full_checkpointing() -> None:
    assert config(gradient_checkpointing="on") == config(gradient_checkpointing="full")


def test_whole_numbers_will_do_for_others() -> None:
    assert config(learning_rate=1, rope_theta=500000).rope_theta == 500000


def test_settings_survive_their_record() -> None:
    first = config(data=[Path("a"), "b"], rope_theta=1e6)
    assert first.data == ("a", "b")
    assert ExtendConfig(**first.to_dict()) == first
    assert first.differences(first.to_dict()) == []
    later = replace(first, out="elsewhere", save_steps=5, log_steps=1, force=True, compile="off")
    assert later.differences(first.to_dict()) == []
    assert replace(first, steps=3, layers="FFF").differences(first.to_dict()) == [
        "layers was 'SFS' and is now 'FFF'",
        "steps was 100 and is now 3",
    ]


def test_a_run_begun_before_there_was_a_setting_goes_on_as_it_was(tmp_path: Path) -> None:
    now = config(recall_kinds=" facts, codes", recall_share=0.5)
    assert now.recall_kinds == "codes,facts"
    earlier = config(recall_kinds="codes", recall_share=0.5).to_dict()
    del earlier["recall_kinds"], earlier["compile"]
    assert config(recall_kinds="codes", recall_share=0.5).differences(earlier) == []
    assert config(recall_share=0.5).differences(earlier) == [
        "recall_kinds was 'codes' and is now 'facts,copies'"
    ]
    # Of what is not planted, the kind does not matter.
    assert config().differences({**earlier, "recall_share": 0.0}) == []
    assert now.differences(earlier) == ["recall_kinds was 'codes' and is now 'codes,facts'"]
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "run.json").write_text(json.dumps(earlier))
    assert ExtendConfig(**(read_run(tmp_path) or {})).differences(earlier) == []


def recipe(folder: Path, text: str) -> Path:
    path = folder / "run.toml"
    path.write_text(text)
    return path


def test_kinds_of_recall_may_be_a_list_in_a_recipe(tmp_path: Path) -> None:
    assert read_recipe(recipe(tmp_path, 'recall_kinds = ["copies", "facts"]')) == {
        "recall_kinds": "facts,copies"
    }
    with pytest.raises(UsageError, match=r"In the recipe .*recall_kinds is 'copies,3'; give one"):
        read_recipe(recipe(tmp_path, 'recall_kinds = ["copies", 3]'))


def test_a_recipe_holds_any_option_spelled_either_way(tmp_path: Path) -> None:
    path = recipe(tmp_path, 'batch-tokens = 4096\nfull_layers = "middle"\ndata = ["a"]\nout = "b"')
    assert read_recipe(path) == {
        "batch_tokens": 4096,
        "full_layers": "middle",
        "data": ["a"],
        "out": "b",
    }


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("steps = ", "is not TOML"),
        ("steps = 3\ncolour = 1\nshape = 2", "has colour, shape, which are no option"),
        ('layers = "SFS"', "has layers, which is no option"),
    ],
)
def test_a_recipe_with_anything_else_is_refused(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        read_recipe(recipe(tmp_path, text))


def test_a_recipe_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        read_recipe(tmp_path / "none.toml")
    with pytest.raises(UsageError, match="cannot be read"):
        read_recipe(tmp_path)
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="is not TOML"):
        read_recipe(tmp_path / "binary.toml")


def test_a_run_is_known_from_another_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields: dict[str, Any] = {"out": "o", "context": 128, "layers": "F", "pattern": {}}
    monkeypatch.chdir(tmp_path)
    begun = ExtendConfig(model="base", data=("text", "packed/a@0.5"), **fields)
    run = begun.to_run()
    assert run["model"] == str(tmp_path / "base")
    assert run["data"] == [str(tmp_path / "text"), str(tmp_path / "packed" / "a@0.5")]
    assert begun.differences(run) == begun.differences(begun.to_dict()) == []
    monkeypatch.chdir(tmp_path.parent)
    assert ExtendConfig(**run).differences(run) == []
    assert "model was" in begun.differences(run)[0]
