"""Settings of an extension run: defaults, TOML recipes, and the resolved record beside the
output."""

from __future__ import annotations

import os
import tomllib
from dataclasses import MISSING, asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from longgen.errors import UsageError, what_changed
from longgen.recall_kinds import DEFAULT_KINDS, split_kinds
from longgen.training_setup import CHECKPOINTING, OFFLOADED, SHARDINGS, refuse_kept_products

SWITCH = ("auto", "on", "off")
# What layers keep for the backward pass.
RECOMPUTE = ("auto", *CHECKPOINTING)
# Options that choose the layers and the pattern, which the config holds resolved.
PLAN_OPTIONS = (
    "full_layers",
    "block_size",
    "sink_blocks",
    "local_blocks",
    "stride_blocks",
    "head_shift",
)
_BATCH_TOKENS = 131072
_LOWEST = {
    "context": 2,
    "steps": 1,
    "batch_tokens": 1,
    "warmup_steps": 0,
    "weight_decay": 0,
    "seed": 0,
    "recall_records": 1,
    "heldout_tokens": 1,
    "context_parallel": 1,
    "save_steps": 1,
    "log_steps": 1,
}
_CHOICES = {"gradient_checkpointing": RECOMPUTE, "compile": SWITCH, "sharding": SHARDINGS}
_OLD_WORDS = {("gradient_checkpointing", "on"): "full"}
# Recipes may write numbers of tokens as text (128K), and hold what chooses layers and pattern.
_IN_RECIPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("context", "batch_tokens", "heldout_tokens"), (int, str)),
    **dict.fromkeys(PLAN_OPTIONS, (int,)),
    "full_layers": (str,),
    "pattern": (str,),
    "data": (list, str),
}
_WORDS = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    tuple: "a list of paths",
    list: "a list of paths",
    dict: "the fields of a pattern",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtendConfig:
    """Hold every setting of `longgen extend`; the defaults are those of the command.

    Attributes:
        model: folder of the base checkpoint.
        out: folder for the hybrid and all that belongs to the run.
        context: target length in tokens, also the length of every training sequence.
        data: files, folders and globs to train on; or packed sets, as DIR or DIR@WEIGHT.
        layers: the layer string, one letter a layer.
        pattern: fields of the `SparsePattern`.
        rope_theta: rotary base; None follows `longgen.rope`.
        steps: optimizer steps.
        batch_tokens: tokens in a step over all GPUs; a multiple of the context.
        learning_rate: peak of the cosine.
        min_lr_ratio: learning rate at the end, as a share of the peak.
        warmup_steps: linear warm-up.
        weight_decay: AdamW's, on matrices only.
        max_grad_norm: gradient clipping.
        seed: decides the order of data and what is held out.
        recall_share: share of sequences with generated recall text planted in them.
        recall_records: records in such a sequence; None is one per 1,000 tokens.
        recall_kinds: what they are, as `longgen.data.RecallText` takes it.
        join_folders: make one long document of each folder of source files.
        text_field: key or column of the text in .jsonl, .parquet and datasets.
        strict: refuse data files that would be skipped.
        heldout_tokens: tokens kept out of training, for loss curves and haystacks.
        allow_repeat: go through the data more than once if the steps ask for it.
        gradient_checkpointing: recompute layers in the backward pass: "full", or "selective", all
            but attention, or "elementwise", neither attention nor matrix products; "off"; "auto"
            is the first of off, elementwise, selective and full that fits by the estimate.
        offload: hold what recomputation starts from in host memory.
        compile: compile the layers' element-wise parts ("auto": on GPUs).
        fp8: matrix products of the layers in fp8.
        context_parallel: processes that share each sequence, of those that torchrun starts.
        sharding: how several processes hold the model: "fsdp" (each a part), "ddp" (each all of
            it), or "auto" (fsdp on GPUs).
        save_steps: steps between checkpoints.
        log_steps: steps between lines of progress.
        force: start even if the estimate says that it does not fit the GPU.
    """

    model: str
    out: str
    context: int
    data: tuple[str, ...]
    layers: str
    pattern: dict[str, int]
    rope_theta: float | None = None
    steps: int = 100
    batch_tokens: int | None = None
    learning_rate: float = 5e-5
    min_lr_ratio: float = 0.1
    warmup_steps: int = 10
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    seed: int = 0
    recall_share: float = 0.0
    recall_records: int | None = None
    recall_kinds: str = DEFAULT_KINDS
    join_folders: bool = False
    text_field: str = "text"
    strict: bool = False
    heldout_tokens: int | None = None
    allow_repeat: bool = False
    gradient_checkpointing: str = "auto"
    offload: bool = False
    compile: str = "auto"
    fp8: bool = False
    context_parallel: int = 1
    sharding: str = "auto"
    save_steps: int = 100
    log_steps: int = 10
    force: bool = field(default=False, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.data, list | tuple):
            object.__setattr__(self, "data", tuple(str(path) for path in self.data))
        for name, kinds in _kinds().items():
            _check_kind(name, getattr(self, name), kinds)
        for name in _kinds():
            object.__setattr__(self, name, _checked(name, getattr(self, name)))
        if self.offload and self.gradient_checkpointing not in ("auto", *OFFLOADED):
            raise UsageError(
                "offload moves the little that gradient checkpointing keeps to host memory, and "
                f"gradient_checkpointing is {self.gradient_checkpointing}. Give "
                f"{' or '.join(OFFLOADED)}, or leave offload out."
            )
        if self.fp8:
            refuse_kept_products("gradient_checkpointing", self.gradient_checkpointing)
        if not self.data:
            raise UsageError("No data were given to train on; name files, folders or globs.")
        if self.batch_tokens is None:
            object.__setattr__(self, "batch_tokens", default_batch_tokens(self.context))
        if self.sequences_per_step * self.context != self.batch_tokens:
            raise UsageError(
                f"batch_tokens is {self.batch_tokens:,}; give a multiple of the context "
                f"({self.context:,})."
            )

    @property
    def sequences_per_step(self) -> int:
        """Training sequences in one optimizer step, over all GPUs."""
        return int(self.batch_tokens or 0) // self.context

    @property
    def num_sequences(self) -> int:
        """Training sequences of the whole run."""
        return self.steps * self.sequences_per_step

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain values, for the record beside the output."""
        return {**asdict(self), "data": list(self.data)}

    def to_run(self) -> dict[str, Any]:
        """Return the settings as a run records them, to be gone on with from any working folder."""
        return _in_any_folder(self.to_dict())

    def differences(self, earlier: dict[str, Any]) -> list[str]:
        """Name the settings that would make a resumed run another run than the one that began with
        `earlier`."""
        free = {
            "out",
            "force",
            "save_steps",
            "log_steps",
            "gradient_checkpointing",
            "offload",
            "compile",
            "context_parallel",
            "sharding",
        }
        # A run of an earlier version has no word of settings that came later.
        defaults = {one.name: one.default for one in fields(self) if one.default is not MISSING}
        mine, earlier = self.to_run(), _in_any_folder({**defaults, **BEFORE, **earlier})
        if mine["recall_share"] == earlier["recall_share"] == 0:
            free.add("recall_kinds")
        return what_changed(
            earlier, {name: value for name, value in mine.items() if name not in free}
        )


# What runs did before there was a setting, where its default is another.
BEFORE = {"recall_kinds": "codes"}


def _in_any_folder(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings whose paths of model and data are absolute."""
    data = [os.path.abspath(os.path.expanduser(path)) for path in settings.get("data", ())]
    return {**settings, "model": os.path.abspath(settings.get("model", "")), "data": data}


