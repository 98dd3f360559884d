"""Read one text, JSON lines, Parquet or dataset input into documents and problems.

A reader never raises for bad content: it yields a `Problem` in its place, and the caller decides
whether to skip and count it or to refuse it.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from longgen.errors import UsageError

# What counts as plain text: prose, and the source code of programming languages.
_TEXT = """txt md rst tex py pyi pyx c h cc cpp cxx hh hpp cu cuh cs java kt scala js jsx mjs ts tsx
    go rs rb php pl pm lua r jl swift m mm hs ml mli ex exs erl clj f90 f sh bash sql zig nim dart
    vue proto cmake"""
TEXT_SUFFIXES = frozenset(f".{name}" for name in _TEXT.split())
_BATCH_ROWS = 256

Kind = Literal["text", "jsonl", "parquet", "dataset", "joined"]


@dataclass(frozen=True, slots=True)
class Document:
    """Hold one document: its text and where it came from (a path, with a line or row number)."""

    text: str
    source: str


@dataclass(frozen=True, slots=True)
class Problem:
    """Say what can't be read: the reason that it is counted under, where, and the details."""

    reason: str
    where: str
    detail: str


@dataclass(frozen=True, slots=True)
class Input:
    """Name one thing to read; `members` are a joined folder's files, shown relative to `root`.

    A `part` (first, end) of it is the lines that begin at these bytes of a .jsonl file, row groups
    of a .parquet file, or rows of a dataset; an end of None is the end of the file.
    """

    kind: Kind
    path: Path
    members: tuple[Path, ...] = ()
    root: Path = Path()
    part: tuple[int, int | None] | None = None


def kind_of(path: Path) -> Kind | None:
    """Return how a file is read by its suffix, None if it can't be."""
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        return "jsonl"
    if suffix == ".parquet":
        return "parquet"
    return "text" if suffix in TEXT_SUFFIXES else None


def require_libraries(inputs: Iterable[Input]) -> None:
    """Import what the inputs need to be read.

    Raises:
        UsageError: a library isn't installed.
    """
    needs = {one.kind: one.path for one in inputs}
    for kind, module in (("parquet", "pyarrow.parquet"), ("dataset", "datasets")):
        if kind in needs:
            _import(module, needs[kind])


def _import(module: str, path: Path) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UsageError(
            f"Reading {path} needs the library {module.split('.')[0]!r}, which is not installed. "
            "Run: pip install 'longgen[data]'"
        ) from error


def read(one: Input, text_field: str) -> Iterator[Document | Problem]:
    """Yield the documents of one input and, in their places, what can't be read.

    Raises:
        UsageError: a dataset of several splits has no "train", or a library isn't installed.
    """
    if one.kind == "text":
        yield _read_text(one.path)
    elif one.kind == "joined":
        yield from _read_joined(one)
    elif one.kind == "jsonl":
        yield from _read_jsonl(one, text_field)
    elif one.kind == "parquet":
        yield from _read_parquet(one, text_field)
    else:
        yield from _read_dataset(one, text_field)


def _read_text(path: Path) -> Document | Problem:
    try:
        data = path.read_bytes()
    except OSError as error:
        return Problem("unreadable", str(path), error.strerror or str(error))
    nul = data.find(b"\0")
    if nul >= 0:
        return Problem("binary", str(path), f"binary data, a NUL byte at offset {nul}")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        return Problem("not UTF-8", str(path), _bad_byte(data, error, 0))
    text = text.removeprefix("\ufeff")
    if not text or text.isspace():
        return Problem("empty", str(path), f"no text up to the end at offset {len(data)}")
    return Document(text, str(path))


def _bad_byte(data: bytes, error: UnicodeDecodeError, base: int) -> str:
    return f"not UTF-8, byte 0x{data[error.start]:02x} at offset {base + error.start}"


def _read_joined(one: Input) -> Iterator[Document | Problem]:
    parts: list[str] = []
    for path in one.members:
        item = _read_text(path)
        if isinstance(item, Problem):
            yield item
            continue
        # A file name may hold bytes that aren't UTF-8, which no tokenizer takes.
        name = path.relative_to(one.root).as_posix().encode("utf-8", "replace").decode()
        end = "" if item.text.endswith("\n") else "\n"
        parts.append(f"# File: {name}\n{item.text}{end}\n")
    if parts:
        yield Document("".join(parts), str(one.path))


def _read_jsonl(one: Input, text_field: str) -> Iterator[Document | Problem]:
    path = one.path
    first, end = one.part or (0, None)
    offset, blank = first, one.part is None
    try:
        with path.open("rb") as file:
            if first:
                # The line that the first byte is inside of belongs to the part before.
                file.seek(first - 1)
                offset = first - 1 + len(file.readline())
            for number, line in enumerate(file, start=1):
                if end is not None and offset >= end:
                    return
                if line.strip():
                    blank = False
                    # Inside a file nobody has counted the lines.
                    where = f"{path}, byte {offset}" if first else f"{path}:{number}"
                    yield _read_json_line(line, where, offset, text_field)
                offset += len(line)
    except OSError as error:
        yield Problem("unreadable", str(path), error.strerror or str(error))
        return
    if blank:
        yield Problem("empty", str(path), f"no lines up to the end at offset {offset}")


