"""Tokenize text of any size into shards on disk: in several processes, resumable shard by shard.

While it runs, the folder holds `tokenize.json` (settings, and which inputs each shard is made of)
and for each finished shard `NAME.ds`, `NAME.ds.index` and `NAME.json`, the last of which is written
last. At the end `corpus.json` takes the place of all the JSON. The documents and their order follow
from the settings alone: not from the number of processes, and not from where it was interrupted.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from longgen.checkpoint import check_output, load_tokenizer, write_json
from longgen.data.corpus import INFO_FILE
from longgen.data.readers import Input, split_input
from longgen.data.shards import (
    PLAN_FILE,
    SHARD_SUFFIX,
    SHARDS_FORMAT,
    ShardedCorpus,
    open_tokens,
    write_shard,
)
from longgen.data.sources import Documents, SourcesReport, find_inputs, no_documents
from longgen.data.tokenized import Encoder, identity
from longgen.data.workers import Tally, run_in_workers
from longgen.errors import UsageError

Say = Callable[[str], None]

# A shard is what an interruption can cost, and what one process works on.
_SMALLEST_SHARD, _LARGEST_SHARD = 4 << 20, 64 << 20  # bytes of input
_SHARDS_PER_WORKER = 8
_SECONDS_BETWEEN_LINES = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizeSettings:
    """Hold what decides the tokens.

    Attributes:
        model: folder of the checkpoint or tokenizer.
        data: files, folders and globs.
        join_folders, text_field, strict: as `read_documents` takes them.
        add_bos, add_eos: as `tokenize_documents` takes them.
    """

    model: str
    data: tuple[str, ...]
    join_folders: bool = False
    text_field: str = "text"
    strict: bool = False
    add_bos: bool | None = None
    add_eos: bool | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, with paths that hold in any working folder."""
        data = [os.path.abspath(os.path.expanduser(path)) for path in self.data]
        return {**asdict(self), "model": os.path.abspath(self.model), "data": data}


def share_tokens(made: str | Path, out: str | Path) -> None:
    """Give the finished tokens in `made` a second folder, which takes no room where the file system
    has hard links. It appears whole or not at all.

    Raises:
        UsageError: `out` holds something.
    """
    check_output(out)
    folder = Path(out)
    draft = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(draft, ignore_errors=True)
    shutil.copytree(made, draft, copy_function=_link)
    if folder.is_dir():
        folder.rmdir()  # empty, as was checked
    draft.rename(folder)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without them
        shutil.copy2(source, target)


def read_plan(out: str | Path) -> dict[str, Any] | None:
    """Return the plan of an unfinished tokenization, None if there is none.

    Raises:
        UsageError: it is damaged.
    """
    path = Path(out) / PLAN_FILE
    try:
        plan = json.loads(path.read_text(encoding="utf-8"))
        TokenizeSettings(**plan["settings"])
        if plan["format"] != SHARDS_FORMAT:
            raise ValueError(f"format {plan['format']}, this version reads {SHARDS_FORMAT}")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is damaged ({error}). Give another --out.") from None
    return dict(plan)


def check_tokenize_output(out: str | Path, *, resume: bool) -> None:
    """Check that tokenizing can begin in `out`, or go on there.

    Raises:
        UsageError: it holds something else, a finished corpus, or an unfinished one that was not
            asked for.
    """
    if (Path(out) / INFO_FILE).is_file():
        raise UsageError(f"{out} is tokenized to its end already; give another --out.")
    plan = read_plan(out)
    if plan is None and resume:
        raise UsageError(f"There is nothing to resume in {out}; leave --resume out.")
    if plan is None:
        check_output(out)
    elif not resume:
        raise UsageError(
            f"{out} holds an unfinished tokenization; add --resume to go on with it, or give "
            "another --out."
        )


