import base64
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from longgen.errors import UsageError
from longgen.evaluate.report import (
    Bullets,
    Code,
    Picture,
    Section,
    Table,
    comparison_table,
    write_report,
)
from longgen.evaluate.results import Rows

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR4nGNgYGBgAAAABQABh6FO1AAAAABJRU5ErkJggg=="
)
EVIL = "<script>alert('a & b')</script>"


class Page(HTMLParser):
    """Read a page: its text, its tags, every address in it; insist that tags close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        self.texts += [value or "" for name, value in attrs if name == "alt"]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append(data)


def write(tmp_path: Path, word: str) -> tuple[str, str]:
    picture = tmp_path / "figures" / "a b.png"
    picture.parent.mkdir(exist_ok=True)
    picture.write_bytes(PNG)
    table = Table(["case", word], [[word, 1.5], [Code(f"{word}|`"), "x|y"]], caption=f"Of {word}")
    markdown, page = write_report(
        tmp_path,
        title=f"Report {word}",
        summary_rows=[("Card", word), ("Command", Code(f"longgen {word}"))],
        sections=[Section(f"Part {word}", [f"Said {word}.", Code(f"SSFF\n{word}"), table])],
        figures=[Picture(picture, f"Seen {word}")],
        notes=[f"Mind {word}", "# no heading", "2. no list", "a _b_ *c* [d](e) snake_case"],
    )
    return markdown.read_text(), page.read_text()


def test_markup_in_any_text_is_escaped(tmp_path: Path) -> None:
    markdown, page = write(tmp_path, EVIL)
    assert "<script" not in page
    found = Page(page)
    assert "script" not in found.tags
    places = ("Report ", "longgen ", "Part ", "Said ", "SSFF\n", "Of ", "Seen ", "Mind ", "")
    for before in places:
        assert any(text.startswith(before + EVIL) for text in found.texts), before
    # In Markdown, code shows markup as it is; everywhere else it is escaped.
    outside = re.sub(r"```.*?```|(`+)[^\n]*?[^`]\1(?!`)", "", markdown, flags=re.DOTALL)
    assert "<script" not in outside
    assert outside.count("&lt;script>alert('a &amp; b')&lt;/script>") == 10


def test_page_needs_nothing_else(tmp_path: Path) -> None:
    _, page = write(tmp_path, "plain")
    found = Page(page)
    assert found.sources == [f"data:image/png;base64,{base64.b64encode(PNG).decode()}"]
    assert "url(" not in page and "@import" not in page and "http:" not in page
    assert not {"script", "link", "iframe"} & set(found.tags)
    assert 'name="viewport"' in page


def test_both_files_say_the_same(tmp_path: Path) -> None:
    markdown, page = write(tmp_path, "plain")
    plain = re.sub(r"\\(.)", r"\1", markdown)
    position = 0
    for text in Page(page).texts[2:]:  # after the title in the head and the style sheet
        found = plain.find(text, position)
        assert found >= 0, text
        position = found
    assert "![Seen plain](<figures/a b.png>)" in markdown
    assert r"a \_b\_ \*c\* \[d\](e) snake_case" in markdown
    assert "- \\# no heading" in markdown and "- 2\\. no list" in markdown


def test_markdown_tables_keep_their_columns(tmp_path: Path) -> None:
    markdown, _ = write(tmp_path, "plain")
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 3 for line in lines)
    assert [line for line in lines if "--" in line] == ["|---|---|", "|---|---:|"]
    assert "| ``  plain\\|`  `` | x\\|y |".replace("  ", " ") in lines


def test_unequal_rows_are_a_bug_not_a_page(tmp_path: Path) -> None:
    section = Section("a", [Table(["x", "y"], [["only one"]]), Bullets(["z"])])
    with pytest.raises(ValueError, match="zip"):
        write_report(tmp_path, title="t", summary_rows=[], sections=[section])
    assert not (tmp_path / "report.html").exists() and not (tmp_path / "report.md").exists()


def test_pictures_must_exist_and_be_pictures(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"gone\.png does not exist"):
        write_report(
            tmp_path, title="t", summary_rows=[], figures=[Picture(tmp_path / "gone.png", "c")]
        )
    with pytest.raises(UsageError, match=r"not .*a\.txt"):
        section = Section("s", [Picture(tmp_path / "a.txt", "c")])
        write_report(tmp_path, title="t", summary_rows=[], sections=[section])
    assert not list(tmp_path.iterdir())


def test_comparison_sets_models_side_by_side() -> None:
    def row(case: str, length: int, value: float | None, **more: object) -> dict[str, object]:
        return {"case": case, "length": length, "value": value, **more}

    rows: Rows = [
        row("needle.hybrid", 8192, 0.95, n=110, interval=[0.8919, 0.9782]),
        row("needle.original", 8192, 1.0, n=110, interval=[0.9663, 1.0]),
        row("needle.hybrid", 16384, 0.9, n=110, interval=[0.83, 0.94]),
        row("kv_bytes.hybrid", 8192, 3 * 2**20),
        row("kv_bytes.original", 8192, None, error="Out of memory."),
        row("decode.hybrid", 8192, 12.34),
        row("loss.other", 8192, 2.34567),
    ]
    table = comparison_table(rows, labels={"original": "before", "hybrid": "after"})
    assert list(table.header) == ["", "before", "after", "other"]
    assert table.rows == [
        ["Needle accuracy at 8K, n = 110", "1.000 (0.97 to 1.00)", "0.950 (0.89 to 0.98)", "-"],
        ["Needle accuracy at 16K, n = 110", "-", "0.900 (0.83 to 0.94)", "-"],
        ["Loss (nats per token) at 8K", "-", "-", "2.346"],
        ["Key/value cache at 8K", "not measured", "3.00 MiB", "-"],
        ["Decode per token at 8K", "-", "12.3 ms", "-"],
    ]
    assert "Wilson" in table.caption

    table = comparison_table(rows, metrics=["decode"])
    assert table.rows == [["Decode per token at 8K", "12.3 ms"]] and not table.caption

    for case, runtime in (("original", "transformers"), ("hybrid", "longgen.engine")):
        rows = [*rows, row(f"decode.{case}", 4096, 9.0, runtime=runtime)]
    caption = comparison_table(rows, metrics=["decode"]).caption
    words = "Cache and times: original by transformers; hybrid by longgen.engine."
    assert caption == words


def test_comparison_says_where_windows_lay_across_documents() -> None:
    def row(variant: str, length: int, **more: object) -> dict[str, object]:
        return {"case": f"loss.{variant}", "length": length, "value": 2.0, **more}

    # Older rows do not know, and of plain tokens nobody does.
    rows: Rows = [
        row("original", 8192),
        row("hybrid", 8192, within_documents=None),
        row("hybrid", 16384, within_documents=True),
    ]
    assert not comparison_table(rows).caption
    rows = [*rows, *(row(name, 32768, within_documents=False) for name in ("full", "hybrid"))]
    assert comparison_table(rows).caption == (
        "Loss over 32K: no document that was read is long enough, so windows lie across documents, "
        "and the loss may rise where one begins."
    )
