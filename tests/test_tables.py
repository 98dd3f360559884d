"""The tables of the docs are those of the committed results."""

import pytest

from benchmarks import tables


def test_the_docs_show_the_newest_results() -> None:
    assert tables.main(["--check"]) == 0, "run python -m benchmarks.tables"


def test_an_outdated_table_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    newest = tables.newest

    def changed(name: str) -> tables.Results:
        results = newest(name)
        rows = [{**row, "value": 0.5} for row in results["rows"]]
        return {**results, "rows": rows}

    monkeypatch.setattr(tables, "newest", changed)
    assert tables.main(["--check"]) == 1
