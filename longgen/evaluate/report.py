"""The report of a run: one list of blocks, written as Markdown and as one HTML page."""

import base64
import html
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from longgen.errors import UsageError
from longgen.evaluate.results import (
    VARIANTS,
    Row,
    Rows,
    say_bytes,
    say_runtimes,
    say_tokens,
    select,
    write_atomically,
)

IMAGE_TYPES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg"}
METRIC_WORDS = {
    "needle": "Needle accuracy",
    "loss": "Loss (nats per token)",
    "kv_bytes": "Key/value cache",
    "prefill": "Prefill",
    "decode": "Decode per token",
}
STYLE = """
body { margin: 0 auto; max-width: 52rem; padding: 1rem; color: #1a1a1a; background: #fff;
       font: 1rem/1.55 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.25; }
h2 { font-size: 1.2rem; margin-top: 2.2rem; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .92rem; }
th, td { padding: .35rem .7rem; border-bottom: 1px solid #ddd; text-align: left;
         vertical-align: top; }
th { border-bottom: 2px solid #888; }
th:first-child { min-width: 9rem; }
td.r, th.r { text-align: right; font-variant-numeric: tabular-nums; }
td.r { white-space: nowrap; }
code { font: .88em ui-monospace, monospace; overflow-wrap: anywhere; }
pre { background: #f4f4f4; padding: .7rem; border-radius: .3rem; overflow-x: auto; }
pre code { overflow-wrap: normal; }
figure { margin: 1.5rem 0; }
img { max-width: min(100%, 42rem); height: auto; }
figcaption, .caption { color: #444; font-size: .92rem; }
"""


@dataclass(frozen=True, slots=True)
class Code:
    """Show text as it is, in a fixed-width font: a block in a section, a word in a table cell."""

    text: str


Cell = str | int | float | Code


@dataclass(frozen=True, slots=True)
class Table:
    """Show a table.

    Attributes:
        header: one cell per column; empty for a table without one.
        rows: the cells; figures are shown as given, so round them first.
        caption: a sentence above it.
        align: "l" or "r" for every column; by default the first is left and the others are right.
    """

    header: Sequence[Cell]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""
    align: str = ""


@dataclass(frozen=True, slots=True)
class Picture:
    """Show an image file with a caption, which also describes it to those who cannot see it."""

    path: Path
    caption: str


@dataclass(frozen=True, slots=True)
class Heading:
    """Open a section."""

    text: str


@dataclass(frozen=True, slots=True)
class Bullets:
    """Show a list of sentences."""

    items: Sequence[str]


Block = str | Code | Table | Picture | Heading | Bullets


@dataclass(frozen=True, slots=True)
class Section:
    """Hold a heading and what stands under it; a plain string is a paragraph."""

    heading: str
    blocks: Sequence[Block]


def write_report(
    out_dir: str | Path,
    *,
    title: str,
    summary_rows: Sequence[tuple[str, Cell]],
    sections: Sequence[Section] = (),
    figures: Sequence[Picture] = (),
    notes: Sequence[str] = (),
) -> tuple[Path, Path]:
    """Write `report.md` and `report.html` from the same content.

    The page needs nothing else: images are inside it, and it loads nothing. The Markdown links to
    the images where they lie. All text is shown as it is given; markup in it is escaped.

    Args:
        out_dir: folder for both files.
        title: of the report.
        summary_rows: what was run, as (name, value): card, versions, seed, command, minutes.
        sections: the body.
        figures: pictures, after the body.
        notes: sentences on what the figures do not show, at the end.

    Returns:
        The Markdown file and the HTML file.

    Raises:
        UsageError: a picture is missing or no PNG or JPEG.
    """
    blocks: list[Block] = [Table((), summary_rows, align="ll")] if summary_rows else []
    for section in sections:
        blocks += [Heading(section.heading), *section.blocks]
    if figures:
        blocks += [Heading("Figures"), *figures]
    if notes:
        blocks += [Heading("Notes"), Bullets(notes)]
    for block in blocks:
        if isinstance(block, Picture):
            _check_picture(block.path)
    folder = Path(out_dir)
    markdown = [f"# {_md(title)}", *(_md_block(block, folder) for block in blocks)]
    page = _page(title, [_html_block(block) for block in blocks])
    write_atomically(folder / "report.md", "\n\n".join(markdown) + "\n")
    write_atomically(folder / "report.html", page)
    return folder / "report.md", folder / "report.html"


def comparison_table(
    rows: Rows,
    *,
    metrics: Sequence[str] = tuple(METRIC_WORDS),
    labels: Mapping[str, str] | None = None,
) -> Table:
    """Set the models of a run side by side, a line for every metric and length.

    Args:
        rows: results rows of all models.
        metrics: which to show, of `METRIC_WORDS`.
        labels: words for the models; by default those of `results.VARIANTS`.
    """
    found = {metric: select(rows, metric) for metric in metrics}
    names = {name for groups in found.values() for name in groups}
    order = [name for name in VARIANTS if name in names] + sorted(names - VARIANTS.keys())
    shown = {**VARIANTS, **(labels or {})}
    lines: list[list[Cell]] = []
    for metric, groups in found.items():
        for length in sorted({row["length"] for group in groups.values() for row in group}):
            same = {
                n: row for n, group in groups.items() for row in group if row["length"] == length
            }
            label = f"{METRIC_WORDS[metric]} at {say_tokens(length)}"
            if metric == "needle":
                label += f", n = {' or '.join(sorted({str(row['n']) for row in same.values()}))}"
            lines.append([label, *(_say(metric, same.get(name)) for name in order)])
    needle = "Needle: share of answers exact in all six digits (Wilson 95 % interval), n questions."
    costs = [
        row
        for metric in ("kv_bytes", "prefill", "decode")
        for group in found.get(metric, {}).values()
        for row in group
    ]
    losses = [row for group in found.get("loss", {}).values() for row in group]
    caption = [needle] * bool(found.get("needle"))
    caption += [say_windows(losses), say_runtimes(costs, shown)]
    header = ["", *(shown.get(name, name) for name in order)]
    return Table(header, lines, " ".join(filter(None, caption)))


