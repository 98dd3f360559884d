"""`longgen generate`: continue a prompt of any length, and say what it cost."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from longgen.cli.console import format_bytes, print_json
from longgen.cli.models import (
    DeviceOption,
    DtypeOption,
    FolderArgument,
    check_dtype,
    checkpoint_shape,
    find_device,
    open_model,
    open_tokenizer,
    progress_lines,
)
from longgen.cli.options import JsonOption, parse_tokens
from longgen.errors import UsageError
from longgen.shapes import ModelShape

_SAMPLING = "Sampling"
_SECONDS_BETWEEN_LINES = 5


def generate(
    model: FolderArgument,
    prompt: Annotated[
        str | None, typer.Option("--prompt", metavar="TEXT", help="The text to continue.")
    ] = None,
    prompt_file: Annotated[
        str | None,
        typer.Option(
            "--prompt-file", metavar="FILE", help="A UTF-8 file to continue; - is standard input."
        ),
    ] = None,
    max_new_tokens: Annotated[
        int,
        typer.Option("--max-new-tokens", min=1, help="Tokens to write at most."),
    ] = 256,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat/--no-chat",
            help="Put the prompt to the model as a question, in its own chat format.",
        ),
    ] = False,
    prefill_chunk: Annotated[
        str,
        typer.Option(
            "--prefill-chunk",
            metavar="TOKENS",
            help="Tokens of the prompt to read at a time: fewer take less memory.",
        ),
    ] = "8K",
    stop: Annotated[
        list[str] | None,
        typer.Option(
            "--stop",
            metavar="TEXT",
            help="End before this text, should the model write it; may be given several times.",
        ),
    ] = None,
    kv_dtype: Annotated[
        str | None,
        typer.Option(
            "--kv-dtype",
            metavar="NAME",
            help="fp8 keeps a hybrid's keys and values in 8 bits, half the bytes of bf16, at some "
            "loss. [default: the model's own format]",
        ),
    ] = None,
    compile_first: Annotated[
        bool,
        typer.Option(
            "--compile/--no-compile",
            help="On a GPU, compile a hybrid and record its steps first: it starts later and "
            "writes faster, which pays for long texts.",
        ),
    ] = False,
    json: JsonOption = False,
    temperature: Annotated[
        float,
        typer.Option(
            "--temperature",
            min=0.0,
            help="0 always takes the likeliest token; higher values draw more freely.",
            rich_help_panel=_SAMPLING,
        ),
    ] = 0.0,
    top_p: Annotated[
        float | None,
        typer.Option(
            "--top-p",
            min=0.0,
            max=1.0,
            help="Draw from the likeliest tokens that together reach this probability.",
            rich_help_panel=_SAMPLING,
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(
            "--top-k",
            min=1,
            help="Draw from so many of the likeliest tokens.",
            rich_help_panel=_SAMPLING,
        ),
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(
            "--min-p",
            min=0.0,
            max=1.0,
            help="Draw from tokens at least this fraction as likely as the likeliest.",
            rich_help_panel=_SAMPLING,
        ),
    ] = None,
    repetition_penalty: Annotated[
        float,
        typer.Option(
            "--repetition-penalty",
            help="Above 1, makes tokens less likely that the prompt or the text has already.",
            rich_help_panel=_SAMPLING,
        ),
    ] = 1.0,
    seed: Annotated[
        int,
        typer.Option(
            "--seed",
            min=0,
            max=2**32 - 1,
            help="Decides what is drawn.",
            rich_help_panel=_SAMPLING,
        ),
    ] = 0,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Continue a prompt with the model in DIR, printing text as it is written.

    Hybrids run in LongGen's engine, other models in transformers. Afterwards, on standard error:
    how many bytes of keys and values are held, what full attention would hold, and how fast it
    went.
    """
    shape = checkpoint_shape(model)
    text = _prompt(prompt, prompt_file)
    chunk = parse_tokens(prefill_chunk)
    check_dtype(dtype)
    _check_kv_dtype(kv_dtype, shape)
    filters = {"--top-p": top_p, "--top-k": top_k, "--min-p": min_p}
    given = [name for name, value in filters.items() if value is not None]
    if given and not temperature:
        raise UsageError(
            f"{' and '.join(given)} changes nothing at --temperature 0, which always takes the "
            "likeliest token. Give a temperature above 0."
        )
    place = find_device(device)
    tokenizer = open_tokenizer(model)
    ids = _encode(tokenizer, text, chat, model)
    room = shape.max_position_embeddings - len(ids)
    if room < 1:
        raise UsageError(
            f"The prompt has {len(ids):,} tokens, and the model's context of "
            f"{shape.max_position_embeddings:,} has no room for more. Shorten it, or extend the "
            "model to a longer context."
        )
    say = progress_lines()
    if room < max_new_tokens:
        say(f"the context of {shape.max_position_embeddings:,} tokens leaves room for {room:,}")

    from longgen.engine import SamplingParams
    from longgen.generate import generate_text

    params = SamplingParams(
        max_tokens=min(max_new_tokens, room),
        temperature=temperature,
        top_p=1.0 if top_p is None else top_p,
        top_k=top_k or 0,
        min_p=min_p or 0.0,
        repetition_penalty=repetition_penalty,
        stop=tuple(stop or ()),
        seed=seed,
    )
    loaded = open_model(model, place, dtype)
    figures = generate_text(
        loaded,
        tokenizer,
        ids,
        params,
        prefill_chunk=chunk,
        kv_dtype=kv_dtype,
        is_compiled=compile_first,
        write=None if json else _write,
        on_read=_reading(len(ids), say),
    )
    figures["kv_bytes_full"] = _full_bytes(loaded, shape, figures["cached_tokens"])
    if json:
        print_json(figures)
        return
    _write("\n")
    _report(figures, say)