def tokenize(
    settings: TokenizeSettings,
    out: str | Path,
    *,
    workers: int = 1,
    resume: bool = False,
    say: Say = print,
) -> ShardedCorpus:
    """Tokenize files into a folder of shards.

    Ctrl-C, an error or a crash costs the shards in hand; `resume` goes on with the others.

    Args:
        settings: what to tokenize and how.
        out: the folder, new or empty.
        workers: processes that work at the same time.
        resume: go on with what is in `out`.
        say: prints one line of progress.

    Raises:
        UsageError: for anything that the user can put right.
    """
    folder = Path(out)
    if workers < 1:
        raise UsageError(f"The number of workers is {workers}; give at least 1.")
    check_tokenize_output(folder, resume=resume)
    tokenizer = load_tokenizer(settings.model)
    encoder = Encoder.of(tokenizer, add_bos=settings.add_bos, add_eos=settings.add_eos)
    made_by = identity(tokenizer)
    plan = read_plan(folder)
    if plan is None:
        plan = _make_plan(settings, workers) | {"tokenizer": made_by, **encoder.facts()}
        write_json(folder / PLAN_FILE, plan)
    else:
        _check_same(plan, settings, made_by, encoder, folder)
    shards = plan["shards"]
    done = [(folder / f"{shard['name']}.json").is_file() for shard in shards]
    if any(done):
        _check_unchanged([shard for shard, whole in zip(shards, done, strict=True) if whole])
        say(f"{sum(done):,} of {len(shards):,} shards are there already")
    todo = [shard for shard, whole in zip(shards, done, strict=True) if not whole]
    arguments = [
        (str(folder), shard["name"], _inputs(shard), settings.text_field, settings.strict)
        for shard in todo
    ]
    report = _Reporter(say, [shard["bytes"] for shard in todo], len(shards))
    try:
        run_in_workers(_tokenize_shard, arguments, encoder, workers, report)
    except BaseException:
        whole = sum((folder / f"{shard['name']}.json").is_file() for shard in shards)
        say(f"{whole:,} of {len(shards):,} shards are whole; --resume goes on with the others")
        raise
    return _finish(folder, plan)


