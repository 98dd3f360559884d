from pathlib import Path
from typing import Any

import pytest

from longgen.bench import panels
from longgen.bench.plots import STYLES, cases_of, plot_attention, providers_of
from longgen.bench.work import DIRECTIONS, PATTERNS
from longgen.errors import UsageError

pytest.importorskip("matplotlib", reason="an extra: longgen[plots]")
LENGTHS = (8192, 32768, 131072, 524288)


def rows(*patterns: str, providers: tuple[str, ...] = tuple(STYLES)) -> list[dict[str, Any]]:
    return [
        {
            "case": f"attention.{name}.{direction}",
            "provider": provider,
            "length": length,
            "value": 100.0 + 40 * i + length / 1e4,
            "spread": [90.0 + 40 * i, 160.0 + 40 * i],
            "ceiling": 700.0,
            "pattern": str(PATTERNS[name]),
        }
        for name in patterns
        for direction in DIRECTIONS
        for i, provider in enumerate(providers)
        for length in LENGTHS
    ]


@pytest.mark.parametrize("patterns", [("full",), ("strided_2k_64", "full", "sink", "strided")])
def test_the_picture_holds_every_panel_and_all_text(
    patterns: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Any] = []
    save = panels.save
    monkeypatch.setattr(panels, "save", lambda fig, path: (figures.append(fig), save(fig, path))[1])
    given = rows(*patterns)
    given[0]["value"] = None
    file = plot_attention(given, tmp_path / "a.png", title="Attention on a card " * 6)
    data = file.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) > 20_000
    (figure,) = figures
    assert len(figure.axes) == 2 * len(patterns)

    figure.canvas.draw()
    texts = [figure._suptitle, *(axes.title for axes in figure.axes), *figure.legends]
    boxes = [text.get_window_extent() for text in texts]
    page = figure.bbox
    for box in boxes:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= page.x1 and box.y1 <= page.y1
    # The legend covers no panel.
    assert all(boxes[-1].y1 <= axes.get_window_extent().y0 for axes in figure.axes)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(labels) == len(set(labels)) == len(STYLES) + 1 and "matmul" in labels


def test_providers_stand_side_by_side_at_a_single_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Any] = []
    monkeypatch.setattr(panels, "save", lambda fig, path: figures.append(fig))
    given = [row for row in rows("full") if row["length"] == 8192]
    plot_attention(given, tmp_path / "a.png", title="")
    for axes in figures[0].axes:
        low, high = axes.get_xlim()
        # All but the ceiling.
        places = [float(line.get_xdata()[0]) for line in axes.get_lines()[:-1]]
        assert len(set(places)) == len(STYLES) and all(low < x < high for x in places)


def test_colours_and_markers_tell_providers_apart() -> None:
    assert len({(colour, line) for colour, _, line in STYLES.values()}) == len(STYLES)


def test_panels_and_lines_have_an_order() -> None:
    given = rows("sink", "full", providers=("fa4", "ours"))
    given.append({**given[0], "case": "attention.custom.forward", "provider": "other"})
    assert cases_of(given) == {
        "full": ["forward", "backward"],
        "sink": ["forward", "backward"],
        "custom": ["forward"],
    }
    assert providers_of(given) == ["ours", "fa4", "other"]


def test_nothing_measured_is_refused(tmp_path: Path) -> None:
    given = [{**row, "value": None} for row in rows("full")]
    with pytest.raises(UsageError, match="nothing to draw"):
        plot_attention(given, tmp_path / "a.png", title="")
