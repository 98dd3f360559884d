"""Recipes of data: a TOML file of sources that `longgen tokenize` and `longgen pack` both read."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longgen.cli.options import parse_tokens
from longgen.errors import UsageError

_TOP = {"context": (int, str), "seed": (int,), "sources": (dict,)}
_SOURCE = {
    "data": (list, str),
    "tokens": (str,),
    "weight": (int, float),
    "join_folders": (bool,),
    "text_field": (str,),
    "strict": (bool,),
    "long": (str,),
    "max_length": (int, str),
    "min_length": (int, str),
    "whole": (bool,),
    "heldout_tokens": (int, str),
}
_TOKENS = ("max_length", "min_length", "heldout_tokens")


@dataclass(frozen=True, slots=True)
class DataRecipe:
    """Hold a recipe of data: context and seed, None where not given, and each source's keys."""

    context: int | None
    seed: int | None
    sources: dict[str, dict[str, Any]]


def read_data_recipe(path: str | Path) -> DataRecipe:
    """Read a recipe of data.

    Raises:
        UsageError: if it is missing, not TOML, or holds what `longgen pack` would refuse, for
            between the two there may be hours.
    """
    from longgen.data.pack import check_sources

    try:
        with open(path, "rb") as file:
            found = tomllib.load(file)
    except OSError as error:
        raise UsageError(f"The recipe {path} cannot be read ({error.strerror}).") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"The recipe {path} is not TOML: {error}.") from None
    top = _checked(found, _TOP, f"The recipe {path}")
    sources = top.get("sources", {})
    if not sources:
        raise UsageError(
            f"The recipe {path} has no sources. Give each a table, such as [sources.books]."
        )
    read: dict[str, dict[str, Any]] = {}
    for name, fields in sources.items():
        what = f"[sources.{name}] in {path}"
        if not isinstance(fields, dict):
            raise UsageError(f"{what} is {fields!r}; give a table.")
        entry = _checked(fields, _SOURCE, what)
        for key in _TOKENS:
            if key in entry:
                # None may be held out, or left out for shortness.
                entry[key] = parse_tokens(str(entry[key])) if str(entry[key]) != "0" else 0
        if isinstance(entry.get("data"), str):
            entry["data"] = [entry["data"]]
        if not all(isinstance(one, str) for one in entry.get("data", [])):
            raise UsageError(f"data of {what} is {entry['data']!r}; give a list of paths.")
        read[name] = entry
    try:
        check_sources([(name, f"in {path}", entry.get("weight")) for name, entry in read.items()])
    except UsageError as error:
        raise UsageError(f"The recipe {path}: {error}") from None
    context = parse_tokens(str(top["context"])) if "context" in top else None
    return DataRecipe(context, top.get("seed"), read)


def _checked(fields: dict[str, Any], known: dict[str, Any], what: str) -> dict[str, Any]:
    """Return fields with _ between words, refusing unknown keys and values of another kind."""
    named = {key.replace("-", "_"): value for key, value in fields.items()}
    unknown = sorted(set(named) - set(known))
    if unknown:
        raise UsageError(f"{what} has {', '.join(unknown)}; known are {', '.join(known)}.")
    for key, value in named.items():
        if not isinstance(value, known[key]) or (
            isinstance(value, bool) and bool not in known[key]
        ):
            kinds = " or ".join(kind.__name__ for kind in known[key])
            raise UsageError(f"{key} of {what} is {value!r}; give {kinds}.")
    return named
