"""Tokenizing in several processes: the same tokens however it is divided and interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import longgen
from longgen.data import read_documents, tokenize_documents
from longgen.data import tokenize as job
from longgen.data.readers import Document, Input, read, split_input
from longgen.data.shards import open_tokens
from longgen.data.tokenize import TokenizeSettings, read_plan, tokenize
from longgen.errors import UsageError

ROOT = Path(longgen.__file__).parents[1]


def quiet(line: str) -> None:
    """Print nothing."""


@pytest.fixture
def model(tmp_path: Path, tokenizer: Any) -> str:
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Return a folder of text files, lines of JSON, and things that are skipped."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(9):
        (folder / f"{i}.txt").write_text(f"The river of {i} runs past {'mills ' * i * 9}.\n")
    lines = [json.dumps({"text": f"line {i} " * (i % 7 + 1)}) for i in range(60)]
    lines.insert(20, '{"text": ""}')
    lines.insert(40, "not JSON")
    (folder / "lines.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "empty.txt").write_text(" ")
    (folder / "picture.png").write_bytes(b"\x89")
    return folder


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "_SMALLEST_SHARD", 200)
    monkeypatch.setattr(job, "_LARGEST_SHARD", 300)


def documents_of(corpus: Any) -> list[list[int]]:
    return [corpus.document(i).tolist() for i in range(len(corpus))]


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("workers", [1, 2])
def test_the_tokens_are_those_of_one_process(
    tmp_path: Path, texts: Path, model: str, tokenizer: Any, workers: int
) -> None:
    whole = tokenize_documents(read_documents([texts]), tokenizer, tmp_path / "whole")
    settings = TokenizeSettings(model=model, data=(str(texts),))
    corpus = tokenize(settings, tmp_path / "out", workers=workers, say=quiet)
    assert documents_of(corpus) == documents_of(whole)
    info = corpus.info
    assert len(info["shards"]) > 5
    assert info["sources"]["skipped"] == whole.info["sources"]["skipped"]
    assert info["sources"]["skipped"] == {"unsupported": 1, "empty": 2, "malformed": 1}
    for key in ("documents", "tokens", "characters", "dtype", "eos_token_id"):
        assert info[key] == whole.info[key]
    assert info["tokenizer"]["fingerprint"] == whole.info["tokenizer"]["fingerprint"]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    shards = [shard["name"] for shard in info["shards"]]
    assert names == {"corpus.json"} | {f"{n}{s}" for n in shards for s in (".ds", ".ds.index")}
    with pytest.raises(UsageError, match="tokenized to its end already"):
        tokenize(settings, tmp_path / "out", say=quiet)


@pytest.mark.usefixtures("small_shards")
def test_an_interrupted_job_is_resumed(
    tmp_path: Path, texts: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = TokenizeSettings(model=model, data=(str(texts),))
    whole = tokenize(settings, tmp_path / "whole", say=quiet)
    made: list[str] = []
    make = job._tokenize_shard

    def stopping(*args: Any) -> None:
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(args[3])
        make(*args)

    out = tmp_path / "out"
    lines: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(job, "_tokenize_shard", stopping)
        with pytest.raises(KeyboardInterrupt):
            tokenize(settings, out, say=lines.append)
    total = len(whole.info["shards"])
    assert lines == [f"3 of {total} shards are whole; --resume goes on with the others"]
    with pytest.raises(UsageError, match="not tokenized to its end"):
        open_tokens(out)
    with pytest.raises(UsageError, match="unfinished tokenization; add --resume"):
        tokenize(settings, out, say=quiet)
    # Half a shard, as a power cut leaves it.
    (out / "00003.ds").write_bytes(b"\0\0\0")
    again: list[str] = []
    monkeypatch.setattr(job, "_tokenize_shard", lambda *a: (again.append(a[3]), make(*a))[1])
    corpus = tokenize(settings, out, resume=True, say=quiet)
    assert documents_of(corpus) == documents_of(whole)
    assert corpus.info == whole.info
    assert not set(again) & set(made) and len(again) == total - 3


@pytest.mark.usefixtures("small_shards")
def test_what_changed_in_between_is_noticed(
    tmp_path: Path, texts: Path, model: str, monkeypatch: pytest.MonkeyPatch, tokenizer: Any
) -> None:
    settings = TokenizeSettings(model=model, data=(str(texts),), strict=True)
    out = tmp_path / "out"
    with pytest.raises(UsageError, match=r"empty\.txt.*strict"):
        tokenize(settings, out, say=quiet)
    plan = read_plan(out)
    assert plan is not None and (out / "00000.json").is_file()
    with pytest.raises(UsageError, match="strict was True and is now False"):
        tokenize(TokenizeSettings(model=model, data=(str(texts),)), out, resume=True, say=quiet)
    # The bad file may be mended: none of its shards is done.
    good = [line for line in (texts / "lines.jsonl").read_text().splitlines() if "line" in line]
    (texts / "lines.jsonl").write_text("\n".join(good) + "\n")
    (texts / "empty.txt").write_text("full")
    first = texts / "0.txt"
    kept = first.read_bytes()
    facts = first.stat()
    first.write_text("other")
    with pytest.raises(UsageError, match=r"0\.txt has changed since its shard 00000"):
        tokenize(settings, out, resume=True, say=quiet)
    first.write_bytes(kept)
    os.utime(first, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    vocabulary = json.loads((Path(model) / "tokenizer.json").read_text())
    words = vocabulary["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    other = tmp_path / "other"
    tokenizer.save_pretrained(other)
    (other / "tokenizer.json").write_text(json.dumps(vocabulary))
    moved = TokenizeSettings(model=str(other), data=(str(texts),), strict=True)
    with pytest.raises(UsageError, match="which gives other ids"):
        tokenize(moved, out, resume=True, say=quiet)
    assert len(tokenize(settings, out, resume=True, say=quiet)) == 9 + 60 + 1


def test_errors_of_workers_arrive_and_stop_the_others(
    tmp_path: Path, texts: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "_SMALLEST_SHARD", 200)
    monkeypatch.setattr(job, "_LARGEST_SHARD", 300)
    settings = TokenizeSettings(model=model, data=(str(texts),), strict=True)
    with pytest.raises(UsageError, match=r"(lines\.jsonl|empty\.txt).*strict"):
        tokenize(settings, tmp_path / "out", workers=2, say=quiet)
    with pytest.raises(UsageError, match="number of workers is 0"):
        tokenize(settings, tmp_path / "new", workers=0, say=quiet)


def test_nothing_to_tokenize_leaves_nothing(tmp_path: Path, model: str) -> None:
    (tmp_path / "empty.txt").write_text("")
    settings = TokenizeSettings(model=model, data=(str(tmp_path / "empty.txt"),))
    with pytest.raises(UsageError, match="no documents in the data paths; skipped: 1 empty"):
        tokenize(settings, tmp_path / "out", say=quiet)
    assert not any((tmp_path / "out").iterdir())


def test_a_killed_job_takes_its_workers_along_and_is_resumed(
    tmp_path: Path, texts: Path, model: str
) -> None:
    for i in range(16):
        (texts / f"more{i}.txt").write_text("The river runs past the mill.\n" * 20_000)
    program = (
        "import sys, longgen.data.tokenize as job\n"
        "job._SMALLEST_SHARD = job._LARGEST_SHARD = 600_000\n"
        "if __name__ == '__main__':\n"
        "    settings = job.TokenizeSettings(model=sys.argv[1], data=(sys.argv[2],))\n"
        "    job.tokenize(settings, sys.argv[3], workers=2, resume=len(sys.argv) > 4)\n"
    )
    script, out = tmp_path / "script.py", tmp_path / "out"
    script.write_text(program)
    command = [sys.executable, str(script), model, str(texts), str(out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True
    )
    try:
        until = time.monotonic() + 120
        while not (out / "00001.json").is_file() and time.monotonic() < until:
            time.sleep(0.05)
        assert process.poll() is None, "it ended before it could be killed"
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        while _alive(process.pid) and time.monotonic() < until:
            time.sleep(0.1)
        assert not _alive(process.pid)
    finally:
        if process.poll() is None:
            process.kill()
    assert not (out / "corpus.json").exists()
    settings = TokenizeSettings(model=model, data=(str(texts),))
    corpus = tokenize(settings, out, resume=True, say=quiet)
    assert len(corpus) == 9 + 60 + 16


def _alive(session: int) -> list[str]:
    """Name the processes of a session that still run."""
    alive = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[3] == str(session) and fields[0] != "Z":
            alive.append((folder / "cmdline").read_text().replace("\0", " "))
    return alive


@pytest.mark.parametrize("target", [1, 7, 100, 350, 10_000])
def test_parts_of_a_file_read_what_the_file_holds(texts: Path, target: int, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    datasets = pytest.importorskip("datasets")
    rows = {"text": [f"row {i}" for i in range(50)]}
    parquet.write_table(pyarrow.table(rows), tmp_path / "rows.parquet", row_group_size=7)
    datasets.Dataset.from_dict(rows).save_to_disk(str(tmp_path / "rows"))
    crlf = tmp_path / "crlf.jsonl"
    crlf.write_bytes(b'\r\n{"text": "one"}\r\n\n{"text": "two"}')
    for one in (
        Input("jsonl", texts / "lines.jsonl"),
        Input("jsonl", crlf),
        Input("parquet", tmp_path / "rows.parquet"),
        Input("dataset", tmp_path / "rows"),
    ):
        parts = [part for part, _ in split_input(one, target)]
        found = [item for part in parts for item in read(part, "text")]
        whole = list(read(one, "text"))
        assert [type(item) for item in found] == [type(item) for item in whole]
        assert [item.text for item in found if isinstance(item, Document)] == [
            item.text for item in whole if isinstance(item, Document)
        ]
        assert len(parts) > 1 or target > 30


def test_the_job_says_how_far_it_is(
    tmp_path: Path, texts: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "_SMALLEST_SHARD", 200)
    monkeypatch.setattr(job, "_LARGEST_SHARD", 300)
    monkeypatch.setattr(job, "_SECONDS_BETWEEN_LINES", 0)
    lines: list[str] = []
    tokenize(TokenizeSettings(model=model, data=(str(texts),)), tmp_path / "o", say=lines.append)
    done = [int(line.split()[1]) for line in lines if line.startswith("tokenizing: ")]
    assert done == sorted(done) and done[0] == 0 and len(set(done)) > 5
    assert "min left" in lines[-1] and "tokens/s" in lines[0]


def test_marks_are_as_asked_for(tmp_path: Path, model: str) -> None:
    (tmp_path / "a.txt").write_text("a")
    data = (str(tmp_path / "a.txt"),)
    for number, (bos, eos, ends) in enumerate(
        ((None, None, (False, True)), (True, False, (True, False)))
    ):
        settings = TokenizeSettings(model=model, data=data, add_bos=bos, add_eos=eos)
        ids = tokenize(settings, tmp_path / f"o{number}", say=quiet).document(0)
        assert (ids[0] == 0, ids[-1] == 1) == ends
        assert isinstance(ids, np.ndarray)
