"""Token streams in shards: the files of datatrove's tokenizer, read, written and seen as one.

A shard is two files, little-endian:

- `NAME.ds`: the token ids of all its documents, one after another, 2 or 4 bytes each;
- `NAME.ds.index`: uint64, the end of each document in tokens.

They are what datatrove's `DocumentTokenizer` writes (datatrove itself is not needed), so either
tokenizes for `longgen pack`, and datatrove's tools read what `longgen tokenize` wrote.
"""

from __future__ import annotations

import json
import os
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from longgen.data.corpus import INFO_FILE, CorpusView, TokenizedCorpus
from longgen.errors import UsageError

SHARD_SUFFIX, INDEX_SUFFIX = ".ds", ".ds.index"
PLAN_FILE = "tokenize.json"  # of an unfinished `longgen tokenize`: settings and shards
SHARDS_FORMAT = 2  # of corpus.json; 1 is the single file of `tokenize_documents`


class ShardedTokens:
    """See the tokens of several files as one stream; files are mapped when first read.

    Args:
        paths: the files, in order.
        sizes: tokens in each.
        dtype: of the ids.
    """

    ndim = 1

    def __init__(self, paths: Sequence[Path], sizes: Sequence[int], dtype: np.dtype) -> None:
        self.paths = [Path(path) for path in paths]
        self.ends = np.cumsum(np.asarray(sizes, dtype=np.int64))
        self.dtype = np.dtype(dtype)
        self._maps: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getitem__(self, key: slice | np.ndarray) -> np.ndarray:
        """Return tokens of a range or at places, [n]; a range inside one file is a view."""
        if isinstance(key, slice):
            start, stop, step = key.indices(len(self))
            assert step == 1
            return self._range(start, stop)
        found = np.empty(len(key), dtype=self.dtype)
        shards = np.searchsorted(self.ends, key, side="right")
        for shard in np.unique(shards).tolist():
            inside = shards == shard
            found[inside] = self._map(shard)[key[inside] - self._start(shard)]
        return found

    def _range(self, start: int, stop: int) -> np.ndarray:
        parts = []
        while start < stop:
            shard = bisect_right(self.ends, start)
            end = min(stop, int(self.ends[shard]))
            before = self._start(shard)
            parts.append(self._map(shard)[start - before : end - before])
            start = end
        if not parts:
            return np.empty(0, dtype=self.dtype)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _start(self, shard: int) -> int:
        return int(self.ends[shard - 1]) if shard else 0

    def _map(self, shard: int) -> np.ndarray:
        if shard not in self._maps:
            self._maps[shard] = np.memmap(self.paths[shard], dtype=self.dtype, mode="r")
        return self._maps[shard]

    def __getstate__(self) -> dict[str, Any]:
        # Pickling a memory map would copy the whole file to every data-loading process.
        return {**self.__dict__, "_maps": {}}


class ShardedCorpus(CorpusView):
    """See all documents of a folder of shards; `info` is its `corpus.json`, or stands in for it."""

    def __init__(self, tokens: ShardedTokens, ends: np.ndarray, info: dict[str, Any]) -> None:
        starts = np.concatenate([[0], ends[:-1]]) if len(ends) else ends
        # A stream of several files answers what is asked of an array here: ranges and places.
        super().__init__(tokens, starts, ends)  # type: ignore[arg-type]
        self.info = info


def write_shard(folder: Path, name: str, tokens: Any, ends: np.ndarray) -> None:
    """Put a finished shard into place.

    Args:
        folder: where it goes.
        name: without a suffix.
        tokens: path of the file of token ids, which is moved.
        ends: end of each document in tokens, [documents].
    """
    index = folder / f"{name}{INDEX_SUFFIX}.tmp"
    index.write_bytes(np.asarray(ends, dtype="<u8").tobytes())
    os.replace(index, folder / f"{name}{INDEX_SUFFIX}")
    os.replace(tokens, folder / f"{name}{SHARD_SUFFIX}")


def is_tokenized(folder: str | Path) -> bool:
    """Whether a folder holds tokens: a corpus of LongGen, finished or not, or datatrove's files."""
    path = Path(folder)
    return path.is_dir() and (
        (path / INFO_FILE).is_file()
        or (path / PLAN_FILE).is_file()
        or next(path.glob(f"*{INDEX_SUFFIX}"), None) is not None
    )


