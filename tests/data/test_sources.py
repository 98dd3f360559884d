"""Finding and reading documents: every kind of input, in order, and what bad input gets."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from longgen.data import Documents, read_documents
from longgen.errors import UsageError


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def texts(documents: Documents) -> list[str]:
    return [document.text for document in documents]


def test_folder_is_walked_in_sorted_order_without_hidden_names(tmp_path: Path) -> None:
    for name in ("b/z.py", "b/a.md", "a.txt", "c.rst", "B.TXT"):
        write(tmp_path / name, name)
    for name in (".git/x.py", "b/__pycache__/y.py", ".hidden.txt"):
        write(tmp_path / name, "not to be seen")
    (tmp_path / "b" / "loop").symlink_to(tmp_path)
    documents = read_documents([tmp_path])
    assert texts(documents) == ["B.TXT", "a.txt", "b/a.md", "b/z.py", "c.rst"]
    assert [Path(d.source).name for d in documents][:2] == ["B.TXT", "a.txt"]
    report = documents.report
    assert (report.files, report.documents, report.characters) == (5, 5, 5 + 5 + 6 + 6 + 5)
    assert report.skipped == {}


def test_paths_keep_their_order_and_a_file_met_twice_is_read_once(tmp_path: Path) -> None:
    first, second = write(tmp_path / "1.txt", "one"), write(tmp_path / "2.txt", "two")
    link = tmp_path / "3.txt"
    link.symlink_to(first)
    given = [second, str(tmp_path / "*.txt"), tmp_path, first, link]
    assert texts(read_documents(given)) == ["two", "one"]


def test_globs(tmp_path: Path) -> None:
    for name in ("a/x.py", "a/b/y.py", "a/b/z.md", "a/b/__pycache__/w.py", "a/pic.png"):
        write(tmp_path / name, name)
    assert texts(read_documents([f"{tmp_path}/**/*.py"])) == ["a/b/y.py", "a/x.py"]
    everything = read_documents([f"{tmp_path}/a/*"])
    assert texts(everything) == ["a/b/y.py", "a/b/z.md", "a/x.py"]
    assert everything.report.skipped == {"unsupported": 1}
    literal = write(tmp_path / "data[1].txt", "brackets")
    assert texts(read_documents([literal])) == ["brackets"]


def test_text_is_taken_as_it_is_but_for_a_byte_order_mark(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"\xef\xbb\xbfcaf\xc3\xa9\r\n  end")
    assert texts(read_documents([path])) == ["caf\u00e9\r\n  end"]


BAD_FILES = [
    (b"", "empty", "offset 0"),
    (b" \n\t\n", "empty", "offset 4"),
    (b"abc\0def", "binary", "NUL byte at offset 3"),
    (b"abcd\xff", "not UTF-8", "byte 0xff at offset 4"),
    (b"\xef\xbb\xbfab\xe2\x82", "not UTF-8", "byte 0xe2 at offset 5"),
]


@pytest.mark.parametrize(("content", "reason", "where"), BAD_FILES)
def test_bad_files_are_counted_or_refused(
    tmp_path: Path, content: bytes, reason: str, where: str
) -> None:
    write(tmp_path / "good.txt", "good")
    bad = write(tmp_path / "bad.py", content)
    documents = read_documents([tmp_path])
    assert texts(documents) == ["good"]
    assert documents.report.skipped == {reason: 1}
    assert str(bad) in documents.report.examples[reason][0]
    assert str(bad) in documents.report.skipped_text()
    with pytest.raises(UsageError) as error:
        texts(read_documents([tmp_path], strict=True))
    assert str(bad) in str(error.value)
    assert where in str(error.value)


def test_report_names_only_the_first_few(tmp_path: Path) -> None:
    write(tmp_path / "good.txt", "good")
    for i in range(9):
        write(tmp_path / f"bad{i}.txt", "")
    documents = read_documents([tmp_path])
    for _ in range(2):  # each pass counts anew
        texts(documents)
        assert documents.report.skipped == {"empty": 9}
        assert len(documents.report.examples["empty"]) == 5


BAD_LINES = [
    (b'{"text": "cut', "malformed", "not JSON"),
    (b"[1, 2]", "malformed", "not a JSON object"),
    (b'{"other": "x"}', "malformed", "no field 'text' among 'other'"),
    (b'{"text": 7}', "malformed", "holds a int"),
    (b'{"text": null}', "empty", "null"),
    (b'{"text": " "}', "empty", "empty"),
    (b'{"text": "a\xff"}', "not UTF-8", "byte 0xff at offset 29"),
    (b'{"text": "a\\ud800"}', "not UTF-8", "surrogate pair at character 1"),
    (b'{"text": "ab\\u0000"}', "binary", "NUL at character 2"),
]


@pytest.mark.parametrize(("line", "reason", "detail"), BAD_LINES)
def test_bad_json_lines_are_counted_or_refused(
    tmp_path: Path, line: bytes, reason: str, detail: str
) -> None:
    good = [b'{"text": "first"}', b'{"text": "\\u4f60", "id": 3}']
    path = write(tmp_path / "rows.jsonl", b"\n".join([good[0], line, b"", good[1], b""]))
    documents = read_documents([path])
    assert texts(documents) == ["first", "\u4f60"]
    assert [d.source for d in documents] == [f"{path}:1", f"{path}:4"]
    assert documents.report.skipped == {reason: 1}
    assert (documents.report.files, documents.report.documents) == (1, 2)
    with pytest.raises(UsageError) as error:
        texts(read_documents([path], strict=True))
    assert f"{path}:2: " in str(error.value)
    assert detail in str(error.value)


def test_text_field_can_be_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", json.dumps({"body": "B", "text": "T"}))
    assert texts(read_documents([path], text_field="body")) == ["B"]


def test_parquet(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [f"row {i}" for i in range(600)]  # more than one batch
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"id": [0] * 601, "text": [*rows, None]}), path)
    other = tmp_path / "b.parquet"
    parquet.write_table(pa.table({"id": [1], "body": ["x"]}), other)
    broken = write(tmp_path / "c.parquet", b"PAR1 nothing")
    documents = read_documents([tmp_path])
    assert texts(documents) == rows
    assert documents.report.skipped == {"empty": 1, "malformed": 2}
    for bad, detail in (
        (path, "row 600: the text is null"),
        (other, "no column 'text' among 'id', 'body'"),
        (broken, "not readable as Parquet"),
    ):
        with pytest.raises(UsageError) as error:
            texts(read_documents([bad], strict=True))
        assert str(bad) in str(error.value)
        assert detail in str(error.value)


def test_dataset_folder(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": ["one", "two"], "n": [1, 2]})
    rows.save_to_disk(tmp_path / "d" / "plain")
    splits = datasets.DatasetDict({"test": rows.select([0]), "train": rows.select([1])})
    splits.save_to_disk(tmp_path / "d" / "splits")
    write(tmp_path / "d" / "a.txt", "loose")
    assert texts(read_documents([tmp_path / "d"])) == ["loose", "one", "two", "two"]
    assert texts(read_documents([tmp_path / "d" / "splits" / "test"])) == ["one"]
    datasets.DatasetDict({"dev": rows}).save_to_disk(tmp_path / "dev")
    with pytest.raises(UsageError, match=r"no split 'train' among 'dev'"):
        texts(read_documents([tmp_path / "dev"]))
    with pytest.raises(UsageError, match=r"no column 'body' among 'text', 'n'"):
        texts(read_documents([tmp_path / "d" / "plain"], text_field="body", strict=True))


@pytest.mark.parametrize("library", ["pyarrow", "datasets"])
def test_missing_library_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == library]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)  # importing it now fails
    write(tmp_path / "a.parquet", "x")
    for name in ("state.json", "dataset_info.json"):
        write(tmp_path / "set" / name, "{}")
    given = tmp_path / ("a.parquet" if library == "pyarrow" else "set")
    with pytest.raises(UsageError, match=rf"needs the library '{library}'.*longgen\[data\]"):
        read_documents([given])


def test_join_folders_makes_one_document_of_each_tree(tmp_path: Path) -> None:
    root = tmp_path / "repos"
    write(root / "beta" / "b.py", "b\n")
    write(root / "beta" / "a" / "deep.py", "deep")
    write(root / "beta" / "bad.py", b"\0")
    write(root / "alpha" / "x.md", "x\n")
    write(root / "zz.txt", "loose z")
    write(root / "aa.txt", "loose a")
    write(root / "rows.jsonl", '{"text": "row"}')
    single = write(tmp_path / "single.txt", "single")
    documents = read_documents([single, root], join_folders=True)
    assert texts(documents) == [
        "single",
        "# File: alpha/x.md\nx\n\n",
        "# File: beta/a/deep.py\ndeep\n\n# File: beta/b.py\nb\n\n",
        "# File: aa.txt\nloose a\n\n# File: zz.txt\nloose z\n\n",
        "row",
    ]
    assert documents.report.skipped == {"binary": 1}
    assert [d.source for d in documents][1:4] == [str(root / n) for n in ("alpha", "beta", "")]
    with pytest.raises(UsageError, match=r"bad\.py: binary data, a NUL byte at offset 0"):
        texts(read_documents([root], join_folders=True, strict=True))


def test_reading_is_lazy(tmp_path: Path) -> None:
    write(tmp_path / "1.txt", "one")
    second = write(tmp_path / "2.txt", "two")
    documents = iter(read_documents([tmp_path]))
    assert next(documents).text == "one"
    second.write_text("changed after the first was read")
    assert next(documents).text.startswith("changed")


def test_unreadable_files_are_counted_or_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "a")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    documents = read_documents([tmp_path])
    assert texts(documents) == ["a"]
    assert documents.report.skipped == {"unreadable": 1}
    with pytest.raises(UsageError, match=r"gone\.txt: No such file"):
        texts(read_documents([tmp_path], strict=True))


def refused(tmp_path: Path) -> list[tuple[list[Any], str]]:
    write(tmp_path / "pics" / "a.png", b"\x89PNG")
    write(tmp_path / "pics" / "b.jpg", b"\xff\xd8")
    write(tmp_path / "a.txt", "a")
    (tmp_path / "nothing").mkdir()
    return [
        ([], "No data paths"),
        ([tmp_path / "a.txt", tmp_path / "missing.txt"], "missing.txt' does not exist"),
        ([f"{tmp_path}/*.rst"], r"\*.rst' matches nothing"),
        ([tmp_path / "pics" / "a.png"], r"a.png is of a kind that cannot be read \(.png\)"),
        ([tmp_path / "pics"], r"no documents in the data paths; skipped: 2 unsupported"),
        ([f"{tmp_path}/pics/*"], "no documents in the data paths; skipped: 2 unsupported"),
        ([tmp_path / "nothing"], r"no documents in the data paths\. Give"),
    ]


@pytest.mark.parametrize("case", range(7))
def test_paths_that_are_always_refused(tmp_path: Path, case: int) -> None:
    given, sentence = refused(tmp_path)[case]
    with pytest.raises(UsageError, match=sentence):
        read_documents(given)


def test_all_documents_skipped_is_refused_at_the_end(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "")
    write(tmp_path / "b.jsonl", "\n\n")
    documents = read_documents([tmp_path])
    with pytest.raises(UsageError, match=r"no documents in the data paths; skipped: 2 empty"):
        texts(documents)
