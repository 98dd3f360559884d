"""Reading folders of models, refusing what is not whole, and writing all or nothing."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, MistralConfig, Qwen2Config

import longgen
from longgen.checkpoint import (
    check_output,
    check_weights,
    load_tokenizer,
    read_config,
    refuse_hybrid,
    staged_checkpoint,
    write_json,
)
from longgen.convert import convert
from longgen.errors import UsageError
from longgen.pattern import SparsePattern
from longgen.plan import LayerPlan


@pytest.fixture
def copy(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """Return a copy of the tiny checkpoint, to be spoiled."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))


def test_a_folder_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"config\.json is missing.*hf download"):
        read_config(tmp_path)
    with pytest.raises(UsageError, match="There is no checkpoint"):
        longgen.load_model(tmp_path / "none")


@pytest.mark.parametrize("text", ["{", "[1]", '{"model_type": "gpt2"}', "{}"])
def test_other_configs_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UsageError, match=r"not the JSON|llama, mistral, qwen2"):
        read_config(tmp_path)


def test_a_checkpoint_without_a_tokenizer_is_refused(copy: Path) -> None:
    for file in copy.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(UsageError, match=r"No tokenizer.*tokenizer\.json"):
        load_tokenizer(copy)


def test_weights_that_are_missing_or_cut_off_are_refused(copy: Path) -> None:
    file = copy / "model.safetensors"
    whole = file.read_bytes()
    check_weights(copy)
    for part in (whole[:-1], whole[:100], b""):
        file.write_bytes(part)
        with pytest.raises(UsageError, match=r"model\.safetensors is damaged or cut off"):
            longgen.load_model(copy)
    file.unlink()
    with pytest.raises(UsageError, match="no weights"):
        check_weights(copy)


def test_shards_are_checked_one_by_one(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "one.safetensors")
    index = copy / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors"}}))
    check_weights(copy)
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    with pytest.raises(UsageError, match=r"two\.safetensors is missing"):
        check_weights(copy)
    for text in ("{", '{"weight_map": 3}', "{}"):
        index.write_text(text)
        with pytest.raises(UsageError, match=r"index\.json is damaged"):
            check_weights(copy)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (MistralConfig(sliding_window=4096), "sparse model already.*4096|sliding_attention"),
        (
            Qwen2Config(use_sliding_window=True, sliding_window=512, max_window_layers=2),
            "sliding_attention",
        ),
    ],
)
def test_sparse_models_are_refused(config: object, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        refuse_hybrid(config, "model")


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(),
        MistralConfig(sliding_window=None),
        MistralConfig(sliding_window=8192, max_position_embeddings=8192),
        Qwen2Config(use_sliding_window=False, sliding_window=512),
    ],
)
def test_models_with_full_attention_are_not(config: object) -> None:
    refuse_hybrid(config, "model")


def test_a_model_is_loaded_for_inference(tiny_checkpoint: Path) -> None:
    model = longgen.load_model(tiny_checkpoint, device="cpu")
    assert not model.training and model.dtype == torch.float32
    assert longgen.load_model(tiny_checkpoint, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_a_hybrid_is_not_run_with_other_attention(tiny_checkpoint: Path, tmp_path: Path) -> None:
    pattern = SparsePattern(block_size=8, local_blocks=2)
    convert(tiny_checkpoint, tmp_path / "hybrid", LayerPlan.build(3, "middle", pattern))
    with pytest.raises(UsageError, match='"sdpa" would ignore the sparse pattern'):
        longgen.load_model(tmp_path / "hybrid", attn_implementation="sdpa")
    named = longgen.load_model(tmp_path / "hybrid", attn_implementation="longgen_reference")
    assert named.config._attn_implementation == "longgen_reference"


def test_an_output_is_a_new_or_empty_folder(tmp_path: Path) -> None:
    assert check_output(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert check_output(tmp_path) == tmp_path
    for name in "dcba":
        (tmp_path / name).write_text("mine")
    with pytest.raises(UsageError, match=r"not empty \(it holds a, b, c, \.\.\.\)"):
        check_output(tmp_path)
    with pytest.raises(UsageError, match="is a file"):
        check_output(tmp_path / "a")
    with pytest.raises(UsageError, match="is a file"):
        check_output(tmp_path / "a" / "b" / "c")


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_checkpoint_leaves_the_folder_as_it_was(
    tmp_path: Path, exists: bool, error: type[BaseException]
) -> None:
    folder = tmp_path / "out"
    if exists:
        folder.mkdir()
        (folder / "mine.txt").write_text("kept")
    with pytest.raises(error), staged_checkpoint(folder) as staging:
        (staging / "config.json").write_text("{}")
        raise error
    assert folder.exists() == exists
    if exists:
        assert [path.name for path in folder.iterdir()] == ["mine.txt"]


def test_config_json_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[str] = []
    replace = longgen.checkpoint.os.replace

    def record(source: Path, target: Path) -> None:
        moved.append(target.name)
        replace(source, target)

    monkeypatch.setattr("longgen.checkpoint.os.replace", record)
    with staged_checkpoint(tmp_path / "out") as staging:
        for name in ("a.json", "config.json", "model.safetensors", "z.json"):
            (staging / name).write_text(name)
        assert not list(tmp_path.glob("out/*.json"))
    assert sorted(moved[:-1]) == ["a.json", "model.safetensors", "z.json"]
    assert moved[-1] == "config.json"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(moved)


def test_a_leftover_of_an_interrupted_write_is_not_taken_over(tmp_path: Path) -> None:
    (tmp_path / ".partial").mkdir()
    (tmp_path / ".partial" / "old.bin").write_text("old")
    with staged_checkpoint(tmp_path) as staging:
        (staging / "config.json").write_text("{}")
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_json_is_replaced_whole(tmp_path: Path) -> None:
    file = tmp_path / "new" / "record.json"
    write_json(file, {"a": 1})
    with pytest.raises(TypeError):
        write_json(file, {"a": object()})
    assert json.loads(file.read_text()) == {"a": 1}
    assert [path.name for path in file.parent.iterdir()] == ["record.json"]


def test_folders_are_checked_before_anything_heavy_is_imported() -> None:
    # Imported as by the program `longgen`.
    program = (
        "import sys; sys.argv[0] = '/bin/longgen'; import longgen.checkpoint; "
        "print({'torch', 'transformers'} & set(sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(longgen.__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (result.stdout, result.stderr) == ("set()\n", "")
