"""`longgen convert`: make a hybrid of a checkpoint without training."""

from __future__ import annotations

from typing import Annotated

import typer

from longgen.checkpoint import check_output
from longgen.cli.console import print_json, stdout_console
from longgen.cli.models import checkpoint_shape, quiet_libraries
from longgen.cli.options import (
    BlockSizeOption,
    FullLayersOption,
    HeadShiftOption,
    JsonOption,
    LocalBlocksOption,
    PatternOption,
    PlanOptions,
    SinkBlocksOption,
    StrideBlocksOption,
    parse_tokens,
    resolve_plan,
)
from longgen.errors import UsageError

CheckpointArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="The folder of a checkpoint with full attention in every layer."
    ),
]
OutOption = Annotated[
    str, typer.Option("--out", metavar="DIR", help="Folder for the hybrid, new or empty.")
]
ContextOption = Annotated[
    str | None,
    typer.Option(
        "--context",
        metavar="TOKENS",
        help="Context length of the hybrid in tokens; 128K is 131072. Above the model's own, the "
        "rotary base is raised to match. [default: the model's own]",
    ),
]
RopeThetaOption = Annotated[
    float | None,
    typer.Option(
        "--rope-theta",
        metavar="BASE",
        help="Base of the rotary position embedding. [default: by the rule for the context]",
    ),
]


def convert(
    model: CheckpointArgument,
    out: OutOption,
    context: ContextOption = None,
    full_layers: FullLayersOption = None,
    rope_theta: RopeThetaOption = None,
    json: JsonOption = False,
    pattern: PatternOption = None,
    block_size: BlockSizeOption = None,
    sink_blocks: SinkBlocksOption = None,
    local_blocks: LocalBlocksOption = None,
    stride_blocks: StrideBlocksOption = None,
    head_shift: HeadShiftOption = None,
) -> None:
    """Make a hybrid of MODEL without training: the weights stay bit for bit.

    The result runs anywhere the trained one does, but has not learned yet to work with its sparse
    layers. Use `longgen extend` to train it as well.
    """
    shape = checkpoint_shape(model)
    tokens = shape.max_position_embeddings if context is None else parse_tokens(context)
    if tokens < shape.max_position_embeddings:
        raise UsageError(
            f"The context of {tokens:,} tokens is below the {shape.max_position_embeddings:,} that "
            f"{model} has already; leave --context out or give a longer one."
        )
    options = PlanOptions(
        pattern=pattern,
        block_size=block_size,
        sink_blocks=sink_blocks,
        local_blocks=local_blocks,
        stride_blocks=stride_blocks,
        head_shift=head_shift,
        full_layers=full_layers,
    )
    plan = resolve_plan(shape, tokens, options)

    check_output(out)

    from longgen.convert import convert as convert_checkpoint

    quiet_libraries()
    record = convert_checkpoint(model, out, plan, context=tokens, rope_theta=rope_theta)
    if json:
        print_json(record)
        return
    console = stdout_console()
    console.print(f"Layers   {plan}")
    console.print(f"Pattern  {plan.pattern if 'S' in plan.layers else 'none'}")
    console.print(f"Context  {record['context']:,} tokens, rotary base {record['rope_theta']:,.0f}")
    console.print(f"The hybrid is in {out}; its weights are untouched and untrained.")