def _read_json_line(line: bytes, where: str, offset: int, text_field: str) -> Document | Problem:
    try:
        row = json.loads(line.decode("utf-8").removeprefix("\ufeff"))
    except UnicodeDecodeError as error:
        return Problem("not UTF-8", where, _bad_byte(line, error, offset))
    except (ValueError, RecursionError) as error:
        return Problem("malformed", where, f"not JSON ({error}); the line is at offset {offset}")
    if not isinstance(row, dict):
        return Problem("malformed", where, f"not a JSON object; the line is at offset {offset}")
    if text_field not in row:
        return Problem("malformed", where, f"no field {text_field!r} among {_list(row)}")
    return _record(row[text_field], where)


def _read_parquet(one: Input, text_field: str) -> Iterator[Document | Problem]:
    path = one.path
    parquet = _import("pyarrow.parquet", path)
    # pyarrow's errors on bad files are ValueErrors and OSErrors.
    try:
        with parquet.ParquetFile(path) as file:
            if text_field in file.schema_arrow.names:
                groups = list(range(file.num_row_groups)[slice(*(one.part or (None, None)))])
                rows = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
                batches = file.iter_batches(
                    batch_size=_BATCH_ROWS, columns=[text_field], row_groups=groups
                )
                first = sum(rows[: groups[0]]) if groups else 0
                yield from _records((batch[0].to_pylist() for batch in batches), path, first)
            else:
                yield _no_column(file.schema_arrow.names, path, text_field)
    except (ValueError, OSError) as error:
        yield Problem("malformed", str(path), f"not readable as Parquet ({error})")


def _read_dataset(one: Input, text_field: str) -> Iterator[Document | Problem]:
    path = one.path
    try:
        data = _load_dataset(path)
    except (ValueError, OSError, KeyError, TypeError) as error:
        yield Problem("malformed", str(path), f"not readable as a dataset ({error})")
        return
    if text_field in data.column_names:
        first, end = one.part or (0, None)
        plain = data.select_columns([text_field]).with_format(None)
        if one.part is not None:
            plain = plain.select(range(first, len(plain) if end is None else end))
        batches = plain.iter(batch_size=_BATCH_ROWS)
        yield from _records((batch[text_field] for batch in batches), path, first)
    else:
        yield _no_column(data.column_names, path, text_field)


def _load_dataset(path: Path) -> Any:
    """Load the rows of a dataset on disk, of its split "train" if it has several.

    Raises:
        UsageError: there are several splits and no "train".
        ValueError, OSError, KeyError, TypeError: it cannot be read.
    """
    datasets = _import("datasets", path)
    data = datasets.load_from_disk(str(path))
    if isinstance(data, datasets.DatasetDict):
        if "train" not in data:
            raise UsageError(
                f"The dataset {path} has no split 'train' among {_list(data)}. Name the folder of "
                "the split to read, which is inside it."
            )
        data = data["train"]
    return data


def split_input(one: Input, target: int) -> list[tuple[Input, int]]:
    """Cut an input into parts of about `target` bytes, where its kind allows it.

    Args:
        one: the input; text files and joined folders stay whole.
        target: bytes on disk.

    Returns:
        Parts that together read the same documents in the same order, each with its bytes on disk.
        What cannot be read stays whole, for `read` to say so.
    """
    try:
        if one.kind == "joined":
            return [(one, sum(path.stat().st_size for path in one.members))]
        if one.kind == "dataset":
            size = sum(path.stat().st_size for path in one.path.rglob("*") if path.is_file())
        else:
            size = one.path.stat().st_size
        parts = -(-size // target)
        if parts <= 1 or one.kind == "text":
            return [(one, size)]
        if one.kind == "jsonl":
            units = size
        elif one.kind == "parquet":
            with _import("pyarrow.parquet", one.path).ParquetFile(one.path) as file:
                units = file.num_row_groups
        else:
            units = len(_load_dataset(one.path))
    except (ValueError, OSError, KeyError, TypeError):
        return [(one, 0)]
    parts = min(parts, units)
    if parts <= 1:
        return [(one, size)]
    bounds = [i * units // parts for i in range(parts + 1)]
    ends: list[int | None] = [*bounds[1:-1], None]
    return [
        (replace(one, part=(first, end)), size // parts)
        for first, end in zip(bounds[:-1], ends, strict=True)
    ]


def _list(names: Iterable[object]) -> str:
    return ", ".join(repr(name) for name in names) or "none"


def _no_column(names: Iterable[str], path: Path, text_field: str) -> Problem:
    return Problem("malformed", str(path), f"no column {text_field!r} among {_list(names)}")


def _records(
    batches: Iterable[Sequence[object]], path: Path, first: int
) -> Iterator[Document | Problem]:
    number = first
    for batch in batches:
        for value in batch:
            yield _record(value, f"{path}, row {number}")
            number += 1
    if number == first:
        yield Problem("empty", str(path), "no rows")


def _record(value: object, where: str) -> Document | Problem:
    """Check one value of a text field."""
    if value is None:
        return Problem("empty", where, "the text is null")
    if not isinstance(value, str):
        kind = type(value).__name__
        return Problem("malformed", where, f"the text field holds a {kind}, not a string")
    if not value or value.isspace():
        return Problem("empty", where, "the text is empty")
    nul = value.find("\0")
    if nul >= 0:
        return Problem("binary", where, f"a NUL at character {nul} of the text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair
        return Problem("not UTF-8", where, f"half a surrogate pair at character {error.start}")
    return Document(value, where)
