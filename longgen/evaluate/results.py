"""Results files: one JSON shape for every figure, with what is needed to make it again."""

import json
import math
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from longgen.errors import UsageError

Row = Mapping[str, Any]
Rows = Sequence[Row]

PACKAGES = ("longgen", "torch", "transformers", "tokenizers", "numpy")
REQUIRED = ("card", "gpus", "date", "commit", "command", "versions", "seed", "rows")
# The order, and the words, in which tables and plots show the models of a run.
VARIANTS = {
    "original": "original",
    "full": "full attention",
    "full_fp8": "full attention with fp8 cache",
    "hybrid": "hybrid",
    "hybrid_fp8": "hybrid with fp8 cache",
    "sparse": "all sparse",
    "sparse_fp8": "all sparse with fp8 cache",
}


def write_results(
    path: str | Path,
    name: str,
    rows: Rows,
    *,
    command: str,
    seed: int,
    extra: Mapping[str, object] | None = None,
    device: str | torch.device | None = None,
    gpus: int | None = None,
    packages: Sequence[str] = (),
) -> Path:
    """Write rows with card, date, commit, command, versions and seed; the file appears whole or not
    at all.

    Args:
        path: a file ending in .json, or a folder that gets `<date>_<card>_<name>.json`.
        name: what was measured, for example "needle".
        rows: mappings with `case`, `length`, `value`, `unit` and whatever else says what was
            measured. Figures that are not finite become null, since JSON has no word for them.
        command: the command line that makes these figures.
        seed: of the run.
        extra: further keys for the top level, for example the model or the minutes taken.
        device: where the model ran; by default the GPU if there is one.
        gpus: how many were used; by default 1 on a GPU and 0 on a CPU.
        packages: others beside `PACKAGES` whose versions decide the figures.

    Returns:
        The file written.

    Raises:
        UsageError: `extra` would replace a key of the shape itself.
    """
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    now = datetime.now(UTC)
    card = card_name(place)
    document: dict[str, object] = {
        "card": card,
        "gpus": gpus if gpus is not None else int(place.type == "cuda"),
        "date": now.isoformat(timespec="seconds"),
        "commit": commit(),
        "command": command,
        "versions": versions(packages),
        "seed": seed,
        "name": name,
    }
    clash = sorted((document.keys() | {"rows"}) & (extra or {}).keys())
    if clash:
        raise UsageError(
            f"Extra results keys may not replace {', '.join(clash)}; give them other names."
        )
    document |= {**(extra or {}), "rows": rows}
    file = Path(path)
    if file.suffix != ".json":
        file = file / f"{now:%Y-%m-%d}_{_slug(card)}_{_slug(name)}.json"
    write_atomically(file, json.dumps(_plain(document), indent=1, allow_nan=False) + "\n")
    return file


def read_results(path: str | Path) -> dict[str, object]:
    """Read a results file.

    Raises:
        UsageError: the file is missing, is not JSON, or lacks a key of the shape.
    """
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UsageError(f"Cannot read results from {path}: {error}.") from error
    missing = [key for key in REQUIRED if not isinstance(document, dict) or key not in document]
    if missing:
        raise UsageError(f"{path} is not a results file: it lacks {', '.join(missing)}.")
    return document


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write bytes, or text as UTF-8, by way of a file beside `path`; make folders as needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as stream:
            stream.write(content.encode() if isinstance(content, str) else content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def card_name(device: torch.device) -> str:
    """Name the hardware: the GPU's name, or "CPU: " and the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(
            r"^model name\s*:\s*(.+)$", cpuinfo.read_text(errors="replace"), re.MULTILINE
        )
        name = found[1].strip() if found else name
    return f"CPU: {name}"


def commit() -> str:
    """Name the code: the commit in a checkout, -dirty if changed since, else the version."""
    package = Path(__file__).resolve().parents[1]
    # An installed package may lie inside another project's checkout, whose commit says nothing.
    if (package.parent / ".git").exists():
        describe = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        try:
            found = subprocess.run(
                describe, cwd=package, capture_output=True, text=True, timeout=30
            )
        except (OSError, subprocess.TimeoutExpired):
            found = None
        if found and found.returncode == 0:
            return found.stdout.strip()
    return f"longgen {_version('longgen')}"


def versions(packages: Sequence[str] = ()) -> dict[str, str]:
    """Give the versions of Python and the packages that decide a result, `packages` among them."""
    names = dict.fromkeys((*PACKAGES, *packages))
    found = {"python": platform.python_version()} | {name: _version(name) for name in names}
    found["torch"] = torch.__version__
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found | {"platform": sys.platform}


def variant(row: Row) -> str:
    """Give the model a row is about: the last part of its case, `hybrid` for `needle.hybrid`."""
    return str(row["case"]).rpartition(".")[2]


def select(rows: Rows, metric: str) -> dict[str, list[Row]]:
    """Sort the rows of one metric by model: `select(rows, "needle")` gives {"original": [...],
    "hybrid": [...]}.

    Models come in the order of `VARIANTS`, others after them; rows of one model in order of length.
    """
    names = {variant(row): None for row in rows if str(row["case"]).rpartition(".")[0] == metric}
    order = [name for name in VARIANTS if name in names] + [
        name for name in names if name not in VARIANTS
    ]
    return {
        name: sorted(
            (row for row in rows if row["case"] == f"{metric}.{name}"),
            key=lambda row: row["length"],
        )
        for name in order
    }


def say_runtimes(rows: Rows, labels: Mapping[str, str]) -> str:
    """Say in a sentence what ran the models whose costs were measured; "" where no row knows.

    Args:
        rows: results rows of `kv_bytes`, `prefill` or `decode`.
        labels: words for the models.
    """
    found: dict[str, dict[str, None]] = {}
    for row in rows:
        if "runtime" in row:
            name = variant(row)
            found.setdefault(row["runtime"], {})[labels.get(name, name)] = None
    said = "; ".join(f"{', '.join(names)} by {runtime}" for runtime, names in found.items())
    return f"Cache and times: {said}." if said else ""


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """Give the Wilson score interval at 95 % for a share of `successes` out of `n`.

    Unlike the normal approximation it stays inside 0..1 and keeps its width at 0 of n and n of n.
    """
    z = 1.959963984540054
    p = successes / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # The formula gives 0 and 1 exactly at the ends; rounding would not.
    return middle - half if successes else 0.0, middle + half if successes < n else 1.0


def say_tokens(count: float) -> str:
    """Write a length as people do: 4096 is 4K, 131072 is 128K, 1048576 is 1M, 1000 is 1,000."""
    whole = int(count)
    if whole >= 1024**2 and whole % 1024**2 == 0:
        return f"{whole // 1024**2}M"
    return f"{whole // 1024}K" if whole >= 1024 and whole % 1024 == 0 else f"{whole:,}"


def say_bytes(count: float) -> str:
    """Write a size in the largest binary unit that leaves at least one of it: 1536 is 1.50 KiB."""
    unit, size = byte_unit(count)
    value = count / size
    digits = 0 if size == 1 or value >= 100 else 1 if value >= 10 else 2
    return f"{value:,.{digits}f} {unit}"


def byte_unit(count: float) -> tuple[str, int]:
    """Give the binary unit in which to write a size, and the bytes in it."""
    units = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10, "bytes": 1}
    return next((unit, size) for unit, size in units.items() if count >= size or size == 1)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _plain(value: object) -> object:
    """Turn NumPy figures, tensors, tuples and paths into what JSON knows."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic | torch.Tensor):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
