"""Pack several tokenized sources at once, into a folder that can be trained on."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from longgen.checkpoint import check_output, write_json
from longgen.data.corpus import TokenizedCorpus
from longgen.data.lengths import length_statistics, plot_lengths
from longgen.data.mixture import MIXTURE_FILE, MIXTURE_FORMAT
from longgen.data.packed import PackOptions, pack_documents, write_packed
from longgen.data.shards import ShardedCorpus, open_tokens
from longgen.data.tokenized import identity
from longgen.errors import UsageError

Say = Callable[[str], None]
PLOT_FILE = "lengths.png"
_BLOCK = 1 << 24  # tokens looked at together


@dataclass(frozen=True, slots=True, kw_only=True)
class PackSource:
    """Name a source of tokens.

    Attributes:
        name: of its folder in the output.
        tokens: the folder of its tokens.
        options: how to pack it.
        weight: in a mixture of all, in any unit; None to count by rows.
    """

    name: str
    tokens: str
    options: PackOptions
    weight: float | None = None


def pack_sources(
    sources: Sequence[PackSource],
    out: str | Path,
    *,
    tokenizer: Any = None,
    plot: bool = True,
    say: Say = print,
) -> dict[str, Any]:
    """Pack sources into `out`/NAME each, and list them with their weights in `out`/mixture.json.

    The result is the same on every machine with one version of numpy. Packing reads lengths, not
    tokens, and is not resumed: interrupted, it leaves nothing.

    Args:
        sources: of one context length and one tokenizer.
        out: the folder, new or empty.
        tokenizer: says which tokenizer made datatrove's files, which do not say so themselves; with
            others it must be the one that is recorded.
        plot: draw `out`/lengths.png.
        say: prints one line of progress.

    Returns:
        What was written to mixture.json.

    Raises:
        UsageError: for anything that the user can put right; nothing is written then.
    """
    folder = check_output(out)
    if not sources:
        raise UsageError("No tokens were given to pack. Name at least one folder of tokens.")
    check_sources([(source.name, source.tokens, source.weight) for source in sources])
    made_by: dict[str, Any] | None = None if tokenizer is None else identity(tokenizer)
    corpora = []
    for source in sources:
        corpus = open_tokens(source.tokens)
        recorded = corpus.info["tokenizer"]
        if recorded is None:
            if tokenizer is None:
                raise UsageError(
                    f"The files in {source.tokens} do not say which tokenizer made them. Name the "
                    "folder of the model or tokenizer with --tokenizer."
                )
            _check_ids(corpus, identity(tokenizer), source.tokens)
        elif made_by is not None and recorded["fingerprint"] != made_by["fingerprint"]:
            raise UsageError(
                f"{source.tokens} was tokenized with {recorded['name']!r}, not with "
                f"{made_by['name']!r}. Sources must be of one tokenizer."
            )
        made_by = made_by or recorded
        corpora.append(corpus)
    assert made_by is not None
    created = not folder.exists()
    try:
        entries = [
            _pack_one(source, corpus, folder / source.name, made_by, say)
            for source, corpus in zip(sources, corpora, strict=True)
        ]
        total = sum(
            entry["report"]["rows"] if source.weight is None else source.weight
            for entry, source in zip(entries, sources, strict=True)
        )
        shares = [
            (entry["report"]["rows"] if source.weight is None else source.weight) / total
            for entry, source in zip(entries, sources, strict=True)
        ]
        listing = {
            "format": MIXTURE_FORMAT,
            "context": sources[0].options.context,
            "tokenizer": made_by,
            "sources": [
                {**entry, "weight": source.weight, "share": share}
                for entry, source, share in zip(entries, sources, shares, strict=True)
            ],
        }
        if plot:
            drawn = [
                {**entry, "context": sources[0].options.context, "weight": share}
                for entry, share in zip(entries, shares, strict=True)
            ]
            if len(drawn) == 1:
                drawn[0]["weight"] = None
            context = sources[0].options.context
            plot_lengths(drawn, folder / PLOT_FILE, title=f"Packed to rows of {context:,} tokens")
        write_json(folder / MIXTURE_FILE, listing)
    except BaseException:
        for name in (*(source.name for source in sources), PLOT_FILE, MIXTURE_FILE):
            path = folder / name
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        if created and folder.is_dir():
            folder.rmdir()
        raise
    return listing


def _pack_one(
    source: PackSource,
    corpus: TokenizedCorpus | ShardedCorpus,
    folder: Path,
    made_by: dict[str, Any],
    say: Say,
) -> dict[str, Any]:
    began = time.perf_counter()
    say(f"{source.name}: packing {len(corpus):,} documents, {corpus.num_tokens:,} tokens")
    try:
        packing = pack_documents(corpus, source.options)
    except UsageError as error:
        raise UsageError(f"{source.name}: {error}") from None
    lengths = {
        "document_lengths": length_statistics(corpus.lengths),
        "piece_lengths": length_statistics(packing.pieces[:, 1]),
    }
    info = write_packed(
        folder,
        source.name,
        source.tokens,
        corpus,
        packing,
        source.options,
        made_by,
        **lengths,
    )
    report = packing.report
    say(
        f"{source.name}: {report.rows:,} rows of {source.options.context:,}, "
        f"{report.padding_rate:.1%} padding, {time.perf_counter() - began:.1f} s"
    )
    return {
        "name": source.name,
        "options": info["options"],
        "report": info["report"],
        **lengths,
    }


def check_sources(sources: Sequence[tuple[str, str, float | None]]) -> None:
    """Refuse sources whose names make no folders, or whose weights no mixture.

    Args:
        sources: name, what it is of, and weight of each.

    Raises:
        UsageError: with the source.
    """
    for name, what, _ in sources:
        if not re.fullmatch(r"\w[\w.+-]*", name):
            raise UsageError(
                f"The source {what} would be named {name!r}, which makes no folder name. Give it a "
                "name of letters, digits, _, -, + and dots (NAME=FOLDER, or [sources.NAME])."
            )
    names = [name for name, _, _ in sources]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(
            f"Several sources are named {', '.join(twice)}. Give them names of their own, as "
            "NAME=FOLDER."
        )
    if len({weight is None for _, _, weight in sources}) > 1:
        raise UsageError(
            "Some sources have a weight and some have none. Give all of them one, or none: then "
            "each counts by its rows."
        )
    for name, _, weight in sources:
        if weight is not None and not 0 < weight < float("inf"):
            raise UsageError(f"The weight of {name} is {weight}; give a number above 0.")


def _check_ids(corpus: Any, made_by: dict[str, Any], folder: str) -> None:
    """Refuse tokens with ids that the tokenizer said to have made them does not have."""
    size = made_by["vocab_size"]
    for start in range(0, len(corpus.tokens), _BLOCK):
        highest = int(np.max(corpus.tokens[start : start + _BLOCK]))
        if highest >= size:
            raise UsageError(
                f"The tokens in {folder} have ids up to {highest:,} at least, but "
                f"{made_by['name']!r} has only {size:,}. Name the tokenizer that made them."
            )
