"""`longgen pack`: tokens to training sequences of one length."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from longgen.checkpoint import check_output
from longgen.cli.console import format_count, print_json, stdout_console
from longgen.cli.models import progress_lines, quiet_libraries
from longgen.cli.options import JsonOption, parse_tokens
from longgen.cli.sources import read_data_recipe
from longgen.errors import UsageError

_PACK_OPTIONS = ("max_length", "min_length", "whole", "heldout_tokens")


def pack(
    tokens: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME=]TOKENS[@WEIGHT]...",
            help="Folders of tokens, of `longgen tokenize` or of datatrove. A weight is a source's "
            "share of the training tokens, in any unit; without any, each counts by its size.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option("--out", metavar="DIR", help="Folder for the packed sources, new or empty."),
    ] = None,
    context: Annotated[
        str | None,
        typer.Option("--context", metavar="TOKENS", help="Tokens in a sequence, such as 128K."),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            metavar="FILE",
            help="A TOML file of sources (docs/data.md), instead of TOKENS. The options below are "
            "then the default of its sources.",
        ),
    ] = None,
    tokens_in: Annotated[
        str | None,
        typer.Option(
            "--tokens-in",
            metavar="DIR",
            help="With --recipe: the folder that `longgen tokenize --recipe` wrote.",
        ),
    ] = None,
    long: Annotated[
        str | None,
        typer.Option(
            "--long",
            metavar="cut|truncate|drop",
            help="What becomes of longer documents than a sequence: cut into sequences and a rest, "
            "truncate to the first sequence, or drop. [default: cut]",
        ),
    ] = None,
    max_length: Annotated[
        str | None,
        typer.Option(
            "--max-length",
            metavar="TOKENS",
            help="Treat documents above this as long, and cut them to it. [default: the context]",
        ),
    ] = None,
    min_length: Annotated[
        str | None,
        typer.Option(
            "--min-length",
            metavar="TOKENS",
            help="Leave out documents, and rests of cut ones, that are shorter. [default: 1]",
        ),
    ] = None,
    whole: Annotated[
        bool,
        typer.Option(
            "--whole",
            help="Never cut a document that fits into a sequence just to fill the space in others; "
            "more of it is padding then.",
        ),
    ] = False,
    heldout_tokens: Annotated[
        str | None,
        typer.Option(
            "--heldout-tokens",
            metavar="TOKENS",
            help="Tokens of each source kept out of training, for `longgen evaluate`; 0 for none. "
            "[default: a twentieth, of 2 to 16 sequences]",
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed",
            min=0,
            help="Decides which documents of one length go together, and what is held out. "
            "[default: 0]",
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            "--tokenizer",
            metavar="MODEL",
            help="Folder of the checkpoint or tokenizer that made the tokens. Needed for "
            "datatrove's files, which do not say.",
        ),
    ] = None,
    plot: Annotated[
        bool, typer.Option("--plot/--no-plot", help="Draw lengths.png (needs matplotlib).")
    ] = True,
    json: JsonOption = False,
) -> None:
    """Pack tokenized documents into training sequences of one length, each source by itself.

    Documents keep their boundaries: none is seen from another. What is cut, left out, held out
    and padded is reported for each source. Give the folder to `longgen extend --data`.
    """
    if out is None:
        raise UsageError("Where should the packed sources go? Give a folder with --out.")
    given: dict[str, Any] = {
        "long": long,
        "max_length": parse_tokens(max_length) if max_length else None,
        "min_length": parse_tokens(min_length) if min_length else None,
        "whole": whole or None,
        "heldout_tokens": _tokens_or_none(heldout_tokens),
    }
    given = {name: value for name, value in given.items() if value is not None}
    length = parse_tokens(context) if context else None
    entries: list[dict[str, Any]] = []
    if recipe is not None:
        if tokens:
            raise UsageError("Both --recipe and TOKENS were given; the recipe names the sources.")
        read = read_data_recipe(recipe)
        length = length or read.context
        seed = read.seed if seed is None else seed
        for name, source in read.sources.items():
            place = source.get("tokens") or (str(Path(tokens_in) / name) if tokens_in else None)
            if place is None:
                raise UsageError(
                    f"Where are the tokens of {name}? Give --tokens-in, the folder that `longgen "
                    "tokenize --recipe` wrote."
                )
            entries.append({"name": name, "place": place, **given, **source})
    else:
        if tokens_in is not None:
            raise UsageError("--tokens-in goes with --recipe; give the folders of tokens instead.")
        for text in tokens or ():
            entries.append({**_split(text), **given})
    if not entries:
        raise UsageError("What should be packed? Give folders of tokens, or --recipe.")
    if length is None:
        raise UsageError("How long should sequences be? Give --context, such as 128K.")
    check_output(out)

    from longgen.checkpoint import load_tokenizer
    from longgen.data.pack import PackSource, pack_sources
    from longgen.data.packed import PackOptions

    quiet_libraries()
    sources = []
    for entry in entries:
        chosen = {name: entry[name] for name in _PACK_OPTIONS if name in entry}
        if "long" in entry:
            chosen["long_documents"] = entry["long"]
        try:
            options = PackOptions(context=length, seed=seed or 0, **chosen)
        except UsageError as error:
            raise UsageError(f"{entry['name']}: {error}") from None
        sources.append(
            PackSource(
                name=entry["name"],
                tokens=entry["place"],
                options=options,
                weight=entry.get("weight"),
            )
        )
    listing = pack_sources(
        sources,
        out,
        tokenizer=None if tokenizer is None else load_tokenizer(tokenizer),
        plot=plot,
        say=progress_lines(),
    )
    if json:
        print_json(listing)
    else:
        _print(listing, out, plot)


def _tokens_or_none(text: str | None) -> int | None:
    """Read a number of tokens that may be 0."""
    if text is None:
        return None
    return 0 if text.strip() == "0" else parse_tokens(text)


def _split(text: str) -> dict[str, Any]:
    """Read [NAME=]TOKENS[@WEIGHT]; the name is the folder's if none is given."""
    from longgen.data.mixture import split_weight

    name, equals, path = text.partition("=")
    if not equals or Path(text).exists():
        name, path = "", text
    path, weight = split_weight(path)
    return {"name": name or Path(path).resolve().name, "place": path, "weight": weight}