def default_batch_tokens(context: int) -> int:
    """Return the tokens of a step where none are given: 128K, as near as whole sequences come."""
    return max(_BATCH_TOKENS // context, 1) * context


@cache
def _kinds() -> dict[str, tuple[type, ...]]:
    """Return what each setting may be."""
    found = {}
    for name, kind in get_type_hints(ExtendConfig).items():
        kinds = get_args(kind) if isinstance(kind, UnionType) else (kind,)
        kinds = tuple(get_origin(one) or one for one in kinds)
        found[name] = (*kinds, int) if float in kinds else kinds
    return found


def _check_kind(name: str, value: Any, kinds: tuple[type, ...]) -> None:
    """Refuse a value of another kind than the setting's: recipes can hold anything."""
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise UsageError(f"{name} is {value!r}; give {_WORDS[kinds[0]]}.")


def _checked(name: str, value: Any) -> Any:
    """Return the value of a setting, which has the right kind, in the words of today.

    Raises:
        UsageError: if it is out of its range.
    """
    if value is None:
        return None
    if name in _LOWEST and not value >= _LOWEST[name]:
        raise UsageError(f"{name} is {value}; give at least {_LOWEST[name]}.")
    if name in ("learning_rate", "max_grad_norm", "rope_theta") and not 0 < value < float("inf"):
        raise UsageError(f"{name} is {value}; give a number above 0.")
    if name == "seed" and value >= 1 << 32:
        raise UsageError(f"seed is {value}; give a number below 2**32.")
    if name == "weight_decay" and value == float("inf"):
        raise UsageError("weight_decay is inf; give a finite number.")
    if name in ("recall_share", "min_lr_ratio") and not 0 <= value <= 1:
        raise UsageError(f"{name} is {value}; give a number from 0 to 1.")
    if name == "recall_kinds":
        value = ",".join(split_kinds(value))
    if name in _CHOICES:
        value, choices = _OLD_WORDS.get((name, value), value), _CHOICES[name]
        if value not in choices:
            raise UsageError(
                f"{name} is {value!r}; give {', '.join(choices[:-1])} or {choices[-1]}."
            )
    return value


def check_context(context: int, original: int, model: str) -> None:
    """Refuse a target length that is no extension.

    Args:
        context: target length in tokens.
        original: the model's own.
        model: what the sentence calls it.

    Raises:
        UsageError: with both numbers.
    """
    if context <= original:
        raise UsageError(
            f"The context of {context:,} tokens is not above the {original:,} that {model} has "
            "already; give a longer --context (or use `longgen convert`, which does not train)."
        )


def read_recipe(path: str | Path) -> dict[str, Any]:
    """Read a TOML recipe: keys are the long options of `longgen extend`, with - or _ between words.

    Raises:
        UsageError: if the file is missing, not TOML, has a key that is no option, or a value that
            the option cannot have.
    """
    try:
        with open(path, "rb") as file:
            found = tomllib.load(file)
    except OSError as error:
        raise UsageError(f"The recipe {path} cannot be read ({error.strerror}).") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"The recipe {path} is not TOML: {error}.") from None
    recipe = {key.replace("-", "_"): value for key, value in found.items()}
    if "mixture" in recipe:
        recipe = _with_mixture(recipe, path)
    own = {entry.name for entry in fields(ExtendConfig)} - {"layers"}
    known = own.union(PLAN_OPTIONS)
    unknown = sorted(set(recipe) - known)
    if unknown:
        raise UsageError(
            f"The recipe {path} has {', '.join(unknown)}, which "
            f"{'is' if len(unknown) == 1 else 'are'} no option of `longgen extend` (see its "
            "--help)."
        )
    for name, value in recipe.items():
        if name == "recall_kinds" and isinstance(value, list):  # as natural as text with commas
            value = ",".join(map(str, value))
        kinds = _IN_RECIPES.get(name)
        try:
            _check_kind(name, value, kinds or _kinds()[name])
            recipe[name] = value if kinds else _checked(name, value)
        except UsageError as error:
            raise UsageError(f"In the recipe {path} {error}") from None
    return recipe


def _with_mixture(recipe: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """Turn the table [mixture], packed sets and their weights, into what `data` holds."""
    table = recipe.pop("mixture")
    if "data" in recipe:
        raise UsageError(f"The recipe {path} has both data and [mixture]; keep one of them.")
    if not isinstance(table, dict) or not table:
        raise UsageError(
            f"mixture in the recipe {path} is {table!r}; give a table of packed sets and their "
            'weights, such as "packed/books" = 0.6.'
        )
    for folder, weight in table.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not weight > 0:
            raise UsageError(
                f"The weight of {folder!r} in the recipe {path} is {weight!r}; give a number "
                "above 0."
            )
    return {**recipe, "data": [f"{folder}@{weight}" for folder, weight in table.items()]}
