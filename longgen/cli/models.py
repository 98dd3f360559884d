"""What the commands that load a model share: its options, the checks before, quiet libraries."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from longgen.checkpoint import find_config, load_model, load_tokenizer
from longgen.cli.console import is_first_process
from longgen.errors import UsageError
from longgen.shapes import SHAPES, ModelShape, load_shape

if TYPE_CHECKING:
    import torch

_MACHINE_PANEL = "Machine"
_DTYPES = {
    "bf16": "bfloat16",
    "bfloat16": "bfloat16",
    "fp16": "float16",
    "float16": "float16",
    "fp32": "float32",
    "float32": "float32",
}

FolderArgument = Annotated[
    str,
    typer.Argument(
        metavar="DIR", help="The folder of a checkpoint: a hybrid or any model LongGen knows."
    ),
]
DeviceOption = Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="NAME",
        help="Where to run: cuda, cuda:1 or cpu. [default: the first GPU if there is one]",
        rich_help_panel=_MACHINE_PANEL,
    ),
]
DtypeOption = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        metavar="NAME",
        help="Number format of weights and computation: bf16, fp16, fp32, or auto (as stored). "
        "[default: bf16 on a GPU, fp32 on a CPU]",
        rich_help_panel=_MACHINE_PANEL,
    ),
]


def checkpoint_shape(model: str) -> ModelShape:
    """Return the shape of the checkpoint in a folder, from its config.json alone.

    Raises:
        UsageError: if there is none, or `model` only names a shape that has no weights.
    """
    if model.lower() in SHAPES and not Path(model).is_dir():
        raise UsageError(
            f"{model} names a shape for `longgen plan`, which has no weights. Give the folder of a "
            "checkpoint."
        )
    find_config(model)
    return load_shape(model)


def check_dtype(name: str | None) -> None:
    """Refuse a number format that is not known, before anything is imported."""
    if name not in (None, "auto", *_DTYPES):
        raise UsageError(f"The dtype {name!r} is not known; give bf16, fp16, fp32 or auto.")


def open_tokenizer(folder: str) -> Any:
    """Return the tokenizer in a folder, before its model is loaded."""
    quiet_libraries()
    return load_tokenizer(folder)


def open_model(folder: str, device: torch.device, dtype: str | None) -> Any:
    """Return the model in a folder, ready for inference.

    Raises:
        UsageError: if the checkpoint is not whole or its architecture not known.
    """
    import torch

    quiet_libraries()
    precision = getattr(torch, _DTYPES[dtype]) if dtype in _DTYPES else dtype
    return load_model(folder, dtype=precision, device=device)


def find_device(name: str | None) -> torch.device:
    """Return the device of a name, by default the first GPU if there is one.

    Raises:
        UsageError: if it is not known, or not there.
    """
    import torch

    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    try:
        device = torch.device(name or ("cuda" if found else "cpu"))
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UsageError(f"The device {name!r} is not known; give cuda, cuda:1 or cpu.")
    if device.type == "cuda" and (device.index or 0) >= found:
        raise UsageError(
            f"The device {name!r} is not there: torch sees {found} GPUs. Give another, or cpu."
        )
    return device


def quiet_libraries() -> None:
    """Keep progress bars and advice of transformers off the screen; errors still show."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def progress_lines() -> Callable[[str], None]:
    """Return a function that prints one line of progress on standard error, plain when piped.

    Of several processes the first alone prints.
    """
    console = Console(stderr=True, highlight=False, soft_wrap=True)

    def say(line: str) -> None:
        if not is_first_process():
            return
        text = Text(line)
        text.highlight_regex(r"^step \d+/\d+", "bold")
        text.highlight_regex(r"loss [\d.]+", "green")
        console.print(text)

    return say
