"""`longgen plan` and the program around it: figures, layout, bad input, exit codes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import longgen
from longgen.accounting import expected_speedups, kv_bytes, serving_memory
from longgen.cli import app, main
from longgen.cli import plan as plan_module
from longgen.cli.console import format_bytes, format_count, three_figures
from longgen.cli.options import parse_tokens
from longgen.errors import UsageError
from longgen.gpus import Gpu, GpuGroup
from longgen.pattern import SparsePattern
from longgen.plan import LayerPlan
from longgen.shapes import SHAPES
from longgen.training_memory import training_memory

ROOT = Path(longgen.__file__).parents[1]
PAPER = ["--pattern", "attention-sink", "--full-layers", "middle:12", "--gpus", "1xH100"]
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 100,
    "max_position_embeddings": 4096,
}
HYBRID = {
    "model_type": "longgen_llama",
    "layer_types": ["longgen_sparse", "full_attention", "longgen_sparse", "longgen_sparse"],
    "longgen": {"pattern": SparsePattern(block_size=32, local_blocks=3).to_dict()},
}


def checkpoint(folder: Path, **fields: Any) -> str:
    config = {"model_type": "llama", **SMALL, **fields}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def invoke(*arguments: str, width: int = 80) -> str:
    result = CliRunner().invoke(app, ["plan", *arguments], env={"COLUMNS": str(width)})
    assert result.exit_code == 0, result.output
    return result.stdout


def figures(*arguments: str) -> dict[str, Any]:
    return json.loads(invoke(*arguments, "--json"))


def test_json_has_the_accounting_of_the_papers_plan() -> None:
    shown = figures("llama-2-7b", "--context", "128K", *PAPER)
    shape, tokens = SHAPES["llama-2-7b"], 131072
    plan = LayerPlan.build(32, "middle:12", SparsePattern.attention_sink())
    assert shown["context"] == tokens
    assert shown["layers"] == "S" * 10 + "F" * 12 + "S" * 10
    assert shown["full_layers"] == list(range(10, 22))
    assert SparsePattern.from_dict(shown["pattern"]) == plan.pattern
    assert shown["kept_tokens"] == plan.pattern.cache_length(tokens, 32)
    assert shown["kv_bytes"]["full"] == 64 << 30
    assert shown["kv_bytes"]["hybrid"] == kv_bytes(shape, plan, tokens)
    assert round(shown["kv_bytes"]["saved"], 3) == 0.615
    speedups = expected_speedups(shape, plan, tokens)
    for work in ("prefill", "training", "decode"):
        assert shown["expected_speedup"][work] == getattr(speedups, work)
    for work, key in (("prefill", "prefill_flops_per_token"), ("decode", "decode_bytes")):
        ratio = shown[key]["full"] / shown[key]["hybrid"]
        assert ratio == pytest.approx(shown["expected_speedup"][work])
    memory = shown["memory_per_gpu"]
    assert memory["training"]["total"] == training_memory(shape, tokens).total
    assert memory["serving"]["total"] == serving_memory(shape, plan, tokens).total
    assert [memory[use]["fits"] for use in ("training", "serving", "serving_all_full")] == [
        False,
        True,
        False,
    ]


def test_text_says_the_same_figures() -> None:
    text = invoke("llama-2-7b", *PAPER)
    for part in (
        "SSSSSSSSSSFFFFFFFFFFFFSSSSSSSSSS",
        "20 sparse (S), 12 full (F): 10-21",
        "the first 64 tokens (sink)",
        "the most recent 1,985 to 2,048 tokens (window)",
        "2,048 of 131,072 tokens",
        "64.0 GiB     24.6 GiB      61.5% saved",
        "1.78x as fast*",
        "2.07x as fast*",
        "at equal kernel efficiency",
        "1 x H100-80GB (80.0 GiB each)",
    ):
        assert part in text
    assert text.index("does not fit") < text.index("fits\n") < text.rindex("does not fit")


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("model", sorted(SHAPES))
def test_lines_stay_within_80_columns_and_are_not_broken(model: str, width: int) -> None:
    for pattern in ("default", "attention-sink", "block-sparse", "none"):
        lines = invoke(
            model, "--context", "1M", "--pattern", pattern, "--gpus", "8xA100", width=width
        ).splitlines()
        assert max(len(line) for line in lines) <= 80
        letters = "".join(
            line[13:] for line in lines if line[13:] and not set(line[13:]) - {"F", "S"}
        )
        assert len(letters) == SHAPES[model].num_hidden_layers
        assert "\x1b" not in "".join(lines)


def test_a_long_model_path_is_printed_whole(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 120)
    folder.mkdir()
    assert invoke(checkpoint(folder), "--gpus", "H200").splitlines()[0] == str(folder)


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        ([], SparsePattern()),
        (["--pattern", "attention-sink"], SparsePattern.attention_sink()),
        (["--pattern", "block-sparse"], SparsePattern.block_sparse()),
        (
            ["--pattern", "attention-sink", "--block-size", "32", "--sink-blocks", "2"],
            SparsePattern.attention_sink(block_size=32, sink_blocks=2),
        ),
        (
            ["--local-blocks", "4", "--stride-blocks", "16", "--head-shift", "3"],
            SparsePattern(local_blocks=4, stride_blocks=16, head_shift=3),
        ),
        (
            ["--pattern", "block-sparse", "--stride-blocks", "0"],
            SparsePattern(block_size=64, sink_blocks=0, local_blocks=1),
        ),
    ],
)
def test_options_make_the_pattern(arguments: list[str], pattern: SparsePattern) -> None:
    shown = figures("llama-3-8b", "--gpus", "H200", *arguments)
    assert SparsePattern.from_dict(shown["pattern"]) == pattern


@pytest.mark.parametrize(
    "arguments", [["--pattern", "none"], ["--full-layers", "all"], ["--full-layers", "middle:30"]]
)
def test_no_sparse_layer_means_no_pattern_and_no_saving(arguments: list[str]) -> None:
    # Even where a pattern would cover the whole context.
    shown = figures("smollm2-135m", "--context", "1K", "--gpus", "H200", *arguments)
    assert shown["layers"] == "F" * 30
    assert shown["pattern"] is None and shown["kept_tokens"] is None
    assert shown["kv_bytes"]["saved"] == 0
    assert "every layer sees all" in invoke("smollm2-135m", "--gpus", "H200", "--pattern", "none")


def test_batch_and_gpus_count() -> None:
    one = figures("llama-3-8b", "--gpus", "1xH200")
    more = figures("llama-3-8b", "--gpus", "4xH200", "--batch", "8")
    assert more["kv_bytes"]["hybrid"] == 8 * one["kv_bytes"]["hybrid"]
    assert more["gpus"] == {"count": 4, "card": "H200", "memory_bytes": 141 << 30}
    parts = [shown["memory_per_gpu"]["serving"]["parts"] for shown in (one, more)]
    assert parts[1]["weights, bf16"] == parts[0]["weights, bf16"] // 4
    assert parts[1]["KV cache, bf16"] == 2 * parts[0]["KV cache, bf16"]


def test_without_gpus_the_machine_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longgen.cli.options.machine_gpus", lambda: None)
    assert figures("llama-3-8b")["gpus"]["card"] == "H100-80GB"
    own = GpuGroup(2, Gpu(name="Own Card", memory_bytes=99))
    monkeypatch.setattr("longgen.cli.options.machine_gpus", lambda: own)
    assert figures("llama-3-8b")["gpus"] == {"count": 2, "card": "Own Card", "memory_bytes": 99}


def test_a_hybrid_is_shown_as_it_is(tmp_path: Path) -> None:
    shown = figures(checkpoint(tmp_path, **HYBRID), "--context", "4K", "--gpus", "H200")
    assert shown["layers"] == "SFSS"
    assert shown["pattern_text"] == "1 sink + 3 local of 32-token blocks"


@pytest.mark.parametrize(
    ("fields", "arguments", "words"),
    [
        ({"model_type": "gpt2"}, [], ["'gpt2'", "llama, mistral, qwen2, qwen3"]),
        (HYBRID, ["--pattern", "default"], ["hybrid already", "SFSS", "--pattern"]),
        (HYBRID, ["--full-layers", "all"], ["hybrid already", "--full-layers"]),
        ({"model_type": "mistral", "sliding_window": 4096}, [], ["window of 4,096", "131,072"]),
        (
            {
                "model_type": "qwen2",
                "use_sliding_window": True,
                "sliding_window": 512,
                "max_window_layers": 2,
            },
            [],
            ["window of 512"],
        ),
        ({}, ["--full-layers", "middle:5"], ["5 full layers", "only 4"]),
        ({}, ["--full-layers", "2-7"], ["[4, 5, 6, 7]", "0 to 3"]),
        ({}, ["--context", "2K"], ["2,176 tokens", "2,048", "--context"]),
        ({}, ["--context", "1"], ["context of 1:"]),
        ({}, ["--stride-blocks", "1"], ["131,072 tokens", "nothing would be sparse"]),
        ({}, ["--sink-blocks", "1024"], ["nothing would be sparse"]),
        ({}, ["--pattern", "star"], ["'star'", "attention-sink", "none"]),
        ({}, ["--pattern", "none", "--block-size", "64"], ["--block-size has no meaning"]),
        ({}, ["--pattern", "none", "--full-layers", "top"], ["--full-layers has no meaning"]),
        ({}, ["--block-size", "0"], ["block_size is 0"]),
        ({}, ["--head-shift", "1"], ["head_shift is 1", "stride_blocks is 0"]),
        ({}, ["--gpus", "8xH300"], ["'8xH300'", "H100-80GB"]),
        ({}, ["--context", "many"], ["'many'", "128K"]),
    ],
)
def test_bad_input_gets_one_sentence_and_exit_code_2(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    fields: dict[str, Any],
    arguments: list[str],
    words: list[str],
) -> None:
    folder = checkpoint(tmp_path, **fields)
    assert main(["plan", folder, "--gpus", "H200", *arguments]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: ") and output.err.count("\n") == 1
    for word in words:
        assert word in output.err


def test_an_unknown_model_and_option_exit_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "no-such-model"]) == 2
    assert "llama-2-7b" in capsys.readouterr().err
    assert main(["plan", "llama-2-7b", "--colour"]) == 2
    assert "--colour" in capsys.readouterr().err
    assert main(["fly"]) == 2


def test_a_window_at_least_as_long_as_the_context_is_no_obstacle(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, model_type="mistral", sliding_window=8192)
    assert figures(folder, "--context", "8K", "--gpus", "H200")["context"] == 8192


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("131072", 131072), ("128K", 131072), ("1m", 1 << 20), ("131,072", 131072), (" 8k ", 8192)],
)
def test_tokens_are_read(text: str, tokens: int) -> None:
    assert parse_tokens(text) == tokens


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5K", "12G", "K", "1025M"])
def test_other_texts_are_no_tokens(text: str) -> None:
    with pytest.raises(UsageError, match="128K"):
        parse_tokens(text)


def test_figures_are_rounded_for_people() -> None:
    sizes = (0, 999, 1000, 1 << 20, 999 << 30, 1000 << 30)
    shown = ["0 bytes", "999 bytes", "0.98 KiB", "1.00 MiB", "999 GiB", "0.98 TiB"]
    assert [format_bytes(size) for size in sizes] == shown
    assert [three_figures(x) for x in (0.5, 9.996, 99.96, 1234.5)] == [
        "0.50",
        "10.0",
        "100",
        "1,234",
    ]
    assert [format_count(n) for n in (12, 134515008, 6738415616)] == ["12", "135M", "6.74B"]


def test_ctrl_c_exits_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(model: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(plan_module, "load_shape", interrupt)
    assert main(["plan", "llama-2-7b"]) == 130


def test_other_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(model: str) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(plan_module, "load_shape", fail)
    with pytest.raises(RuntimeError, match="a defect"):
        main(["plan", "llama-2-7b"])


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "80"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_program_runs_as_a_module() -> None:
    result = run("-m", "longgen", "plan", "llama-2-7b", "--json", *PAPER)
    assert (result.returncode, result.stderr) == (0, "")
    assert json.loads(result.stdout)["layers"].count("F") == 12


@pytest.mark.parametrize("arguments", [["--help"], ["plan", "llama-2-7b", *PAPER]])
def test_the_program_answers_without_heavy_imports(arguments: list[str]) -> None:
    program = (
        "import sys; sys.argv[0] = '/bin/longgen'; from longgen.cli import main; code = main(); "
        "heavy = {'torch', 'transformers'} & set(sys.modules); sys.exit(f'{code} {heavy}')"
    )
    assert run("-c", program, *arguments).stderr == "0 set()\n"


def test_help_explains_its_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"longgen {longgen.__version__}\n"
    assert main(["plan", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.replace("\u2502", " ").split())
    for words in ("sink: blocks at the start", "window: how many of the most recent", "stride:"):
        assert words in text
