"""Find documents under files, folders and globs, and read them lazily."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from longgen.data.readers import Document, Input, kind_of, read, require_libraries
from longgen.errors import UsageError

NUM_EXAMPLES = 5  # names kept per reason for skipping


@dataclass
class SourcesReport:
    """Count what was read and what was skipped.

    Attributes:
        files: files (or dataset folders, or joined folders) that gave at least one document.
        documents: documents given.
        characters: their characters.
        skipped: reason -> number of files, lines or rows left out. Reasons: "empty", "binary",
            "not UTF-8", "malformed", "unreadable", "unsupported".
        examples: reason -> the first few names with what was wrong.
    """

    files: int = 0
    documents: int = 0
    characters: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def skip(self, reason: str, name: str) -> None:
        """Count one thing left out."""
        self.skipped[reason] = self.skipped.get(reason, 0) + 1
        names = self.examples.setdefault(reason, [])
        if len(names) < NUM_EXAMPLES:
            names.append(name)

    def add(self, other: SourcesReport) -> None:
        """Add what another report counts."""
        self.files += other.files
        self.documents += other.documents
        self.characters += other.characters
        for reason, count in other.skipped.items():
            self.skipped[reason] = self.skipped.get(reason, 0) + count
            names = self.examples.setdefault(reason, [])
            names += other.examples[reason][: NUM_EXAMPLES - len(names)]

    def to_dict(self) -> dict[str, Any]:
        """Return the counts as plain values for JSON."""
        return asdict(self)

    def skipped_text(self) -> str:
        """Say in words what was skipped, with one name for each reason; "" if nothing was."""
        return "; ".join(
            f"{count} {reason} ({self.examples[reason][0]}{', ...' if count > 1 else ''})"
            for reason, count in self.skipped.items()
        )


class Documents:
    """Iterate over documents lazily, in a fixed order; one document is in memory at a time.

    Each pass reads the files anew. `report` belongs to the latest pass, and is complete once
    that pass has ended. A pass without documents is an error unless `allow_none`.
    """

    def __init__(
        self,
        inputs: Sequence[Input],
        found: SourcesReport,
        *,
        strict: bool,
        text_field: str,
        allow_none: bool = False,
    ) -> None:
        self._inputs = tuple(inputs)
        self._found = found
        self._strict = strict
        self._text_field = text_field
        self._allow_none = allow_none
        self.report = SourcesReport(**found.to_dict())

    def __iter__(self) -> Iterator[Document]:
        report = self.report = SourcesReport(**self._found.to_dict())
        for one in self._inputs:
            before = report.documents
            for item in read(one, self._text_field):
                if isinstance(item, Document):
                    # Counted before the caller goes on: it may stop after any document.
                    report.files += report.documents == before
                    report.documents += 1
                    report.characters += len(item.text)
                    yield item
                elif self._strict:
                    raise UsageError(
                        f"{item.where}: {item.detail}. Mend it or leave it out, or read without "
                        "strict mode to skip and count such input."
                    )
                else:
                    report.skip(item.reason, f"{item.where}: {item.detail}")
        if not report.documents and not self._allow_none:
            raise no_documents(report)


def read_documents(
    paths: Sequence[str | Path],
    *,
    strict: bool = False,
    join_folders: bool = False,
    text_field: str = "text",
) -> Documents:
    """Find the documents under some paths.

    Read are: text files (.txt, .md, .rst, .py and other source code; UTF-8), .jsonl (one JSON
    object a line), .parquet, local Hugging Face dataset folders (written by `save_to_disk`; of
    several splits, "train"), folders of all these and globs (`docs/**/*.md`). Folders are walked
    in sorted order; hidden names, `__pycache__` and links to folders are passed over. A file met
    twice is read once.

    Empty (or only white space), binary (a NUL byte), non-UTF-8, malformed and unreadable files,
    lines and rows are skipped and counted, as are files of other kinds met in folders and globs.

    Args:
        paths: files, folders and globs, read in this order.
        strict: refuse what would be skipped, with its name and byte offset, line or row. Files
            of other kinds met in folders and globs are skipped all the same.
        join_folders: make one long document of all text files in each immediate sub-folder of a
            given folder, and one of its loose text files: in sorted order, each file under a line
            `# File: <path relative to the given folder>`. This is how code repositories become
            long documents (ProLong, arXiv 2410.02660). Files named or globbed stay single.
        text_field: the key or column that holds the text in .jsonl, .parquet and datasets.

    Raises:
        UsageError: a path doesn't exist, a glob matches nothing, a file named outright is of
            another kind, a library isn't installed, or there are no documents (known here or,
            if all were skipped, at the end of the pass).
    """
    inputs, report = find_inputs(paths, join_folders=join_folders)
    return Documents(inputs, report, strict=strict, text_field=text_field)


def find_inputs(
    paths: str | Path | Sequence[str | Path], *, join_folders: bool = False
) -> tuple[list[Input], SourcesReport]:
    """List what `read_documents` reads, in order, with a report that counts what it leaves out.

    Raises:
        UsageError: as `read_documents` raises it.
    """
    if isinstance(paths, str | Path):
        paths = [paths]
    if not paths:
        raise UsageError("No data paths were given. Name at least one file, folder or glob.")
    report = SourcesReport()
    inputs: list[Input] = []
    seen: set[str] = set()
    for given in paths:
        for path, named in _match(str(given)):
            found: list[Input] = []
            for file, real, is_folder in _walk(path, os.path.realpath(path)):
                kind = "dataset" if is_folder else kind_of(file)
                if kind is None and named and file == path:
                    raise UsageError(
                        f"{path} is of a kind that cannot be read ({path.suffix or 'no suffix'}). "
                        "Give text or source code, .jsonl, .parquet, a folder or a glob; a text "
                        "file of another suffix can be renamed to .txt."
                    )
                if real in seen:
                    continue
                seen.add(real)
                if kind is None:
                    report.skip("unsupported", str(file))
                else:
                    found.append(Input(kind, file))
            inputs += _join(path, found) if join_folders and path.is_dir() else found
    if not inputs:
        raise no_documents(report)
    require_libraries(inputs)
    return inputs, report


def no_documents(report: SourcesReport) -> UsageError:
    """Return the error for paths that hold no documents, with what was skipped."""
    skipped = report.skipped_text()
    return UsageError(
        "There are no documents in the data paths"
        + (f"; skipped: {skipped}. " if skipped else ". ")
        + "Give UTF-8 text (.txt, .md, .rst, source code), .jsonl or .parquet with a text field, "
        "or a folder of such files."
    )


def _match(given: str) -> Iterator[tuple[Path, bool]]:
    """Yield the existing paths that a path or glob stands for, and whether each was named."""
    path = Path(given).expanduser()
    if os.path.exists(path):
        yield path, True
        return
    if not glob.has_magic(given):
        raise UsageError(f"The data path {given!r} does not exist. Check its spelling.")
    matches = sorted(Path(name) for name in glob.iglob(str(path), recursive=True))
    matches = [match for match in matches if "__pycache__" not in match.parts]
    if not matches:
        raise UsageError(f"The glob {given!r} matches nothing. Check it, and the folder it is in.")
    for match in matches:
        yield match, False


def _walk(path: Path, real: str) -> Iterator[tuple[Path, str, bool]]:
    """Yield a file or dataset folder itself, or all of them below a folder, sorted.

    Args:
        path: where to begin.
        real: its path with links resolved.

    Yields:
        The path, its path with links resolved, and whether it is a (dataset) folder.
    """
    if not os.path.isdir(path):
        yield path, real, False
        return
    try:
        with os.scandir(path) as listing:
            children = sorted(listing, key=lambda child: child.name)
    except OSError as error:
        raise UsageError(
            f"The folder {path} cannot be listed ({error.strerror}). Mend its permissions or name "
            "other paths."
        ) from error
    names = {child.name for child in children}
    if "dataset_dict.json" in names or {"state.json", "dataset_info.json"} <= names:
        yield path, real, True
        return
    for child in children:
        if child.name.startswith(".") or child.name == "__pycache__":
            continue
        inside = path / child.name
        if not child.is_symlink():
            # No look at the disk for a plain file: folders of code hold tens of thousands.
            real_inside = os.path.join(real, child.name)
            if child.is_dir():
                yield from _walk(inside, real_inside)
            else:
                yield inside, real_inside, False
        elif not child.is_dir():  # links to folders can lead in circles
            yield inside, os.path.realpath(inside), False


def _join(folder: Path, found: Iterable[Input]) -> list[Input]:
    """Join the text files of each immediate sub-folder, and the loose ones after them."""
    groups: dict[str, list[Path]] = {}
    others: list[Input] = []
    for one in found:
        if one.kind == "text":
            inside = one.path.relative_to(folder).parts[:-1]
            groups.setdefault(inside[0] if inside else "", []).append(one.path)
        else:
            others.append(one)
    names = sorted(groups, key=lambda name: (name == "", name))
    return [
        Input("joined", folder / name, tuple(groups[name]), root=folder) for name in names
    ] + others