def open_tokens(folder: str | Path) -> TokenizedCorpus | ShardedCorpus:
    """Open tokenized documents: of `longgen tokenize`, of `longgen extend`, or of datatrove.

    Of datatrove's files it is not known which tokenizer made them: their `info["tokenizer"]` is
    None.

    Raises:
        UsageError: there are none in the folder, they are damaged, or not all are there yet.
    """
    folder = Path(folder)
    try:
        info = json.loads((folder / INFO_FILE).read_text(encoding="utf-8"))
        shards = info["shards"] if info["format"] == SHARDS_FORMAT else None
    except (FileNotFoundError, NotADirectoryError):
        return _open_datatrove(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{folder / INFO_FILE} is damaged ({error}). Tokenize the data again."
        ) from error
    if shards is None:
        return TokenizedCorpus.open(folder)
    return _open(
        folder,
        [shard["name"] for shard in shards],
        np.dtype(info["dtype"]),
        info,
        [shard["tokens"] for shard in shards],
    )


def _open_datatrove(folder: Path) -> ShardedCorpus:
    names = sorted(path.name.removesuffix(INDEX_SUFFIX) for path in folder.glob(f"*{INDEX_SUFFIX}"))
    if (folder / PLAN_FILE).is_file():
        raise UsageError(
            f"{folder} is not tokenized to its end. Go on with `longgen tokenize --out {folder} "
            "--resume`."
        )
    if not names:
        raise UsageError(
            f"There are no tokenized documents in {folder}. Give a folder that `longgen tokenize` "
            "or datatrove's DocumentTokenizer wrote (its .ds files beside their .ds.index)."
        )
    # The files do not say how wide an id is, but their sizes do.
    size = tokens = 0
    for name in names:
        ends = _read_index(folder, name)
        tokens += int(ends[-1]) if len(ends) else 0
        size += _size(folder, name)
    if not tokens or size not in (2 * tokens, 4 * tokens):
        raise UsageError(
            f"The tokens in {folder} are damaged: its .ds files have {size:,} bytes for "
            f"{tokens:,} tokens, which is neither 2 nor 4 each. Tokenize the data again."
        )
    dtype = np.dtype("<u2" if size == 2 * tokens else "<u4")
    return _open(folder, names, dtype, {"tokenizer": None, "dtype": dtype.name})


def _open(
    folder: Path,
    names: Sequence[str],
    dtype: np.dtype,
    info: dict[str, Any],
    expected: Sequence[int] | None = None,
) -> ShardedCorpus:
    ends: list[np.ndarray] = []
    sizes: list[int] = []
    before = 0
    for number, name in enumerate(names):
        index = _read_index(folder, name)
        tokens = int(index[-1]) if len(index) else 0
        held = _size(folder, name) // dtype.itemsize
        if tokens != held or (expected is not None and tokens != expected[number]):
            raise UsageError(
                f"The shard {folder / name}{SHARD_SUFFIX} is damaged: it holds {held:,} tokens, "
                f"its index tells of {tokens:,}. Tokenize the data again."
            )
        ends.append(index + before)
        before += tokens
        sizes.append(tokens)
    paths = [folder / f"{name}{SHARD_SUFFIX}" for name in names]
    return ShardedCorpus(
        ShardedTokens(paths, sizes, dtype),
        np.concatenate(ends) if ends else np.empty(0, dtype=np.int64),
        info,
    )


def _read_index(folder: Path, name: str) -> np.ndarray:
    path = folder / f"{name}{INDEX_SUFFIX}"
    try:
        ends = np.fromfile(path, dtype="<u8").astype(np.int64)
    except OSError as error:
        raise UsageError(
            f"The index {path} cannot be read ({error.strerror}). Tokenize the data again."
        ) from error
    if len(ends) and (ends[0] < 0 or (np.diff(ends) < 0).any()):
        raise UsageError(f"The index {path} is damaged: its ends fall. Tokenize the data again.")
    return ends


def _size(folder: Path, name: str) -> int:
    path = folder / f"{name}{SHARD_SUFFIX}"
    try:
        return path.stat().st_size
    except OSError as error:
        raise UsageError(
            f"The shard {path} cannot be read ({error.strerror}), but its index is there. "
            "Tokenize the data again."
        ) from error
