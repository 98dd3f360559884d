"""Where a run keeps its files, and whether a folder may be begun or resumed.

Nothing heavy is imported here: the command line asks before it loads torch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from longgen.checkpoint import CONFIG, check_output
from longgen.errors import UsageError
from longgen.train.config import BEFORE, ExtendConfig

RUN = "run.json"
HELDOUT = "heldout.npy"


def training_folder(out: str | Path) -> Path:
    """Return where a run keeps its corpus, checkpoints and logs."""
    return Path(out) / "training"


def read_run(out: str | Path) -> dict[str, Any] | None:
    """Return the settings of the run in `out`, None if no run was begun there.

    Raises:
        UsageError: if its record is damaged.
    """
    path = training_folder(out) / RUN
    if not path.is_file():
        return None
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{path} is damaged ({error}). Give another --out.") from None
    if not isinstance(settings, dict):
        raise UsageError(f"{path} does not hold the settings of a run. Give another --out.")
    return {**BEFORE, **settings}


def check_folder(config: ExtendConfig, resume: bool) -> None:
    """Check that a run can be begun in `config.out`, or that the one there can be resumed.

    Raises:
        UsageError: if the folder holds something else, a finished run, an unfinished one that was
            not asked for, or one with other settings.
    """
    out = config.out
    earlier = read_run(out)
    if earlier is None:
        if resume:
            raise UsageError(f"There is no run to resume in {out}; leave --resume out.")
        check_output(out)
        return
    # It is written last, so without it the model is not whole.
    if (Path(out) / CONFIG).is_file():
        raise UsageError(f"The run in {out} is finished; give another --out.")
    if not resume:
        raise UsageError(
            f"{out} holds an unfinished run; add --resume to go on with it, or give another --out."
        )
    differences = config.differences(earlier)
    if differences:
        raise UsageError(
            f"The run in {out} was started with other settings ({'; '.join(differences)}). Resume "
            "it with the same ones, or give another --out."
        )
