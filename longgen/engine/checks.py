"""What an engine is refused for, in sentences."""

from __future__ import annotations

from collections.abc import Iterable
from operator import index
from typing import Any, TypeGuard

import torch

from longgen.errors import UsageError

# Numbers of an engine that may be left to it.
_OPTIONAL = ("max_length", "num_pages", "prefill_chunk")


def check_model(model: Any) -> Any:
    """Return a hybrid's config.

    Raises:
        UsageError: if the model is no hybrid, or its rotary embedding depends on how long the
            sequences are that go through it together.
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "layer_plan"):
        raise UsageError(
            f"The engine runs LongGen hybrids, and {type(model).__name__} isn't one. Convert its "
            "checkpoint with `longgen convert` (with --full-layers all if none of its layers is to "
            "be sparse)."
        )
    kind = (config.rope_parameters or {}).get("rope_type", "default")
    if "dynamic" in kind or kind == "longrope":
        raise UsageError(
            f"The model's rotary embedding is of type {kind!r}, whose frequencies follow the "
            "longest sequence of a step: in the engine one request would change another's text. "
            "Use model.generate(), or convert a model with another type."
        )
    return config


def check_kv_dtype(name: str | None, own: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype of keys and values.

    Args:
        name: as `Engine` takes it.
        own: the model's.
        device: where they are kept.

    Raises:
        UsageError: if it is not known, or the GPU has no such numbers.
    """
    if name is None:
        return own
    if name != "fp8":
        raise UsageError(f'kv_dtype is {name!r}; leave it out for the model\'s own, or give "fp8".')
    if device.type == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 9):
            raise UsageError(
                "Keys and values in fp8 need an Ada, Hopper or newer GPU (compute capability 8.9); "
                f"{torch.cuda.get_device_name(device)} has {capability[0]}.{capability[1]}. Leave "
                "fp8 out."
            )
    return torch.float8_e4m3fn


def check_limits(
    context: int | None,
    *,
    max_length: int | None,
    max_sequences: int,
    max_batched_tokens: int,
    **others: int | None,
) -> None:
    """See that an engine's numbers make sense; the arguments are the engine's.

    Args:
        context: the most that `max_length` may be; None is no limit.

    Raises:
        UsageError: naming the number that doesn't.
    """
    own = {
        "max_length": max_length,
        "max_sequences": max_sequences,
        "max_batched_tokens": max_batched_tokens,
    }
    for name, value in (own | others).items():
        if (value is None and name in _OPTIONAL) or (_is_whole(value) and value >= 1):
            continue
        raise UsageError(f"{name} is {value!r}; give a whole number of at least 1.")
    if max_length is not None and context is not None and max_length > context:
        raise UsageError(
            f"max_length is {max_length} tokens, the model was made for {context}. Give at most "
            "that, or extend the model."
        )
    if max_batched_tokens < max_sequences:
        raise UsageError(
            f"max_batched_tokens is {max_batched_tokens}, too few for a token of each of "
            f"{max_sequences} sequences. Raise it or lower max_sequences."
        )


def _is_whole(value: object) -> TypeGuard[int]:
    try:
        index(value)  # type: ignore[arg-type]
        return not isinstance(value, bool)
    except TypeError:
        return False


def check_text(text: str) -> None:
    """See that a tokenizer can take a text.

    Raises:
        UsageError: if it holds half of a character, as bytes that are no UTF-8 leave it in the
            arguments of a command.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(
            f"The prompt is no text that UTF-8 can write: character {error.start:,} is "
            f"{text[error.start]!a}, a half of one. Write it as UTF-8."
        ) from None


def token_ids(prompt: Iterable[Any], vocabulary: int, max_length: int) -> list[int]:
    """Return a prompt's token ids as a list.

    Args:
        prompt: whole numbers: a list, a tuple, an array or a tensor of one dimension.
        vocabulary: tokens that the model knows.
        max_length: of the longest sequence, in tokens.

    Raises:
        UsageError: if it is empty, too long, or holds anything but tokens of the model.
    """
    try:
        ids = [index(token) for token in prompt]
    except TypeError:
        what = repr(prompt)[:80]
        if isinstance(prompt, torch.Tensor):
            what = f"a tensor of shape {tuple(prompt.shape)}"
        raise UsageError(
            f"The prompt is {what}; give text, or token ids as whole numbers in a row."
        ) from None
    if not ids:
        raise UsageError("The prompt is empty; give at least one token.")
    unknown = next((token for token in ids if not 0 <= token < vocabulary), None)
    if unknown is not None:
        raise UsageError(
            f"The prompt has the token {unknown}; the model knows 0 to {vocabulary - 1}."
        )
    if len(ids) >= max_length:
        raise UsageError(
            f"The prompt has {len(ids):,} tokens; the engine holds sequences of up to "
            f"{max_length:,} and needs room for at least one more. Shorten it, or raise "
            "max_length or num_pages."
        )
    return ids
