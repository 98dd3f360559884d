"""Results files that are added to: which model, text and settings the figures in them are of."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from longgen.data.corpus import tokenizer_fingerprint
from longgen.errors import UsageError
from longgen.evaluate.results import card_name, read_results, write_results

Rows = list[dict[str, Any]]
Settings = Mapping[str, object]


def fingerprint(model: PreTrainedModel) -> str:
    """Return a hash of a model's config and weights that changes with any single bit of them.

    The bits of each tensor are added up as integers, which is exact in any order and on any device.
    """
    fields = model.config.to_dict()
    for name in ("_name_or_path", "transformers_version"):
        fields.pop(name, None)
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode())
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    for name, parameter in model.named_parameters():
        bits = parameter.detach().contiguous().view(integers[parameter.element_size()])
        total = int(bits.sum(dtype=torch.int64))
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype} {total}\n".encode())
    return digest.hexdigest()


class SavedResults:
    """Keep one results file for each metric in a folder, and take figures over from it.

    Args:
        folder: where the files are; made when the first is written.
        model, tokenizer: what is measured.
        text: token ids that it is measured on.
        variant: what results call the model.
        seed: of needles and random prompts.
        kv_dtype: of keys and values; None is the model's own, others have files of their own.
        command: the command line that makes these figures.
        say: prints one line.
    """

    def __init__(
        self,
        folder: Path,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        text: np.ndarray,
        *,
        variant: str,
        seed: int,
        kv_dtype: str | None = None,
        command: str,
        say: Callable[[str], None],
    ) -> None:
        self.folder = folder
        self.variant, self.seed, self.command, self._say = variant, seed, command, say
        self.device = model.device
        self.kv_dtype = kv_dtype
        self._identity = {
            "model": fingerprint(model),
            "variant": variant,
            "tokenizer": tokenizer_fingerprint(tokenizer),
            "text": hashlib.sha256(text.astype(np.int64).tobytes()).hexdigest(),
            "card": card_name(model.device),
            **({"kv_dtype": kv_dtype} if kv_dtype else {}),
        }

    def say(self, line: str) -> None:
        """Print a line; one of another format than the model's own says so."""
        self._say(f"{self.kv_dtype} {line}" if self.kv_dtype else line)

    def name(self, what: str) -> str:
        """Return what the file of a metric, or of a picture, is called, without its ending."""
        return f"{what}_{self.kv_dtype}" if self.kv_dtype else what

    def read(self, metric: str, settings: Settings) -> Rows:
        """Return the rows of an earlier evaluation of the same model and text with these settings.

        Rows without a figure are left out: what did not fit into memory then may do so now.
        """
        path = self.folder / f"{self.name(metric)}.json"
        if not path.is_file():
            return []
        try:
            found: Any = read_results(path)
        except UsageError:
            self.say(f"{path} is damaged and will be replaced")
            return []
        if found.get("identity") != {**self._identity, **settings}:
            self.say(f"{path} is of another model, text or setting and will be replaced")
            return []
        return [row for row in found["rows"] if row["value"] is not None]

    def write(self, metric: str, settings: Settings, rows: Rows) -> None:
        """Write all rows of one metric."""
        write_results(
            self.folder / f"{self.name(metric)}.json",
            self.name(metric),
            sorted(rows, key=lambda row: (row["case"], row["length"])),
            command=self.command,
            seed=self.seed,
            extra={"identity": {**self._identity, **settings}},
            device=self.device,
        )

    def write_as(self, name: str, rows: Rows) -> None:
        """Write rows that were made of others, under a name of their own."""
        write_results(
            self.folder / f"{name}.json",
            name,
            rows,
            command=self.command,
            seed=self.seed,
            extra={"identity": self._identity},
            device=self.device,
        )

    def rows(self, metric: str) -> Rows:
        """Return all rows of one metric as its file holds them."""
        found: Any = read_results(self.folder / f"{self.name(metric)}.json")["rows"]
        return list(found)
