"""Length statistics, and the picture of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longgen.data.corpus import CorpusView
from longgen.data.lengths import FATES, length_statistics, plot_lengths
from longgen.data.packed import PackOptions, pack_documents


@given(st.lists(st.integers(1, 1 << 40), min_size=1, max_size=50))
def test_histograms_hold_every_document_once(lengths: list[int]) -> None:
    found = length_statistics(np.asarray(lengths, dtype=np.int64))
    assert found["count"] == len(lengths) and found["tokens"] == sum(lengths)
    assert found["longest"] == max(lengths)
    for bar in found["histogram"]:
        inside = [n for n in lengths if bar["up_to"] / 2 < n <= bar["up_to"]]
        assert (bar["documents"], bar["tokens"]) == (len(inside), sum(inside))
    assert sum(bar["documents"] for bar in found["histogram"]) == len(lengths)


def test_no_documents_have_no_histogram() -> None:
    assert length_statistics(np.zeros(3, dtype=np.int64)) == {
        "count": 0,
        "tokens": 0,
        "histogram": [],
    }


def test_the_picture_shows_all_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    from longgen.evaluate import figures

    drawn: list[Any] = []
    save = figures.save
    monkeypatch.setattr(figures, "save", lambda f, p: (drawn.append(f), save(f, p))[1])
    sources = []
    for number, options in enumerate(
        (PackOptions(context=64), PackOptions(context=64, min_length=32, long_documents="drop"))
    ):
        lengths = np.random.default_rng(number).integers(1, 200, 40)
        ends = np.cumsum(lengths)
        packing = pack_documents(CorpusView(np.arange(ends[-1]), ends - lengths, ends), options)
        sources.append(
            {
                "name": f"source{number}",
                "weight": 0.5,
                "context": 64,
                "report": packing.report.to_dict(),
                "document_lengths": length_statistics(lengths),
                "piece_lengths": length_statistics(packing.pieces[:, 1]),
            }
        )
        counts = [name for _, names, _ in FATES for name in names]
        assert sum(sources[-1]["report"][name] for name in counts) == int(lengths.sum())
    path = plot_lengths(sources, tmp_path / "p.png", title="All of it")
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    (figure,) = drawn
    titles = [axes.get_title(loc="left") for axes in figure.axes[::2]]
    assert [title.strip() for title in titles] == ["source0", "source1"]
    for axes in figure.axes[1::2]:
        # The parts of a bar are all of the source.
        assert sum(bar.get_width() for bar in axes.patches) == pytest.approx(100)
