"""`longgen tokenize`, `longgen pack`, and training on what they wrote."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from longgen.cli.sources import read_data_recipe
from longgen.data import tokenize as job
from longgen.data.packed import PackOptions
from longgen.train.config import read_recipe

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes" / "data").glob("*.toml"))
TINY = ("--context", 128, "--batch-tokens", 256, "--learning-rate", 1e-2, "--log-steps", 1)
PLAN = ("--block-size", 16, "--local-blocks", 2)

Run = Callable[..., Any]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Return a folder of two sources: long text files, and short lines of JSON."""
    folder = tmp_path / "texts"
    (folder / "long").mkdir(parents=True)
    for i in range(6):
        text = "".join(f"{j}: the river of {i} runs past {i * j} mills.\n" for j in range(30))
        (folder / "long" / f"{i}.txt").write_text(text)
    lines = [json.dumps({"body": f"Line {i}: rain " * (i % 5 + 1)}) for i in range(120)]
    (folder / "short.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def recipe(texts: Path, tmp_path: Path) -> Path:
    path = tmp_path / "data.toml"
    path.write_text(
        f"""context = 128
        [sources.long]
        data = "{texts}/long"
        min-length = 128
        weight = 0.6
        [sources.short]
        data = ["{texts}/short.jsonl"]
        text_field = "body"
        weight = 0.4"""
    )
    return path


@pytest.fixture
def packed(run: Run, recipe: Path, tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """Return packed data of the recipe: 60 % long, 40 % short."""
    tokens, out = tmp_path / "tokens", tmp_path / "packed"
    made = run("tokenize", tiny_checkpoint, "--recipe", recipe, "--out", tokens, "--workers", 1)
    assert made.code == 0, made.err
    result = run("pack", "--recipe", recipe, "--tokens-in", tokens, "--out", out, "--no-plot")
    assert result.code == 0, result.err
    return out


def test_from_text_to_a_hybrid(
    run: Run, packed: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    extend = ("extend", tiny_checkpoint, "--out", out, *TINY, *PLAN, "--steps", 5, "--json")
    result = run(*extend, "--data", packed)
    assert result.code == 0, result.err
    assert "10 sequences of 128 tokens of 2 packed sets" in result.err
    long, short = result.json["packing"]["sets"]
    assert (long["name"], long["weight"], long["sequences"]) == ("long", 0.6, 6)
    assert (short["name"], short["weight"], short["sequences"]) == ("short", 0.4, 4)
    listing = json.loads((packed / "mixture.json").read_text())
    report = listing["sources"][0]["report"]
    assert report["padding_tokens"] == 0 and report["rest_tokens"] > 0
    assert report["pieces"] == report["rows"]


def test_one_source_with_its_table_and_picture(
    run: Run, texts: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    tokens, out = tmp_path / "tokens", tmp_path / "packed"
    made = run(
        "tokenize", tiny_checkpoint, "--data", texts / "long", texts / "short.jsonl",
        "--text-field", "body", "--out", tokens, "--workers", 1, "--json",
    )  # fmt: skip
    assert made.code == 0, made.err
    assert made.json["documents"] == 126 and made.json["sources"]["skipped"] == {}
    result = run("pack", f"all={tokens}", "--context", 128, "--out", out)
    assert result.code == 0, result.err
    head, line = result.out.splitlines()[:2]
    assert head.split()[:3] == ["source", "share", "documents"]
    assert line.split()[:3] == ["all", "100.0%", "126"]
    assert (out / "lengths.png").stat().st_size > 10_000
    as_json = run("pack", tokens, "--context", 128, "--out", tmp_path / "again", "--json")
    assert as_json.json["sources"][0]["name"] == "tokens"
    assert (
        as_json.json["sources"][0]["report"]
        == json.loads((out / "all" / "packed.json").read_text())["report"]
    )


def test_an_interrupted_recipe_is_resumed(
    run: Run,
    refused: Callable[..., str],
    recipe: Path,
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = ("tokenize", tiny_checkpoint, "--recipe", recipe, "--out", tmp_path / "t")
    command += ("--workers", 1)
    make = job._tokenize_shard

    def stopping(*args: Any) -> None:
        if args[2].endswith("short"):
            raise KeyboardInterrupt
        make(*args)

    with monkeypatch.context() as patch:
        patch.setattr(job, "_tokenize_shard", stopping)
        stopped = run(*command)
    assert stopped.code == 130 and "0 of 1 shards are whole; --resume" in stopped.err
    assert "not empty" in refused(*command)
    resumed = run(*command, "--resume")
    assert resumed.code == 0, resumed.err
    assert "long: tokenized already" in resumed.err and "120 documents" in resumed.err
    recipe.write_text(recipe.read_text().replace('"body"', '"other"'))
    changed = run(*command, "--resume")
    assert changed.code == 2 and "text_field was 'body' and is now 'other'" in changed.err


def test_one_folder_is_resumed_from_itself_alone(
    run: Run, texts: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopping(*args: Any) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "t"
    with monkeypatch.context() as patch:
        patch.setattr(job, "_tokenize_shard", stopping)
        command = ("tokenize", tiny_checkpoint, "--data", texts / "long", "--out", out)
        assert run(*command, "--workers", 1).code == 130
    again = run(*command)
    assert again.code == 2 and "add --resume" in again.err
    for option, words in (
        ("--strict", "strict was False and is now True"),
        ("--text-field=body", "text_field was 'text' and is now 'body'"),
        ("--no-add-eos", "add_eos was None and is now False"),
    ):
        other = run("tokenize", "--out", out, "--resume", option)
        assert other.code == 2 and words in other.err
    resumed = run("tokenize", "--out", out, "--resume", "--workers", 1)
    assert resumed.code == 0 and "6 documents" in resumed.err
    finished = run("tokenize", "--out", out, "--resume")
    assert finished.code == 2 and "to its end already" in finished.err


def test_the_same_text_is_tokenized_once(
    run: Run,
    recipe: Path,
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two sources of one text differ in how they are packed; what is made is as if made twice."""
    text = recipe.read_text()
    begin = text.index("        [sources.long]")
    short = text[begin : text.index("        [sources.short]")].replace(
        "sources.long", "sources.cut"
    )
    recipe.write_text(text + "\n" + short.replace("min-length = 128", "max_length = 64"))
    made: list[str] = []
    whole = job.tokenize

    def counted(settings: Any, out: str, **options: Any) -> Any:
        made.append(Path(out).name)
        return whole(settings, out, **options)

    monkeypatch.setattr(job, "tokenize", counted)
    tokens = tmp_path / "t"
    result = run("tokenize", tiny_checkpoint, "--recipe", recipe, "--out", tokens)
    assert result.code == 0, result.err
    assert made == ["long", "short"]
    assert f"{tokens}/cut: the tokens of {tokens}/long" in result.out + result.err
    names = [sorted(p.name for p in (tokens / one).iterdir()) for one in ("long", "cut")]
    assert names[0] == names[1] and len(names[0]) > 2
    for name in names[0]:
        assert (tokens / "cut" / name).read_bytes() == (tokens / "long" / name).read_bytes()
    packed = tmp_path / "p"
    result = run("pack", "--recipe", recipe, "--tokens-in", tokens, "--out", packed, "--no-plot")
    assert result.code == 0, result.err
    # Gone on with, both are there; and one that is gone comes from the other again.
    for _ in range(2):
        result = run("tokenize", tiny_checkpoint, "--recipe", recipe, "--out", tokens, "--resume")
        assert result.code == 0, result.err
        assert made == ["long", "short"]
        assert (tokens / "cut/corpus.json").is_file()
        for path in (tokens / "cut").iterdir():
            path.unlink()
    # An unfinished copy is no obstacle; a file system without links copies.
    (tokens / ".cut.partial").mkdir(exist_ok=True)
    (tokens / ".cut.partial/x").touch()
    monkeypatch.setattr(job.os, "link", lambda *_: (_ for _ in ()).throw(OSError("no links")))
    result = run("tokenize", tiny_checkpoint, "--recipe", recipe, "--out", tokens, "--resume")
    assert result.code == 0, result.err
    assert sorted(p.name for p in (tokens / "cut").iterdir()) == names[0]
    assert not (tokens / ".cut.partial").exists()
    assert (tokens / "cut" / names[0][0]).stat().st_nlink == 1


def test_options_are_the_default_of_a_recipes_sources(
    run: Run, recipe: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    command = ("tokenize", tiny_checkpoint, "--recipe", recipe, "--out", tmp_path / "t")
    made = run(*command, "--workers", 1, "--strict", "--text-field", "other", "--json")
    assert made.code == 0, made.err
    long, short = (one["settings"] for one in made.json["tokens"])
    assert long["strict"] and short["strict"]
    assert (long["text_field"], short["text_field"]) == ("other", "body")


def test_all_of_a_recipe_is_found_before_any_of_it_is_tokenized(
    refused: Callable[..., str], recipe: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    recipe.write_text(recipe.read_text().replace("short.jsonl", "gone.jsonl"))
    command = ("tokenize", tiny_checkpoint, "--recipe", recipe, "--out", tmp_path / "t")
    assert "gone.jsonl' does not exist" in refused(*command)
    assert not (tmp_path / "t").exists()
    recipe.write_text('[sources.a]\ntokens = "t"\n')
    assert "name tokens that are there already" in refused(*command)


def test_what_makes_no_sense_is_refused(
    refused: Callable[..., str],
    run: Run,
    recipe: Path,
    packed: Path,
    tiny_checkpoint: Path,
    tmp_path: Path,
) -> None:
    out = ("--out", tmp_path / "o")
    model = tiny_checkpoint
    assert "with --out" in refused("tokenize", model, "--data", "x")
    assert "give --data" in refused("tokenize", model, *out)
    assert "give MODEL" in refused("tokenize", *out, "--data", "x")
    assert "Give MODEL" in refused("tokenize", *out, "--recipe", recipe)
    assert "Both --recipe and --data" in refused(
        "tokenize", model, *out, "--recipe", recipe, "--data", "x"
    )
    assert "nothing to resume" in refused("tokenize", *out, "--resume")
    assert "does not exist" in refused("tokenize", model, *out, "--data", "nowhere")
    assert "No tokenizer could be loaded" in refused("tokenize", packed, *out, "--data", recipe)
    assert "with --out" in refused("pack", "x")
    assert "What should be packed" in refused("pack", *out)
    assert "How long should sequences be" in refused("pack", "x", *out)
    pack = ("pack", tmp_path / "tokens" / "long", *out, "--context", 128)
    assert "no tokenized documents" in refused("pack", tmp_path, *out, "--context", 128)
    assert "no tokenized documents" in refused("pack", recipe, *out, "--context", 128)
    assert "long is 'keep'" in refused(*pack, "--long", "keep")
    assert "min_length is 129" in refused(*pack, "--min-length", 129)
    assert "'many'" in refused(*pack, "--heldout-tokens", "many")
    assert "goes with --recipe" in refused(*pack, "--tokens-in", "x")
    assert "not empty" in refused(*pack[:2], "--context", 128, "--out", packed)
    assert "Where are the tokens of long" in refused("pack", "--recipe", recipe, *out)
    assert not (tmp_path / "o").exists()


def test_packed_data_that_do_not_fit_the_run_are_refused(
    refused: Callable[..., str], packed: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    run = ("extend", tiny_checkpoint, "--out", tmp_path / "run", *PLAN)
    tiny = (*run, *TINY)
    other = ("--context", 256, "--batch-tokens", 256)
    assert "packed to sequences of 128 tokens, but the context is 256" in refused(
        *run, *other, "--data", packed
    )
    assert "cannot be trained on together" in refused(*tiny, "--data", packed, tmp_path)
    assert "tokens that are not packed" in refused(*tiny, "--data", tmp_path / "tokens" / "long")
    assert "strict tells how to read text" in refused(*tiny, "--data", packed, "--strict")
    assert "long holds" in refused(*tiny, "--data", packed, "--steps", 1000)
    info = packed / "long" / "packed.json"
    fields = json.loads(info.read_text())
    for name in ("long", "short"):
        path = packed / name / "packed.json"
        path.write_text(
            json.dumps({**json.loads(path.read_text()), "tokenizer": {
                **fields["tokenizer"], "fingerprint": "0" * 64}})
        )  # fmt: skip
    assert "was tokenized with" in refused(*tiny, "--data", packed)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_of_data_are_valid(path: Path) -> None:
    recipe = read_data_recipe(path)
    assert recipe.context is not None and f"{recipe.context // 1024}k" in path.stem
    assert sum(source["weight"] for source in recipe.sources.values()) == pytest.approx(1)
    for source in recipe.sources.values():
        assert all(entry.startswith("PATH/") for entry in source["data"])
        PackOptions(context=recipe.context, min_length=source.get("min_length", 1))
    long = [s["weight"] for s in recipe.sources.values() if s.get("min_length")]
    assert sum(long) == pytest.approx(0.6)


def test_there_is_a_recipe_of_data() -> None:
    assert RECIPES


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not TOML"),
        ("context = 4", "has no sources"),
        ("colour = 1", "has colour; known are context, seed, sources"),
        ("[sources.a]\nsize = 1", "[sources.a]"),
        ("[sources.a]\nweight = true", "weight of [sources.a]"),
        ("[sources.a]\ndata = [1]", "give a list of paths"),
        ("[sources.a]\nmin_length = 'x'", "'x'"),
        ("[sources]\na = 1", "give a table"),
        ("context = true\n[sources.a]\n", "context of"),
        ('[sources."../a"]\n', "'../a', which makes no folder name"),
        ("[sources.a]\nweight = -1", "The weight of a is -1; give a number above 0"),
        ("[sources.a]\nweight = 1\n[sources.b]\n", "Some sources have a weight"),
    ],
)
def test_bad_recipes_of_data_are_refused(
    refused: Callable[..., str], tmp_path: Path, text: str, words: str
) -> None:
    path = tmp_path / "r.toml"
    path.write_text(text)
    assert words in refused("pack", "--recipe", path, "--out", tmp_path / "o")
    assert words in refused("tokenize", "m", "--recipe", path, "--out", tmp_path / "o")
    assert "cannot be read" in refused("pack", "--recipe", tmp_path / "x", "--out", "o")


def test_a_recipe_of_a_run_names_a_mixture(refused: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text('[mixture]\n"packed/books" = 0.6\n"packed/web" = 2\n')
    assert read_recipe(path) == {"data": ["packed/books@0.6", "packed/web@2"]}
    for text, words in (
        ('data = "x"\n[mixture]\na = 1', "both data and [mixture]"),
        ("mixture = 3", "give a table of packed sets"),
        ("[mixture]\na = 0", "weight of 'a'"),
        ("[mixture]\na = true", "weight of 'a'"),
    ):
        path.write_text(text)
        assert words in refused("extend", "--recipe", path, "--out", tmp_path / "o")
