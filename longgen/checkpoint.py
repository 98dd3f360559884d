"""Folders of models: reading them, and writing them so that a half-written one is never taken for a
whole one."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longgen.errors import UsageError
from longgen.shapes import HYBRID_PREFIX

if TYPE_CHECKING:
    import torch

# torch and transformers are imported inside the functions that use them: the command line refuses
# bad folders before it loads either.

# Written beside every output: how it was made, with every setting resolved.
RECORD = "longgen.json"
CONFIG = "config.json"
_STAGING = ".partial"
_SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")


def find_config(path: str | Path) -> Path:
    """Return the config.json of the checkpoint in a folder.

    Raises:
        UsageError: if there is none.
    """
    file = Path(path) / CONFIG
    if not file.is_file():
        raise UsageError(
            f"There is no checkpoint in {path}: {CONFIG} is missing. Give the folder of a "
            "Hugging Face checkpoint (download one with `hf download NAME --local-dir FOLDER`)."
        )
    return file


def read_config(path: str | Path) -> Any:
    """Read a checkpoint's config and check that it is of a family that LongGen knows.

    Raises:
        UsageError: if there is no checkpoint, or its architecture is not one of llama, mistral,
            qwen2 and qwen3.
    """
    from transformers import AutoConfig

    from longgen.hf import FAMILIES

    file = find_config(path)
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
        model_type = fields.get("model_type")
    except (ValueError, AttributeError) as error:
        raise UsageError(f"{file} is not the JSON of a model config ({error}).") from None
    if str(model_type).removeprefix(HYBRID_PREFIX) not in FAMILIES:
        raise UsageError(
            f"{path} holds a {model_type!r} model; LongGen works with {', '.join(FAMILIES)}."
        )
    return AutoConfig.from_pretrained(path)


def check_weights(path: str | Path) -> None:
    """Check that a checkpoint's weights are there and not cut off; only file headers are read.

    Raises:
        UsageError: naming the file that is missing or damaged.
    """
    folder = Path(path)
    files = [name for name in _SINGLE_FILES if (folder / name).is_file()]
    for name in _SINGLE_FILES:
        index = folder / f"{name}.index.json"
        if not files and index.is_file():
            try:
                table = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                files = sorted(set(table.values()))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UsageError(f"{index} is damaged ({error}). Download it again.") from None
    if not files:
        raise UsageError(
            f"There are no weights in {folder} (model.safetensors or shards of it). Download the "
            "whole checkpoint."
        )
    from safetensors import SafetensorError, safe_open

    for name in files:
        file = folder / name
        if not file.is_file():
            raise UsageError(f"The weights file {file} is missing. Download it again.")
        if file.suffix == ".safetensors":
            try:
                with safe_open(file, framework="np"):
                    pass
            except (SafetensorError, OSError) as error:
                raise UsageError(
                    f"The weights file {file} is damaged or cut off ({error}). Download it again."
                ) from None


def load_model(
    path: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    attn_implementation: str | None = None,
) -> Any:
    """Load a hybrid or a plain checkpoint for inference.

    Args:
        path: the folder.
        dtype: None is bf16 on a GPU and fp32 on a CPU; "auto" is as stored.
        device: None is the first GPU if there is one.
        attn_implementation: None is the model's own (for hybrids "longgen").

    Raises:
        UsageError: if there is no whole checkpoint of a known architecture, or a hybrid is asked to
            run with another attention.
    """
    import torch
    from transformers import AutoModelForCausalLM

    read_config(path)
    check_weights(path)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if dtype is None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    # Passing None would override what config.json asks for instead of refusing it.
    chosen = {"attn_implementation": attn_implementation} if attn_implementation else {}
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **chosen)
    return model.to(device).eval()


def load_tokenizer(path: str | Path) -> Any:
    """Load a checkpoint's tokenizer.

    Raises:
        UsageError: if it has none.
    """
    from transformers import AutoTokenizer

    import longgen.hf  # noqa: F401 (registers the model types, by which tokenizers are found)

    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(
            f"No tokenizer could be loaded from {path} ({str(error).splitlines()[0]}). Put the "
            "model's tokenizer.json and tokenizer_config.json beside its weights."
        ) from None


def refuse_hybrid(config: Any, path: str | Path) -> None:
    """Refuse a model that is already a hybrid, or sparse by its own config.

    Raises:
        UsageError: naming the plan that the model has.
    """
    from longgen.hf import is_hybrid

    if is_hybrid(config):
        raise UsageError(
            f"{path} is a hybrid already ({config.layer_plan}). Give the original model with full "
            "attention."
        )
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"]) - {"full_attention"}
    if kinds or (window is not None and window < config.max_position_embeddings):
        raise UsageError(
            f"{path} is a sparse model already: "
            f"{'layers of type ' + ', '.join(kinds) if kinds else f'sliding window {window}'}. "
            "Give a model with full attention in every layer."
        )


def check_output(folder: str | Path) -> Path:
    """Return an output folder that is new or empty.

    Raises:
        UsageError: if it is a file or inside one, or holds anything.
    """
    path = Path(folder)
    for place in (path, *path.parents):
        if place.exists() and not place.is_dir():
            raise UsageError(f"The output {path} cannot be made: {place} is a file. Give a folder.")
    if path.is_dir():
        found = sorted(entry.name for entry in path.iterdir())
        if found:
            raise UsageError(
                f"The output folder {path} is not empty (it holds {', '.join(found[:3])}"
                f"{', ...' if len(found) > 3 else ''}). Give a new folder, or empty that one."
            )
    return path


def write_json(path: Path, data: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(path.name + _STAGING)
    staging.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    os.replace(staging, path)


@contextmanager
def staged_checkpoint(folder: Path) -> Iterator[Path]:
    """Give a folder to write a checkpoint to; when all is written, move its files to `folder`,
    config.json last.

    A checkpoint without config.json is refused by every loader, so one cut off half-way is never
    used. After an error or an interrupt `folder` is as it was.
    """
    created = not folder.exists()
    staging = folder / _STAGING
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
    except BaseException:
        shutil.rmtree(folder if created else staging, ignore_errors=True)
        raise
    for name in sorted((entry.name for entry in staging.iterdir()), key=lambda n: n == CONFIG):
        os.replace(staging / name, folder / name)
    staging.rmdir()
