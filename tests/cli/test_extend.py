"""`longgen extend`: options, recipes, resuming, and everything that bad input gets."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import longgen
from demo.settings import settings as demo_settings
from longgen.checkpoint import RECORD
from longgen.cli.extend import resolve
from longgen.errors import UsageError
from longgen.gpus import Gpu, GpuGroup
from longgen.pattern import SparsePattern
from longgen.shapes import SHAPES
from longgen.train import export as export_module
from longgen.train import extend as extend_module
from longgen.train.config import ExtendConfig, read_recipe

ROOT = Path(longgen.__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.toml"))
PLAN = ("--block-size", 16, "--local-blocks", 2)
TINY = ("--context", 128, "--batch-tokens", 256, "--learning-rate", 1e-2, "--log-steps", 1, *PLAN)


@pytest.fixture
def arguments(tiny_checkpoint: Path, text_file: Path, tmp_path: Path) -> tuple[object, ...]:
    """Return a whole command of 2 steps."""
    out = ("--out", tmp_path / "run", "--data", text_file)
    return ("extend", tiny_checkpoint, *out, "--steps", 2, *TINY)


def test_json_goes_to_stdout_and_progress_to_stderr(
    run: Callable[..., Any], arguments: tuple[object, ...], tmp_path: Path
) -> None:
    result = run(*arguments, "--json")
    assert result.code == 0
    assert result.json == json.loads((tmp_path / "run" / RECORD).read_text())
    assert result.json["config"]["layers"] == "SFS"
    lines = result.err.splitlines()
    assert [line[:8] for line in lines if line.startswith("step ")] == ["step 1/2", "step 2/2"]
    assert lines[-1] == f"measure it with: longgen evaluate {tmp_path / 'run'}"
    # No progress bars, warnings or colours of any library.
    words = ("step", "1 documents", "layers SFS", "hybrid written", "measure")
    for line in lines:
        assert line.startswith(words) or "tokens to train on" in line, line


def test_every_setting_has_an_option_that_reaches_it(
    run: Callable[..., Any], tiny_checkpoint: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values: dict[str, Any] = {
        "context": 128,
        "rope_theta": 12345.0,
        "steps": 7,
        "batch_tokens": 512,
        "learning_rate": 0.5,
        "min_lr_ratio": 0.25,
        "warmup_steps": 3,
        "weight_decay": 0.0,
        "max_grad_norm": 2.0,
        "seed": 11,
        "recall_share": 0.125,
        "recall_records": 2,
        "recall_kinds": "copies",
        "join_folders": True,
        "text_field": "body",
        "strict": True,
        "heldout_tokens": 1024,
        "allow_repeat": True,
        "gradient_checkpointing": "selective",
        "offload": True,
        "compile": "on",
        "fp8": True,
        "context_parallel": 3,
        "sharding": "ddp",
        "save_steps": 5,
        "log_steps": 6,
        "force": True,
    }
    default = ExtendConfig(model="", out="", context=2, data=("",), layers="S", pattern={})
    got: list[ExtendConfig] = []

    def record(config: ExtendConfig, **kwargs: Any) -> dict[str, Any]:
        got.append(config)
        return {"finished": True}

    monkeypatch.setattr(extend_module, "extend", record)
    command: list[object] = ["extend", tiny_checkpoint, "--out", "o", *PLAN]
    for name, value in values.items():
        assert getattr(default, name) != value
        flag = "--" + name.replace("_", "-")
        command += [flag] if value is True else [flag, value]
    assert run(*command, "--data", text_file, "b*", "--data", "c").code == 0
    fields = got[0].to_dict()
    assert {name: fields.pop(name) for name in values} == values
    assert fields == {
        "model": str(tiny_checkpoint),
        "out": "o",
        "data": [str(text_file), "b*", "c"],
        "layers": "SFS",
        "pattern": SparsePattern(block_size=16, local_blocks=2).to_dict(),
    }
    run("extend", tiny_checkpoint, "--out", "o", *PLAN, "--context", "1K", "--data", "c")
    assert got[1].to_dict() | {"model": "", "out": "", "data": [""]} == {
        **default.to_dict(),
        "context": 1024,
        "batch_tokens": 131072,
        "layers": "SFS",
        "pattern": fields["pattern"],
    }


def test_the_command_line_overrides_the_recipe(tiny_checkpoint: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        f'model = "{tiny_checkpoint}"\ncontext = "1K"\ndata = "a"\nout = "o"\nsteps = 3\n'
        'seed = 4\nfull-layers = "top:1"\nblock_size = 16\nlocal_blocks = 2'
    )
    config = resolve(read_recipe(recipe))
    assert (config.context, config.data, config.steps, config.layers) == (1024, ("a",), 3, "SSF")
    config = resolve({**read_recipe(recipe), "steps": 5, "full_layers": "all", "data": ["b"]})
    assert (config.steps, config.seed, config.layers, config.data) == (5, 4, "FFF", ("b",))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_make_valid_runs(path: Path, tmp_path: Path) -> None:
    recipe = read_recipe(path)
    shape = SHAPES["llama-2-7b" if "llama2_7b" in path.stem else "smollm2-135m"]
    names = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
    names += ("num_attention_heads", "num_key_value_heads", "max_position_embeddings")
    fields = {name: getattr(shape, name) for name in names}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    config = resolve({**recipe, "model": str(tmp_path), "data": ["x"], "out": "o"})
    context, name = config.context // 1024, f"{path.stem}_"
    assert f"_{context}k_" in name or f"_{context // 1024}m_" in name
    assert config.num_sequences * config.context == config.steps * recipe["batch_tokens"]


def test_there_are_recipes() -> None:
    assert len(RECIPES) >= 2


def test_the_demos_recipe_is_what_the_demo_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    demo = demo_settings().extension(Path("out/demo/original"), Path("o"))
    recipe = read_recipe(ROOT / "recipes" / "smollm2_135m_32k_demo.toml")
    assert recipe.pop("full_layers") == "middle" and demo.layers == "S" * 10 + "F" * 10 + "S" * 10
    assert recipe.pop("pattern") == "default" and demo.pattern == SparsePattern().to_dict()
    fields = {**demo.to_dict(), "log_steps": 10}
    default = ExtendConfig(
        model=fields["model"],
        out="o",
        context=demo.context,
        data=demo.data,
        layers=demo.layers,
        pattern=demo.pattern,
    )
    assert {**default.to_dict(), **recipe} == fields


def test_a_run_is_resumed_from_its_folder_alone(
    run: Callable[..., Any],
    refused: Callable[..., str],
    arguments: tuple[object, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def crash(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(export_module, "save_hybrid", crash)
        stopped = run(*arguments)
    out = tmp_path / "run"
    assert (stopped.code, stopped.out) == (130, "")
    assert f"longgen extend --out {out} --resume" in stopped.err
    assert "unfinished run; add --resume" in refused(*arguments)
    assert "seed was 0 and is now 3" in refused("extend", "--out", out, "--resume", "--seed", 3)
    changed = ("--resume", *PLAN, "--full-layers", "all")
    assert "layers was 'SFS' and is now 'FFF'" in refused("extend", "--out", out, *changed)
    resumed = run("extend", "--out", out, "--resume")
    assert resumed.code == 0 and "resuming from checkpoint-2" in resumed.err
    assert "is finished" in refused("extend", "--out", out, "--resume")
    assert "is finished" in refused(*arguments)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["--context", 64], "The context of 64 tokens is not above the 64 that"),
        (["--context", "none"], "'none'"),
        (["--full-layers", "middle:4"], "4 full layers; the model has only 3"),
        (["--local-blocks", 8], "keeps up to 144 tokens, which is all of the context of 128"),
        (["--pattern", "star"], "'star'"),
        (["--batch-tokens", 200], "batch_tokens is 200; give a multiple of the context (128)"),
        (["--learning-rate", -1], "learning_rate is -1.0"),
        (["--recall-share", 2], "recall_share is 2.0"),
        (["--compile", "perhaps"], "compile is 'perhaps'"),
        (["--rope-theta", 0], "rope_theta is 0"),
        (["--data", "nowhere"], "'nowhere' does not exist"),
        (["--data", "*.none"], "'*.none' matches nothing"),
        (["--recipe", "none.toml"], "none.toml cannot be read"),
        (["--resume"], "no run to resume"),
    ],
)
def test_what_makes_no_sense_is_refused_and_leaves_nothing(
    refused: Callable[..., str],
    arguments: tuple[object, ...],
    tmp_path: Path,
    changes: list[object],
    words: str,
) -> None:
    assert words in refused(*arguments, *changes)
    assert not (tmp_path / "run").exists()


def test_what_is_missing_is_asked_for(
    refused: Callable[..., str], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    base, out = tiny_checkpoint, tmp_path / "run"
    assert "with --out" in refused("extend", base, "--context", 128, "--data", "a")
    assert "give MODEL" in refused("extend", "--out", out, "--context", 128, "--data", "a", base)
    assert "give --context" in refused("extend", base, "--out", out, "--data", "a")
    assert "give --data" in refused("extend", base, "--out", out, "--context", 128)
    assert "no run to resume" in refused("extend", "--out", out, "--resume")
    recipe = tmp_path / "r.toml"
    recipe.write_text("full_layers = 3")
    assert "full_layers is 3; give text" in refused("extend", "--recipe", recipe, "--out", out)
    assert not out.exists()


def test_other_models_are_refused(
    refused: Callable[..., str],
    make_checkpoint: Callable[..., Path],
    arguments: tuple[object, ...],
    tiny_hybrid: Path,
    tmp_path: Path,
) -> None:
    def with_model(model: Path | str) -> str:
        line = refused("extend", model, *arguments[2:])
        assert not (tmp_path / "run").exists()
        return line

    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "gpt2"}')
    assert "'gpt2'" in with_model(other)
    assert "hybrid already (layers SFS)" in with_model(tiny_hybrid)
    window = make_checkpoint(tmp_path / "window", "mistral", sliding_window=16)
    assert "sliding window of 16" in with_model(window)
    small = make_checkpoint(tmp_path / "small", vocab_size=261)
    assert "ids up to 261, but the model's embedding has only 261 rows" in with_model(small)
    assert "names a shape" in with_model("llama-2-7b")
    assert "no checkpoint" in with_model(tmp_path)
    cut = make_checkpoint(tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:-10])
    assert "damaged or cut off" in with_model(cut)
    stretched = make_checkpoint(
        tmp_path / "stretched",
        rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
    )
    assert "of type 'linear'" in with_model(stretched)


def test_bad_data_are_skipped_and_counted_or_refused(
    run: Callable[..., Any],
    refused: Callable[..., str],
    arguments: tuple[object, ...],
    text_file: Path,
    tmp_path: Path,
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    shutil.copy(text_file, folder / "good.txt")
    (folder / "empty.txt").write_text("  \n")
    (folder / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    (folder / "binary.txt").write_bytes(b"\x00\x01\x02")
    strict = refused(*arguments, "--data", folder, "--strict")
    assert "binary.txt" in strict and "strict" in strict
    bad = [folder / name for name in ("empty.txt", "latin.txt", "binary.txt")]
    nothing = refused("extend", arguments[1], *TINY, "--out", tmp_path / "run", "--data", *bad)
    assert "no documents" in nothing
    for words in ("1 empty", "1 not UTF-8", "1 binary"):
        assert words in nothing
    assert not (tmp_path / "run").exists()
    counted = run(*arguments, "--data", folder)
    assert counted.code == 0
    for words in ("1 empty", "1 not UTF-8", "1 binary"):
        assert words in counted.err
    record = json.loads((tmp_path / "run" / RECORD).read_text())
    assert record["data"]["skipped"] == {"binary": 1, "empty": 1, "not UTF-8": 1}


def test_an_output_with_other_content_is_left_alone(
    refused: Callable[..., str], arguments: tuple[object, ...], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    assert "not empty (it holds thesis.txt)" in refused(*arguments)
    assert "thesis.txt" in refused(*arguments, "--force")
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]
    assert "is a file" in refused(*arguments, "--out", out / "thesis.txt")


def test_too_little_memory_is_refused_with_numbers(
    run: Callable[..., Any],
    refused: Callable[..., str],
    arguments: tuple[object, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpus = GpuGroup(1, Gpu(name="Tiny Card", memory_bytes=1 << 20))
    monkeypatch.setattr(extend_module, "machine_gpus", lambda: gpus)
    line = refused(*arguments)
    assert "128 tokens needs about 1.0 GiB" in line and "0.0 GiB" in line and "--force" in line
    assert not (tmp_path / "run").exists()
    assert "too little data" in run(*arguments, "--force", "--steps", 1000).err


def test_too_little_data_are_refused_with_numbers(
    run: Callable[..., Any], arguments: tuple[object, ...], tmp_path: Path
) -> None:
    result = run(*arguments, "--steps", 1000)
    assert (result.code, result.out) == (2, "")
    assert "too little data: the run asks for 2,000 sequences of 128 tokens" in result.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "command",
    [
        ["extend", "BASE", "--context", "64", "--data", "x", "--out", "o"],
        ["extend", "BASE", "--context", "1K", "--data", "x", "--out", "BASE", *PLAN],
        ["convert", "BASE", "--out", "o"],
        ["evaluate", "BASE"],
        ["generate", "BASE", "--prompt", ""],
    ],
    ids=lambda command: command[0],
)
def test_cheap_refusals_do_not_wait_for_heavy_imports(
    command: list[object], tiny_checkpoint: Path
) -> None:
    words = [str(tiny_checkpoint if word == "BASE" else word) for word in command]
    program = (
        "import sys; sys.argv[0] = '/bin/longgen'; from longgen.cli import main; code = main(); "
        "heavy = {'torch', 'transformers'} & set(sys.modules); sys.exit(f'{code} {heavy}')"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, *words],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "80"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.stderr.endswith("\n2 set()\n") and result.stderr.startswith("error: ")


def test_help_explains_its_words(run: Callable[..., Any]) -> None:
    text = " ".join(run("extend", "--help").out.replace("\u2502", " ").split())
    for words in ("Takes several paths in a row", "[default: 5e-05]", "Ctrl-C saves and stops"):
        assert words in text


def test_the_record_of_another_version_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "training"
    folder.mkdir(parents=True)
    earlier = {"model": "m", "out": "o", "context": 4, "data": ["a"], "layers": "S", "pattern": {}}
    (folder / "run.json").write_text(json.dumps({**earlier, "colour": "red"}))
    with pytest.raises(UsageError, match=r"another version of longgen.*colour"):
        resolve({"out": str(tmp_path / "run")}, resume=True)
    for text in ("{", "[1]"):
        (folder / "run.json").write_text(text)
        with pytest.raises(UsageError, match=r"damaged|does not hold"):
            resolve({"out": str(tmp_path / "run")}, resume=True)