def say_windows(rows: Rows) -> str:
    """Say in a sentence where windows of the loss lay across documents; "" where none is known to.

    Args:
        rows: results rows of `loss`; those from before windows kept to documents know nothing.
    """
    lengths = sorted({row["length"] for row in rows if row.get("within_documents") is False})
    if not lengths:
        return ""
    over = " and ".join(map(say_tokens, lengths))
    return (
        f"Loss over {over}: no document that was read is long enough, so windows lie across "
        "documents, and the loss may rise where one begins."
    )


def _say(metric: str, row: Row | None) -> str:
    if row is None or row["value"] is None:
        return "-" if row is None else "not measured"
    value = row["value"]
    match metric:
        case "needle":
            low, high = row["interval"]
            return f"{value:.3f} ({low:.2f} to {high:.2f})"
        case "kv_bytes":
            return say_bytes(value)
        case "prefill":
            return f"{value:.2f} s"
        case "decode":
            return f"{value:.1f} ms"
        case _:
            return f"{value:.3f}"


def _check_picture(path: Path) -> None:
    if path.suffix.lower() not in IMAGE_TYPES:
        raise UsageError(f"A report shows PNG and JPEG pictures, not {path}.")
    if not path.is_file():
        raise UsageError(f"The report's picture {path} does not exist; draw it first.")


def _alignments(table: Table) -> str:
    columns = max(len(row) for row in [table.header, *table.rows])
    return table.align or "l" + "r" * (columns - 1)


def _md_block(block: Block, folder: Path) -> str:
    match block:
        case str():
            return _md_line(block)
        case Heading(text):
            return f"## {_md(text)}"
        case Code(text):
            fence = "`" * max(3, 1 + _longest_run(text))
            return f"{fence}\n{text}\n{fence}"
        case Bullets(items):
            return "\n".join(f"- {_md_line(item)}" for item in items)
        case Picture(path, caption):
            link = os.path.relpath(path, folder).replace(os.sep, "/")
            return f"![{_md(caption)}](<{link}>)\n\n{_md_line(caption)}"
        case Table():
            align = _alignments(block)
            lines = [block.header or [""] * len(align), *block.rows]
            table = [f"| {' | '.join(map(_md_cell, line))} |" for line in lines]
            table.insert(1, f"|{'|'.join('---:' if a == 'r' else '---' for a in align)}|")
            return "\n".join(([_md_line(block.caption), ""] if block.caption else []) + table)


def _md_cell(cell: Cell) -> str:
    if not isinstance(cell, Code):
        return _md(str(cell))
    text = " ".join(cell.text.split())
    fence = "`" * (1 + _longest_run(text))
    pad = " " if "`" in (text[:1], text[-1:]) else ""
    return f"{fence}{pad}{text}{pad}{fence}".replace("|", r"\|")


def _md(text: str) -> str:
    """Escape what Markdown, or the HTML in it, would take for markup inside a line; give one."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    text = re.sub(r"([\\`*\[\]|])", r"\\\1", text)
    return re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", text)  # inside a word an underscore means nothing


def _md_line(text: str) -> str:
    """Escape also what would make a whole line a heading, a list, a quote or a rule."""
    return re.sub(r"^(\d*)(?=>|[#+.)=-]+(?:\s|$))", r"\1\\", _md(text))


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)


def _html_block(block: Block) -> str:
    match block:
        case str():
            return f"<p>{html.escape(block)}</p>"
        case Heading(text):
            return f"<h2>{html.escape(text)}</h2>"
        case Code(text):
            return f"<pre><code>{html.escape(text)}</code></pre>"
        case Bullets(items):
            return f"<ul>{''.join(f'<li>{html.escape(item)}</li>' for item in items)}</ul>"
        case Picture(path, caption):
            data = base64.b64encode(path.read_bytes()).decode("ascii")
            source = f"data:{IMAGE_TYPES[path.suffix.lower()]};base64,{data}"
            words = html.escape(caption)
            image = f'<img src="{source}" alt="{words}">'
            return f"<figure>{image}<figcaption>{words}</figcaption></figure>"
        case Table():
            caption = (
                f'<p class="caption">{html.escape(block.caption)}</p>' if block.caption else ""
            )
            return f'{caption}<div class="scroll"><table>{"".join(_html_rows(block))}</table></div>'


def _html_rows(table: Table) -> Iterator[str]:
    classes = [' class="r"' if a == "r" else "" for a in _alignments(table)]
    for row in [table.header, *table.rows] if table.header else table.rows:
        tag = "th" if row is table.header else "td"
        cells = (f"<{tag}{c}>{_html_cell(x)}</{tag}>" for c, x in zip(classes, row, strict=True))
        yield f"<tr>{''.join(cells)}</tr>"


def _html_cell(cell: Cell) -> str:
    if isinstance(cell, Code):
        return f"<code>{html.escape(cell.text)}</code>"
    return html.escape(str(cell))


def _page(title: str, blocks: Sequence[str]) -> str:
    words = html.escape(title)
    # The policy makes "loads nothing" a rule that the browser keeps.
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    head = [
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{words}</title>",
        f"<style>{STYLE}</style>",
    ]
    body = [f"<h1>{words}</h1>", *blocks]
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            "<head>",
            *head,
            "</head>",
            "<body>",
            *body,
            "</body>",
            "</html>",
            "",
        ]
    )