def _print(listing: dict[str, Any], out: str, plot: bool) -> None:
    """Print what became of each source, a column each for what happened to its tokens."""
    console = stdout_console()
    # Better broken lines than figures cut off.
    console.width = max(console.width, 130)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("source")
    columns = (
        "share",
        "documents",
        "median",
        "longest",
        "tokens",
        "packed",
        "held out",
        "left out",
        "rows",
        "padding",
        "long",
        "cut to fill",
    )
    for column in columns:
        table.add_column(column, justify="right")
    for one in listing["sources"]:
        report, lengths = one["report"], one["document_lengths"]
        left = sum(
            report[name]
            for name in ("short_tokens", "dropped_tokens", "truncated_tokens", "rest_tokens")
        )
        table.add_row(
            one["name"],
            f"{one['share']:.1%}",
            f"{report['documents']:,}",
            f"{lengths['median']:,.0f}",
            f"{lengths['longest']:,}",
            format_count(report["tokens"]),
            f"{report['packed_tokens'] / report['tokens']:.1%}",
            f"{report['heldout_tokens'] / report['tokens']:.1%}",
            f"{left / report['tokens']:.1%}",
            f"{report['rows']:,}",
            f"{report['padding_rate']:.1%}",
            f"{report['long_documents']:,}",
            f"{report['cut_documents']:,}",
        )
    console.print(table)
    where = f"{out}/lengths.png, {out}/mixture.json" if plot else f"{out}/mixture.json"
    console.print(f"more figures: {where}")
