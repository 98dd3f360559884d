"""`longgen generate`: what it writes, measures and refuses."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from longgen.accounting import full_plan, kv_bytes
from longgen.checkpoint import load_model, load_tokenizer
from longgen.shapes import load_shape

PROMPT = "The rain on the mill and the river in the rain. " * 6


def expected(folder: Path, prompt: str, number: int) -> str:
    """Continue greedily without a cache."""
    model, tokenizer = load_model(folder, device="cpu"), load_tokenizer(folder)
    ids = tokenizer(prompt)["input_ids"]
    size = len(ids)
    for _ in range(number):
        with torch.inference_mode():
            logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
        ids.append(int(logits.argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[size:], skip_special_tokens=True)


@pytest.fixture(params=["hybrid", "plain"])
def folder(request: pytest.FixtureRequest, tiny_hybrid: Path, make_checkpoint: Any) -> Path:
    """Return a hybrid and a plain checkpoint of 1,024 tokens."""
    if request.param == "hybrid":
        return tiny_hybrid
    tmp_path_factory = request.getfixturevalue("tmp_path_factory")
    place = tmp_path_factory.mktemp("plain") / "plain"
    return make_checkpoint(place, max_position_embeddings=1024)


@pytest.mark.parametrize("chunk", ["8K", 37])
def test_it_continues_and_counts(run: Callable[..., Any], folder: Path, chunk: object) -> None:
    common = ("generate", folder, "--prompt", PROMPT, "--max-new-tokens", 9, "--device", "cpu")
    figures = run(*common, "--prefill-chunk", chunk, "--json").json
    assert figures["text"] == expected(folder, PROMPT, 9)
    size = len(load_tokenizer(folder)(PROMPT)["input_ids"])
    assert figures["prompt_tokens"] == size
    assert figures["new_tokens"] <= 9
    # The last token written was not read any more.
    cached = size + figures["new_tokens"] - 1
    assert figures["cached_tokens"] == cached
    shape = load_shape(folder)
    full = kv_bytes(shape, full_plan(shape), cached, bytes_per_element=4)
    assert figures["kv_bytes_full"] == full
    if shape.plan is None:
        assert figures["runtime"] == "transformers"
        assert figures["kv_bytes"] == full
    else:
        assert figures["runtime"] == "longgen.engine"
        held = kv_bytes(shape, shape.plan, cached, bytes_per_element=4)
        # At most a page more than the tokens take, in the one full layer.
        page = 128 * 2 * shape.num_key_value_heads * shape.head_dim * 4
        assert held <= figures["kv_bytes"] < held + page
        assert figures["kv_bytes"] < full
    assert figures["prefill_seconds"] > 0


def test_text_goes_to_stdout_and_figures_to_stderr(
    run: Callable[..., Any], tiny_hybrid: Path
) -> None:
    result = run("generate", tiny_hybrid, "--prompt", PROMPT, "--max-new-tokens", 40)
    assert result.code == 0
    assert result.out == expected(tiny_hybrid, PROMPT, 40) + "\n"
    assert "of 303 tokens read" not in result.err  # it took no time worth a line
    for words in ("tokens read in", "written", "tok/s", "keys and values held", "full attention"):
        assert words in result.err


def test_a_prompt_file_and_stdin_do_as_well(
    run: Callable[..., Any], tiny_hybrid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT + "\u00e9\n", encoding="utf-8")
    arguments = ("generate", tiny_hybrid, "--max-new-tokens", 5, "--json", "--prompt-file")
    from_file = run(*arguments, file).json
    stdin = io.TextIOWrapper(io.BytesIO(file.read_bytes()))
    monkeypatch.setattr("sys.stdin", stdin)
    assert run(*arguments, "-").json["text"] == from_file["text"]
    assert from_file["text"] == expected(tiny_hybrid, PROMPT + "\u00e9\n", 5)


def test_a_long_reading_says_how_far_it_is(
    run: Callable[..., Any], tiny_hybrid: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("longgen.cli.generate._SECONDS_BETWEEN_LINES", 0)
    arguments = ("--prompt", "x" * 300, "--max-new-tokens", 2, "--prefill-chunk", 128)
    result = run("generate", tiny_hybrid, *arguments)
    assert [line for line in result.err.splitlines() if line.endswith("of 300 tokens read")] == [
        "128 of 300 tokens read",
        "256 of 300 tokens read",
    ]


def test_a_stop_string_ends_the_text(run: Callable[..., Any], folder: Path) -> None:
    arguments = ("generate", folder, "--prompt", PROMPT, "--max-new-tokens", 30)
    whole = expected(folder, PROMPT, 30)
    stop = whole[4:6]
    stopped = run(*arguments, "--stop", "never written", "--stop", stop)
    assert stopped.out == whole[: whole.index(stop)] + "\n"
    figures = run(*arguments, "--stop", stop, "--json").json
    assert figures["text"] == whole[: whole.index(stop)] and figures["finish_reason"] == "stop"
    assert figures["new_tokens"] < 30


def test_keys_and_values_in_fp8_take_a_quarter_of_fp32(
    run: Callable[..., Any], tiny_hybrid: Path
) -> None:
    arguments = ("generate", tiny_hybrid, "--prompt", PROMPT, "--max-new-tokens", 1, "--json")
    plain, small = run(*arguments).json, run(*arguments, "--kv-dtype", "fp8").json
    assert 4 * small["kv_bytes"] == plain["kv_bytes"]
    assert small["kv_bytes_full"] == plain["kv_bytes_full"]


def test_a_repeated_token_is_penalised(run: Callable[..., Any], folder: Path) -> None:
    arguments = ("generate", folder, "--prompt", PROMPT, "--max-new-tokens", 20, "--json")
    seen = set(PROMPT)
    text = run(*arguments, "--repetition-penalty", 1000).json["text"]
    assert text != expected(folder, PROMPT, 20)
    assert not seen & set(text.replace("\ufffd", ""))


def test_sampling_follows_the_seed_and_not_the_models_own_settings(
    run: Callable[..., Any], folder: Path, tmp_path: Path
) -> None:
    original, folder = folder, Path(shutil.copytree(folder, tmp_path / "copy"))
    own = json.loads((folder / "generation_config.json").read_text())
    own |= {"do_sample": True, "temperature": 5.0, "top_k": 2}
    (folder / "generation_config.json").write_text(json.dumps(own))
    arguments = ("generate", folder, "--prompt", PROMPT, "--max-new-tokens", 12, "--json")
    greedy = expected(original, PROMPT, 12)
    assert run(*arguments).json["text"] == greedy

    def drawn(*more: object) -> str:
        return run(*arguments, "--temperature", 3, *more).json["text"]

    texts = {seed: drawn("--seed", seed) for seed in (0, 1, 2)}
    assert drawn("--seed", 1) == texts[1]
    assert len(set(texts.values())) > 1
    assert drawn("--top-k", 1) == greedy
    assert drawn("--top-p", 0.0001) == greedy
    assert drawn("--min-p", 1) == greedy


def test_chat_puts_the_prompt_into_the_tokenizers_format(
    run: Callable[..., Any], refused: Callable[..., str], tiny_hybrid: Path, tmp_path: Path
) -> None:
    arguments = ("--prompt", "rain", "--max-new-tokens", 4, "--json", "--chat")
    assert "has no chat format" in refused("generate", tiny_hybrid, *arguments)
    folder = Path(shutil.copytree(tiny_hybrid, tmp_path / "chat"))
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    template += "{% if add_generation_prompt %}<assistant>{% endif %}"
    (folder / "chat_template.jinja").write_text(template)
    shown = run("generate", folder, *arguments).json
    assert shown["text"] == expected(folder, "<user>rain<assistant>", 4)


def test_a_prompt_of_the_whole_context_is_refused_and_a_shorter_one_gets_what_is_left(
    run: Callable[..., Any], refused: Callable[..., str], tiny_hybrid: Path
) -> None:
    words = refused("generate", tiny_hybrid, "--prompt", "x" * 1024)
    assert "1,024 tokens" in words and "context of 1,024" in words
    result = run("generate", tiny_hybrid, "--prompt", "x" * 1021, "--max-new-tokens", 9, "--json")
    assert result.json["new_tokens"] <= 3
    assert "leaves room for 3" in result.err


def test_bad_input_is_refused_in_one_sentence(
    refused: Callable[..., str], tiny_hybrid: Path, tmp_path: Path
) -> None:
    (tmp_path / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    (tmp_path / "empty.txt").write_text(" \n")
    for arguments, words in (
        ([], "either --prompt TEXT or --prompt-file FILE"),
        (["--prompt", "a", "--prompt-file", "b"], "either --prompt TEXT or --prompt-file FILE"),
        (["--prompt", ""], "The prompt is empty"),
        (["--prompt", "a\udcff"], "no text that UTF-8 can write"),
        (["--prompt-file", tmp_path / "empty.txt"], "empty.txt is empty"),
        (["--prompt-file", tmp_path / "none.txt"], "No such file"),
        (["--prompt-file", tmp_path], "cannot be read"),
        (["--prompt-file", tmp_path / "latin.txt"], "not UTF-8 text (byte 3 is 0xe9)"),
        (["--prompt", "a", "--top-k", 3], "--top-k changes nothing at --temperature 0"),
        (["--prompt", "a", "--min-p", 0.1], "--min-p changes nothing at --temperature 0"),
        (["--prompt", "a", "--temperature", 1, "--top-p", 0], "top_p is 0.0; give a number above"),
        (["--prompt", "a", "--repetition-penalty", 0], "repetition_penalty is 0.0; give a finite"),
        (["--prompt", "a", "--stop", ""], "texts of at least one character"),
        (["--prompt", "a", "--kv-dtype", "int2"], "'int2' is not known; give fp8"),
        (["--prompt", "a", "--prefill-chunk", "x"], "'x'"),
        (["--prompt", "a", "--dtype", "int3"], "'int3' is not known; give bf16"),
        (["--prompt", "a", "--device", "abacus"], "'abacus' is not known"),
        (["--prompt", "a", "--device", "cuda:77"], "torch sees"),
    ):
        assert words in refused("generate", tiny_hybrid, *arguments)
    assert "no checkpoint" in refused("generate", tmp_path, "--prompt", "a")


def test_fp8_is_refused_for_a_plain_model(
    refused: Callable[..., str], tiny_checkpoint: Path
) -> None:
    words = refused("generate", tiny_checkpoint, "--prompt", "a", "--kv-dtype", "fp8")
    assert "--kv-dtype fp8 is for hybrids" in words


def test_a_hybrid_whose_config_asks_for_other_attention_is_refused(
    refused: Callable[..., str], tiny_hybrid: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_hybrid, tmp_path / "sdpa"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "attn_implementation": "sdpa"}))
    assert '"sdpa" would ignore the sparse pattern' in refused("generate", folder, "--prompt", "a")


def test_damaged_weights_are_refused(
    refused: Callable[..., str], tiny_hybrid: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_hybrid, tmp_path / "cut"))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    assert "damaged or cut off" in refused("generate", folder, "--prompt", "a")