def _make_plan(settings: TokenizeSettings, workers: int) -> dict[str, Any]:
    """Divide the inputs among shards of about equal size, in order."""
    inputs, found = find_inputs(settings.to_dict()["data"], join_folders=settings.join_folders)
    whole = [split_input(one, 1 << 62)[0] for one in inputs]
    total = sum(size for _, size in whole)
    target = min(max(total // (_SHARDS_PER_WORKER * workers), _SMALLEST_SHARD), _LARGEST_SHARD)
    shards: list[dict[str, Any]] = []
    left = 0
    for one, _ in whole:
        for part, size in split_input(one, target):
            if left < size // 2 or not shards:
                shards.append({"name": f"{len(shards):05d}", "bytes": 0, "inputs": []})
                left = target
            shards[-1]["inputs"].append(_to_json(part))
            shards[-1]["bytes"] += size
            left -= size
    return {
        "format": SHARDS_FORMAT,
        "settings": settings.to_dict(),
        "found": found.to_dict(),
        "shards": shards,
    }


def _to_json(one: Input) -> dict[str, Any]:
    return {
        "kind": one.kind,
        "path": str(one.path),
        "members": [str(path) for path in one.members],
        "root": str(one.root),
        "part": one.part,
        "stamp": _stamp(one),
    }


def _inputs(shard: dict[str, Any]) -> list[Input]:
    return [
        Input(
            one["kind"],
            Path(one["path"]),
            tuple(Path(path) for path in one["members"]),
            Path(one["root"]),
            tuple(one["part"]) if one["part"] else None,
        )
        for one in shard["inputs"]
    ]


def _stamp(one: Input) -> list[int]:
    """Return size and time of an input, which change with it."""
    files: Sequence[Path] = one.members or (one.path,)
    if one.kind == "dataset":
        files = sorted(one.path.rglob("*.arrow"))
    try:
        facts = [path.stat() for path in files]
    except OSError:  # reading it will say what is wrong
        return [0, 0]
    return [sum(f.st_size for f in facts), max((f.st_mtime_ns for f in facts), default=0)]


def _check_same(
    plan: dict[str, Any],
    settings: TokenizeSettings,
    made_by: dict[str, Any],
    encoder: Encoder,
    folder: Path,
) -> None:
    """Refuse to go on with other settings or another tokenizer."""
    mine, earlier = settings.to_dict(), plan["settings"]
    changed = [
        f"{name} was {earlier.get(name)!r} and is now {value!r}"
        for name, value in mine.items()
        if name != "model" and earlier.get(name) != value
    ]
    if plan["tokenizer"]["fingerprint"] != made_by["fingerprint"]:
        changed.append(
            f"the tokenizer was {plan['tokenizer']['name']!r} and is now {made_by['name']!r}, "
            "which gives other ids"
        )
    if not changed and any(plan[name] != value for name, value in encoder.facts().items()):
        changed.append("the marks around documents are others")
    if changed:
        raise UsageError(
            f"Tokenizing into {folder} was begun with other settings ({'; '.join(changed)}). Go "
            "on with the same ones, or give another --out."
        )


def _check_unchanged(shards: list[dict[str, Any]]) -> None:
    for shard in shards:
        for fields, one in zip(shard["inputs"], _inputs(shard), strict=True):
            if _stamp(one) != fields["stamp"]:
                raise UsageError(
                    f"{one.path} has changed since its shard {shard['name']} was made, so the "
                    "shards would not fit together. Tokenize anew into another --out."
                )


def _tokenize_shard(
    encoder: Encoder,
    tally: Tally,
    folder: str,
    name: str,
    inputs: list[Input],
    text_field: str,
    strict: bool,
) -> None:
    """Make one shard; its JSON is written last. Runs in a worker."""
    documents = Documents(
        inputs, SourcesReport(), strict=strict, text_field=text_field, allow_none=True
    )
    texts, ids = hashlib.sha256(), hashlib.sha256()
    ends: list[np.ndarray] = [np.empty(0, dtype=np.int64)]
    tokens = characters = 0
    place = Path(folder)
    temporary = place / f"{name}{SHARD_SUFFIX}.tmp"
    try:
        with temporary.open("wb") as file:
            for batch in encoder.encode(documents, texts):
                data = batch.tokens.tobytes()
                file.write(data)
                ids.update(data)
                ends.append(np.asarray(batch.ends, dtype=np.int64) + tokens)
                tokens += len(batch.tokens)
                characters += batch.characters
                tally.add(len(batch.ends), batch.characters, len(batch.tokens))
            file.flush()
            os.fsync(file.fileno())
        all_ends = np.concatenate(ends)
        write_shard(place, name, temporary, all_ends)
        facts = {
            "name": name,
            "documents": len(all_ends),
            "tokens": tokens,
            "characters": characters,
            "input_sha256": texts.hexdigest(),
            "tokens_sha256": ids.hexdigest(),
        }
        write_json(place / f"{name}.json", {"shard": facts, "sources": documents.report.to_dict()})
    finally:
        temporary.unlink(missing_ok=True)


def _finish(folder: Path, plan: dict[str, Any]) -> ShardedCorpus:
    """Write corpus.json of the shards, and remove what was needed to resume."""
    report = SourcesReport(**plan["found"])
    shards = []
    files = [folder / f"{shard['name']}.json" for shard in plan["shards"]]
    for path in files:
        facts = json.loads(path.read_text(encoding="utf-8"))
        report.add(SourcesReport(**facts["sources"]))
        shards.append(facts["shard"])
    if not sum(shard["documents"] for shard in shards):
        for path in folder.iterdir():
            if path.name == PLAN_FILE or path.name.split(".")[0] in {s["name"] for s in shards}:
                path.unlink()
        raise no_documents(report)
    digest = hashlib.sha256("".join(shard["tokens_sha256"] for shard in shards).encode())
    info = {
        "format": SHARDS_FORMAT,
        **{name: plan[name] for name in ("tokenizer", "bos_token_id", "eos_token_id", "dtype")},
        **{
            name: sum(shard[name] for shard in shards)
            for name in ("documents", "tokens", "characters")
        },
        "sha256": digest.hexdigest(),
        "settings": plan["settings"],
        "sources": report.to_dict(),
        "shards": shards,
    }
    write_json(folder / INFO_FILE, info)
    for path in (*files, folder / PLAN_FILE):
        path.unlink()
    corpus = open_tokens(folder)
    assert isinstance(corpus, ShardedCorpus)
    return corpus


class _Reporter:
    """Say from time to time how far it is, and about how long it still takes."""

    def __init__(self, say: Say, sizes: list[int], total: int) -> None:
        self._say = say
        self._sizes = sizes
        self._total = total
        self._began = self._last = time.monotonic()

    def __call__(self, finished: Sequence[int], tally: Tally) -> None:
        now = time.monotonic()
        if now - self._last < _SECONDS_BETWEEN_LINES:
            return
        self._last = now
        documents, _, tokens = tally.read()
        done = self._total - len(self._sizes) + len(finished)
        seconds = now - self._began
        line = (
            f"tokenizing: {done:,} of {self._total:,} shards, {documents:,} documents, "
            f"{tokens:,} tokens, {tokens / seconds:,.0f} tokens/s"
        )
        part = sum(self._sizes[i] for i in finished) / max(sum(self._sizes), 1)
        if part:
            line += f", about {seconds * (1 - part) / part / 60:,.1f} min left"
        self._say(line)
