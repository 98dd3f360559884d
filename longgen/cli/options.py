"""Options that several commands share, and the layer plan that they add up to."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, replace
from typing import Annotated

import typer

from longgen.errors import UsageError
from longgen.gpus import CATALOGUE, GpuGroup, machine_gpus, parse_gpus
from longgen.pattern import SparsePattern
from longgen.plan import LayerPlan
from longgen.shapes import SHAPES, ModelShape

PATTERNS = {
    "default": SparsePattern(),
    "attention-sink": SparsePattern.attention_sink(),
    "block-sparse": SparsePattern.block_sparse(),
}
NO_PATTERN = "none"
# Positions are 32-bit numbers in kernels.
MOST_TOKENS = 1 << 30

_PATTERN_PANEL = "What sparse layers see"

ModelArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help=f"A folder with a checkpoint (config.json), or a name: {', '.join(SHAPES)}. May be "
        "left out with --recipe, which names one.",
        show_default=False,
    ),
]
ContextOption = Annotated[
    str | None,
    typer.Option(
        "--context",
        metavar="TOKENS",
        help="Context length in tokens. 128K is 131072 and 1M is 1048576. [default: 128K]",
    ),
]
BatchOption = Annotated[
    int, typer.Option("--batch", min=1, help="Sequences that are worked on at the same time.")
]
GpusOption = Annotated[
    str | None,
    typer.Option(
        "--gpus",
        metavar="COUNTxCARD",
        help=f"GPUs to plan for, such as 8xH100. Cards: {', '.join(CATALOGUE)}. "
        "[default: this machine's, or an H100; as many as share a sequence]",
    ),
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON object with the figures instead of text.")
]
FullLayersOption = Annotated[
    str | None,
    typer.Option(
        "--full-layers",
        metavar="LAYERS",
        help="Layers that keep full attention (the others become sparse): middle, top (nearest the "
        "output), bottom or interleaved, a third of all layers or as many as in middle:12; or "
        "layers counted from 0, as 10-21 or 3,5,9-11; or all, or none. [default: middle]",
    ),
]
PatternOption = Annotated[
    str | None,
    typer.Option(
        "--pattern",
        metavar="NAME",
        help="What a token sees in a sparse layer. attention-sink: the start of the text (the "
        "sink, where models park attention) and a recent window, in blocks of 64 tokens. "
        "block-sparse: every 64th block of 64 tokens and its own. default: sink and window in "
        "blocks of 128. none: everything, so that no layer is sparse. [default: default]",
        rich_help_panel=_PATTERN_PANEL,
    ),
]
BlockSizeOption = Annotated[
    int | None,
    typer.Option(
        "--block-size",
        metavar="TOKENS",
        help="Tokens in a block. The options below count blocks, and replace what --pattern says.",
        rich_help_panel=_PATTERN_PANEL,
    ),
]
SinkBlocksOption = Annotated[
    int | None,
    typer.Option(
        "--sink-blocks",
        metavar="BLOCKS",
        help="The sink: blocks at the start of the text that always stay visible.",
        rich_help_panel=_PATTERN_PANEL,
    ),
]
LocalBlocksOption = Annotated[
    int | None,
    typer.Option(
        "--local-blocks",
        metavar="BLOCKS",
        help="The window: how many of the most recent blocks a token sees, its own included.",
        rich_help_panel=_PATTERN_PANEL,
    ),
]
StrideBlocksOption = Annotated[
    int | None,
    typer.Option(
        "--stride-blocks",
        metavar="BLOCKS",
        help="The stride: every so many blocks of the text, one stays visible for good. 0 is off.",
        rich_help_panel=_PATTERN_PANEL,
    ),
]
HeadShiftOption = Annotated[
    int | None,
    typer.Option(
        "--head-shift",
        metavar="BLOCKS",
        help="By how many blocks the strided ones move from one key/value head to the next, so "
        "that together the heads see more of the text.",
        rich_help_panel=_PATTERN_PANEL,
    ),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    """Hold the plan options of a command line; None where one was not given."""

    pattern: str | None = None
    block_size: int | None = None
    sink_blocks: int | None = None
    local_blocks: int | None = None
    stride_blocks: int | None = None
    head_shift: int | None = None
    full_layers: str | None = None

    @property
    def given(self) -> list[str]:
        """Names of the options that were given, as on the command line."""
        return [
            "--" + name.replace("_", "-")
            for name, value in asdict(self).items()
            if value is not None
        ]

    def over(self, other: PlanOptions) -> PlanOptions:
        """Return these options, and `other`'s where one was not given."""
        mine = {name: value for name, value in asdict(self).items() if value is not None}
        return replace(other, **mine)

    def sparse_pattern(self) -> SparsePattern:
        """Return the chosen pattern with its overrides."""
        name = self.pattern or "default"
        if name not in PATTERNS:
            raise UsageError(
                f"The pattern {name!r} is not known; choose {', '.join(PATTERNS)} or {NO_PATTERN}."
            )
        overrides = {
            key: value
            for key, value in asdict(self).items()
            if value is not None and key not in ("pattern", "full_layers")
        }
        if overrides.get("stride_blocks") == 0:
            # Without strided blocks there is nothing to shift.
            overrides.setdefault("head_shift", 0)
        return replace(PATTERNS[name], **overrides)


