from pathlib import Path

import pytest
import torch

from longgen.bench.save import ResultsFile
from longgen.errors import UsageError
from longgen.evaluate.results import read_results, write_results


def results_file(folder: Path) -> ResultsFile:
    return ResultsFile(
        folder,
        "attention",
        command="longgen bench attention",
        seed=3,
        device=torch.device("cpu"),
        packages=("triton",),
    )


def test_the_file_is_partial_until_it_is_whole(tmp_path: Path) -> None:
    file = results_file(tmp_path / "new")
    file.check()
    row = {"case": "attention.full.forward", "length": 1, "value": 1.0, "unit": "TFLOP/s"}
    file.write([row], {"ceiling": None})
    found = read_results(file.path)
    assert found["partial"] is True and found["rows"] == [row]
    file.check()  # an interrupted run may be begun again in its folder
    file.write([row, row], {"ceiling": None}, partial=False)
    found = read_results(file.path)
    assert "partial" not in found and found["rows"] == [row, row]
    assert (found["command"], found["seed"], found["gpus"]) == ("longgen bench attention", 3, 0)
    versions = found["versions"]
    assert isinstance(versions, dict) and {"torch", "triton"} <= set(versions)


def test_other_content_is_refused(tmp_path: Path) -> None:
    file = results_file(tmp_path)
    write_results(file.path, "needle", [], command="c", seed=0, device="cpu")
    with pytest.raises(UsageError, match="holds something else"):
        file.check()
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        results_file(tmp_path / "file").check()
    with pytest.raises(UsageError, match=r"file is a file"):
        results_file(tmp_path / "file" / "inside").check()


def test_a_folder_that_cannot_be_made_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda place, mode: Path(place) != tmp_path)
    with pytest.raises(UsageError, match="Nothing can be written"):
        results_file(tmp_path / "new" / "newer").check()
