"""`longgen tokenize`: text of any size to tokens on disk."""

from __future__ import annotations

import json as json_module
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from longgen.checkpoint import check_output
from longgen.cli.console import format_count, print_json
from longgen.cli.models import progress_lines, quiet_libraries
from longgen.cli.options import JsonOption
from longgen.cli.sources import read_data_recipe
from longgen.errors import UsageError, what_changed

_TEXT_OPTIONS = ("join_folders", "text_field", "strict")


def tokenize(
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="The folder of the checkpoint, for its tokenizer."),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option("--out", metavar="DIR", help="Folder for the tokens, new or empty."),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            metavar="PATHS...",
            help="What to tokenize: files (text, source code, .jsonl, .parquet), folders of them, "
            "local datasets, or globs. Takes several paths in a row, and may be repeated.",
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            metavar="FILE",
            help="A TOML file of sources (docs/data.md), each of which goes to a folder of its "
            "name in --out. The options below are then the default of its sources.",
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers",
            min=1,
            metavar="NUMBER",
            help="Processes that work at the same time. [default: one a core]",
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on with what was interrupted in --out. Nothing else has to be given again, "
            "but --recipe if it was one.",
        ),
    ] = False,
    join_folders: Annotated[
        bool | None,
        typer.Option(
            "--join-folders/--no-join-folders",
            show_default=False,
            help="Make one long document of all text files in each sub-folder of a data folder, as "
            "a code repository is one. [default: off]",
        ),
    ] = None,
    text_field: Annotated[
        str | None,
        typer.Option(
            help="Key or column of the text in .jsonl, .parquet and datasets. [default: text]"
        ),
    ] = None,
    strict: Annotated[
        bool | None,
        typer.Option(
            "--strict/--no-strict",
            show_default=False,
            help="Refuse data that are empty, binary or not UTF-8, instead of skipping and "
            "counting them. [default: off]",
        ),
    ] = None,
    add_bos: Annotated[
        bool | None,
        typer.Option(
            "--add-bos/--no-add-bos",
            help="Begin each document with the tokenizer's bos. [default: if it does so itself]",
            show_default=False,
        ),
    ] = None,
    add_eos: Annotated[
        bool | None,
        typer.Option(
            "--add-eos/--no-add-eos",
            help="End each document with the tokenizer's eos. [default: if it has one]",
            show_default=False,
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Tokenize text into shards on disk, in several processes.

    Ctrl-C costs the shards in hand; --resume goes on with the others. The shards are datatrove's
    .ds files. Next comes `longgen pack`.
    """
    if out is None:
        raise UsageError("Where should the tokens go? Give a folder with --out.")
    if recipe is not None and data:
        raise UsageError("Both --recipe and --data were given; the recipe names the data.")
    texts = {"join_folders": join_folders, "text_field": text_field, "strict": strict}
    marks = {"add_bos": add_bos, "add_eos": add_eos}
    given = {name: value for name, value in {**texts, **marks}.items() if value is not None}
    jobs: list[tuple[str, dict[str, Any]]]
    if recipe is not None:
        if model is None:
            raise UsageError("Give MODEL, the folder of the checkpoint, for its tokenizer.")
        jobs = []
        for name, source in read_data_recipe(recipe).sources.items():
            if "tokens" in source:  # is tokenized already, elsewhere
                continue
            if not source.get("data"):
                raise UsageError(f"[sources.{name}] in {recipe} has no data; give paths.")
            chosen = {key: source[key] for key in _TEXT_OPTIONS if key in source}
            fields = {"model": model, "data": tuple(source["data"]), **given, **chosen}
            jobs.append((str(Path(out) / name), fields))
        if not jobs:
            raise UsageError(
                f"All sources of {recipe} name tokens that are there already; go on with `longgen "
                "pack`, or give one of them data."
            )
        if not resume:
            check_output(out)
    elif resume and not data:
        # The rest stands in the folder.
        jobs = [(out, given if model is None else {"model": model, **given})]
    else:
        if model is None or not data:
            what = "--data, what to tokenize" if model is not None else "MODEL (before --data)"
            raise UsageError(f"Something is missing: give {what}.")
        jobs = [(out, {"model": model, "data": tuple(data), **given})]
        if not resume:
            check_tokens_output(out)
    _run(jobs, workers, resume, recipe is not None, json)


def _cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def check_tokens_output(out: str) -> None:
    """Refuse a folder in use before anything heavy is imported; unfinished work is told of later.

    Raises:
        UsageError: it holds something that is not tokens.
    """
    if not any((Path(out) / name).is_file() for name in ("tokenize.json", "corpus.json")):
        check_output(out)


def _run(
    jobs: list[tuple[str, dict[str, Any]]],
    workers: int | None,
    resume: bool,
    several: bool,
    json: bool,
) -> None:
    from longgen.data.corpus import INFO_FILE
    from longgen.data.shards import open_tokens
    from longgen.data.sources import find_inputs
    from longgen.data.tokenize import TokenizeSettings, read_plan, share_tokens, tokenize

    quiet_libraries()
    say = progress_lines()
    found = []
    for folder, fields in jobs if several else ():
        if not (read_plan(folder) or (Path(folder) / INFO_FILE).is_file()):
            # Not when the sources before it have taken their hours.
            settings = TokenizeSettings(**fields)
            find_inputs(settings.to_dict()["data"], join_folders=settings.join_folders)
    made: list[tuple[dict[str, Any], str]] = []
    for folder, fields in jobs:
        plan = read_plan(folder)
        finished = (Path(folder) / INFO_FILE).is_file()
        same = [place for settings, place in made if settings == fields]
        if several and resume and finished:
            _check_finished(folder, TokenizeSettings(**fields).to_dict())
            corpus: Any = open_tokens(folder)
            say(f"{folder}: tokenized already")
        elif same and plan is None and not finished:
            share_tokens(same[0], folder)
            corpus = open_tokens(folder)
            say(f"{folder}: the tokens of {same[0]}, whose text it shares")
        else:
            if "data" not in fields:
                earlier = plan["settings"] if plan else {"model": "", "data": ()}
                fields = {**earlier, "data": tuple(earlier["data"]), **fields}
            if several:
                say(f"{folder}:")
            corpus = tokenize(
                TokenizeSettings(**fields),
                folder,
                workers=workers or _cores(),
                resume=resume and (plan is not None or not several),
                say=say,
            )
        made.append((fields, folder))
        info = corpus.info
        skipped = info["sources"]["skipped"]
        say(
            f"{info['documents']:,} documents, {info['tokens']:,} tokens "
            f"({format_count(info['tokens'])}) of {info['characters']:,} characters in {folder}"
            + (
                f"; skipped: {', '.join(f'{n} {reason}' for reason, n in skipped.items())}"
                if skipped
                else ""
            )
        )
        found.append({"folder": folder, **{k: v for k, v in info.items() if k != "shards"}})
    if json:
        print_json({"tokens": found} if several else found[0])


def _check_finished(folder: str, settings: dict[str, Any]) -> None:
    """Refuse to take tokens that were made with other settings for finished work."""
    info = json_module.loads((Path(folder) / "corpus.json").read_text(encoding="utf-8"))
    changed = what_changed(info.get("settings", {}), settings)
    if changed:
        raise UsageError(
            f"{folder} was tokenized with other settings ({'; '.join(changed)}). Remove it to "
            "tokenize it again, or give another --out."
        )