def resolve_plan(
    shape: ModelShape,
    context: int,
    options: PlanOptions,
    *,
    allow_hybrid: bool = False,
    remedy: str = "Give a longer --context, fewer or smaller blocks, or --pattern none.",
) -> LayerPlan:
    """Turn the options into the layer plan of a model for a context of `context` tokens.

    Args:
        shape: the model.
        context: tokens that the plan is for.
        options: what the user chose.
        allow_hybrid: return the plan of a model that is a hybrid already, if no option was given.
        remedy: what to do about a pattern that hides nothing of the context.

    Raises:
        UsageError: if the model is sparse or a hybrid already, or the options do not fit it or the
            context.
    """
    if shape.plan is not None:
        if not allow_hybrid or options.given:
            wanted = f", so {', '.join(options.given)} cannot change it" if options.given else ""
            raise UsageError(
                f"The model is a LongGen hybrid already (layers {shape.plan}){wanted}. Start from "
                "the model that it was made of."
            )
        return shape.plan
    refuse_sliding_window(shape, context)
    if options.pattern == NO_PATTERN:
        other = [name for name in options.given if name not in ("--pattern", "--full-layers")]
        if options.full_layers not in (None, "all"):
            other.append("--full-layers")
        if other:
            raise UsageError(
                f"--pattern none makes no layer sparse, so {', '.join(other)} has no meaning; "
                "leave one of them out."
            )
        return LayerPlan.build(shape.num_hidden_layers, "all")
    pattern = options.sparse_pattern()
    plan = LayerPlan.build(shape.num_hidden_layers, options.full_layers or "middle", pattern)
    if "S" in plan.layers:
        _refuse_covering(pattern, context, shape.num_key_value_heads, remedy)
    return plan


def refuse_sliding_window(shape: ModelShape, context: int) -> None:
    """Refuse a model whose own sliding window hides part of a context of `context` tokens."""
    if shape.sliding_window is not None and shape.sliding_window < context:
        raise UsageError(
            f"The model is sparse already: it has a sliding window of {shape.sliding_window:,} "
            f"tokens (sliding_window in its config.json), less than the context of {context:,}. "
            "Give a model with full attention."
        )


def _refuse_covering(
    pattern: SparsePattern, context: int, num_key_value_heads: int, remedy: str
) -> None:
    """Refuse a pattern whose last token still sees the whole context: no layer would be sparse."""
    seen = pattern.cache_length(context - 1, num_key_value_heads) + 1 if context > 1 else 1
    if pattern.covers(context) or seen >= context:
        span = (pattern.sink_blocks + pattern.local_blocks) * pattern.block_size
        raise UsageError(
            f"The pattern ({pattern}) keeps up to {max(seen, span):,} tokens, which is all of the "
            f"context of {context:,}: nothing would be sparse. {remedy}"
        )


def parse_tokens(text: str) -> int:
    """Read a number of tokens such as 131072, 128K or 1M (binary: K is 1,024).

    Raises:
        UsageError: if it is not one from 1 to `MOST_TOKENS`.
    """
    form = re.fullmatch(r"(\d+)([KM]?)", text.strip().replace(",", "").replace("_", "").upper())
    tokens = int(form[1]) << {"": 0, "K": 10, "M": 20}[form[2]] if form else 0
    if not 1 <= tokens <= MOST_TOKENS:
        raise UsageError(
            f"The number of tokens {text!r} is not one from 1 to 1024M; write it as 131072, 128K "
            "or 1M."
        )
    return tokens


def resolve_gpus(text: str | None, *, at_least: int = 1) -> GpuGroup:
    """Return the GPUs that --gpus names, else this machine's, else H100s.

    Args:
        text: what --gpus says.
        at_least: where it says nothing, plan for this many of the card even if there are fewer.
    """
    if text is not None:
        return parse_gpus(text)
    found = machine_gpus() or parse_gpus("1xH100")
    return replace(found, count=max(found.count, at_least))
