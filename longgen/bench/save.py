"""Where a benchmark's rows go while it runs: a results file that is whole at every moment."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from longgen.errors import UsageError
from longgen.evaluate.results import Rows, read_results, write_results


class ResultsFile:
    """Write one results file again and again as rows come in.

    Until `write` is called with `partial` False the file says that it is partial.

    Args:
        folder: made when the first row comes.
        name: of the benchmark; the file is `<name>.json`.
        command: the command line that makes these figures.
        seed: of the run.
        device: where it runs.
        packages: whose versions decide the figures.
        gpus: how many are used; None is 1 on a GPU and 0 on a CPU.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        *,
        command: str,
        seed: int,
        device: torch.device,
        packages: Sequence[str] = (),
        gpus: int | None = None,
    ) -> None:
        self.path = folder / f"{name}.json"
        self.name, self.command, self.seed = name, command, seed
        self.device, self.packages, self.gpus = device, tuple(packages), gpus

    def check(self) -> None:
        """Refuse a place that holds something else than results of the same benchmark, or where no
        folder can be.

        Raises:
            UsageError: if it does.
        """
        folder = self.path.parent
        there = next(place for place in (folder, *folder.parents) if place.exists())
        if not there.is_dir():
            raise UsageError(f"The output {there} is a file; give a folder with --out.")
        if not os.access(there, os.W_OK | os.X_OK):
            raise UsageError(f"Nothing can be written to {there}; give another folder with --out.")
        if self.path.exists() and read_results(self.path).get("name") != self.name:
            raise UsageError(
                f"{self.path} holds something else than results of this benchmark. Give another "
                "folder with --out."
            )

    def write(self, rows: Rows, extra: Mapping[str, object], *, partial: bool = True) -> Path:
        """Write all rows so far, with further keys for the top level.

        Raises:
            UsageError: nothing can be written there (any more); what was written stays.
        """
        try:
            return write_results(
                self.path,
                self.name,
                rows,
                command=self.command,
                seed=self.seed,
                extra={**({"partial": True} if partial else {}), **extra},
                device=self.device,
                gpus=self.gpus,
                packages=self.packages,
            )
        except OSError as error:
            raise UsageError(
                f"Cannot write {self.path}: {error}. Make room, or give another folder with --out."
            ) from error
