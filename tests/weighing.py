"""How many bytes a model's training keeps and takes at its peak, by autograd's hooks and the
profiler."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from longgen.attention import api
from longgen.bench.models import planned_config, random_model, shape_config
from longgen.plan import LayerPlan
from longgen.shapes import ModelShape
from longgen.train.elementwise import compile_elementwise, norms_follow_autocast
from longgen.train.recompute import set_recompute
from longgen.training_setup import TrainingSetup

TOKENS = 1024
SMALL = ModelShape(
    model_type="llama",
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=128,
    max_position_embeddings=TOKENS,
)
# How a process computes on one GPU, under FSDP2, and on a CPU.
AUTOCAST = TrainingSetup(is_bf16=True)
SHARDED = TrainingSetup(is_bf16=True, gpus=2)
PLAIN = TrainingSetup(is_bf16=False)


class FlashLike(torch.autograd.Function):
    """Keep and take what the flash kernels do (longgen/attention/flash/ops.py and hopper.py), and
    compute nothing of use."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(q.shape, dtype=q.dtype)
        lse = torch.zeros(q.shape[0], q.shape[2], q.shape[1])
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, k, v, _, lse = ctx.saved_tensors
        dk, dv = (torch.zeros(x.shape, dtype=x.dtype) for x in (k, v))
        shared = q.shape[2] != k.shape[2]
        sums = [torch.zeros(x.shape) for x in (k, v) if shared]
        sums += [torch.zeros(q.shape), torch.zeros(lse.shape), torch.zeros(lse.shape)]
        return torch.zeros(q.shape, dtype=q.dtype), dk, dv


def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put `FlashLike` in the place of what `longgen.attention.attention` chooses on a CPU."""

    def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **how: Any) -> torch.Tensor:
        return FlashLike.apply(q, k, v)

    def masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **how: Any) -> Any:
        return FlashLike.apply(q, k, v), None

    monkeypatch.setattr(api, "dense_attention", dense)
    monkeypatch.setitem(api._MASKED, "blocked", masked)


def build(shape: ModelShape, setup: TrainingSetup, plan: LayerPlan) -> Any:
    """Return a model with random weights, as a setup trains it."""
    config = planned_config(shape_config(shape, TOKENS), plan)
    dtype = torch.bfloat16 if setup.is_sharded else torch.float32
    model = random_model(config, dtype=dtype, device=torch.device("cpu"), seed=0).train()
    set_recompute(model, setup.checkpointing)
    if setup.casts_weights:
        norms_follow_autocast(model)
    if setup.compile:
        compile_elementwise(model)
    return model


def ids(length: int = TOKENS) -> torch.Tensor:
    """Return random tokens (1, length)."""
    return torch.randint(0, SMALL.vocab_size, (1, length), generator=torch.manual_seed(0))


def loss(model: Any, ids: torch.Tensor, *, autocast: bool) -> torch.Tensor:
    """Run the forward pass of training."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = model(ids, shift_labels=ids, use_cache=False, num_items_in_batch=ids.numel())
    return found.loss


def kept_bytes(model: Any, run: Callable[[], torch.Tensor]) -> int:
    """Return the bytes of all tensors that autograd keeps in `run`, each storage once, parameters
    and casts of them left out."""
    shapes = {tuple(p.shape) for p in model.parameters() if p.dim() == 2}
    shapes |= {shape[::-1] for shape in shapes}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, tuple[int, Any]] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own and tuple(x.shape) not in shapes:
            # Held, so that no other tensor can get its place.
            found[storage.data_ptr()] = (storage.nbytes(), storage)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        total = run()
    size = sum(size for size, _ in found.values())
    total.backward()
    return size


def peak_bytes(run: Callable[[], object], folder: Path) -> int:
    """Return the most bytes that CPU tensors took in `run` beyond those that were there before."""
    # oneDNN's products take room to work in on processors that multiply bf16 by themselves.
    with (
        torch.backends.mkldnn.flags(enabled=False),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded,
    ):
        run()
    path = folder / "trace.json"
    recorded.export_chrome_trace(str(path))
    events = json.loads(path.read_text())["traceEvents"]
    path.unlink()
    changes = sorted(
        (event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]"
    )
    live = most = 0
    for _, change in changes:
        live += change
        most = max(most, live)
    return most


@contextmanager
def partitioned_as_compiled() -> Iterator[None]:
    """Have `Module.compile` split forward and backward as the compiler does, without kernels."""
    torch._dynamo.reset()
    compile = torch.nn.Module.compile

    def by_parts(self: Any, *arguments: Any, **options: Any) -> None:
        compile(self, backend="aot_eager_decomp_partition")

    torch.nn.Module.compile = by_parts  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.nn.Module.compile = compile  # type: ignore[method-assign]
        torch._dynamo.reset()