def _check_kv_dtype(name: str | None, shape: ModelShape) -> None:
    if name not in (None, "fp8"):
        raise UsageError(
            f"The --kv-dtype {name!r} is not known; give fp8, or leave it out for the model's own."
        )
    if name is not None and not shape.is_hybrid:
        raise UsageError(
            f"--kv-dtype {name} is for hybrids, and the model isn't one. Leave it out, or convert "
            "the model with `longgen convert`."
        )


def _reading(total: int, say: Callable[[str], None]) -> Callable[[int], None]:
    """Return what says now and then how much of a long prompt is read."""
    last = time.monotonic()

    def on_read(count: int) -> None:
        nonlocal last
        if time.monotonic() - last > _SECONDS_BETWEEN_LINES:
            say(f"{count:,} of {total:,} tokens read")
            last = time.monotonic()

    return on_read


def _prompt(text: str | None, file: str | None) -> str:
    """Return the prompt that was given in one of two ways."""
    if (text is None) == (file is None):
        raise UsageError("Give the prompt as either --prompt TEXT or --prompt-file FILE.")
    if file is not None:
        try:
            data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
            text = data.decode("utf-8")
        except OSError as error:
            raise UsageError(f"The prompt file {file} cannot be read ({error.strerror}).") from None
        except UnicodeDecodeError as error:
            raise UsageError(
                f"The prompt file {file} is not UTF-8 text (byte {error.start:,} is "
                f"0x{data[error.start]:02x}). Save it as UTF-8."
            ) from None
    assert text is not None
    if not text.strip():
        where = f"The prompt file {file}" if file else "The prompt"
        raise UsageError(f"{where} is empty; give at least one word to continue.")
    return text


def _encode(tokenizer: Any, text: str, chat: bool, model: str) -> list[int]:
    from longgen.engine.checks import check_text

    check_text(text)
    if not chat:
        return list(tokenizer(text, verbose=False)["input_ids"])
    if not tokenizer.chat_template:
        raise UsageError(f"The tokenizer in {model} has no chat format; leave --chat out.")
    question = [{"role": "user", "content": text}]
    written = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(written, add_special_tokens=False, verbose=False)["input_ids"])


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _full_bytes(model: Any, shape: ModelShape, tokens: int) -> int:
    """Return what a cache of so many tokens holds with full attention in every layer."""
    from longgen.accounting import full_plan, kv_bytes

    return kv_bytes(shape, full_plan(shape), tokens, bytes_per_element=model.dtype.itemsize)


def _report(figures: dict[str, Any], say: Callable[[str], None]) -> None:
    speed = figures["tokens_per_second"]
    parts = [
        f"{figures['prompt_tokens']:,} tokens read in {figures['prefill_seconds']:.2f} s",
        f"{figures['new_tokens']:,} written",
        *([f"{speed:.1f} tok/s"] if speed else []),
        f"{format_bytes(figures['kv_bytes'])} of keys and values held "
        f"(full attention: {format_bytes(figures['kv_bytes_full'])})",
    ]
    say("  ".join(parts))
