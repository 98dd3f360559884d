"""Tiny random hybrids, and what they must compute: a decoder written out in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers import AutoModelForCausalLM

from longgen.attention.testing import eager_attention
from longgen.hf import CONFIG_CLASSES, FAMILIES
from longgen.layout import Layout
from longgen.pattern import SparsePattern
from longgen.plan import LayerPlan

SINK = SparsePattern(block_size=4, sink_blocks=1, local_blocks=2)
STRIDED = SparsePattern(block_size=4, sink_blocks=0, local_blocks=1, stride_blocks=3, head_shift=1)
VOCABULARY = 97
HEAD_DIM = 8


def base_fields(layers: str, heads: int, key_value_heads: int) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": heads * HEAD_DIM,
        "head_dim": HEAD_DIM,
        "intermediate_size": 48,
        "num_hidden_layers": len(layers),
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,  # attention that is far from uniform: mistakes show
        "sliding_window": None,
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": 0,
    }


def config(
    family: str = "llama",
    pattern: SparsePattern = SINK,
    layers: str = "SFS",
    heads: int = 4,
    key_value_heads: int = 2,
    **fields: Any,
) -> Any:
    """Give a hybrid's config."""
    return CONFIG_CLASSES[family](
        **{**base_fields(layers, heads, key_value_heads), **fields},
        layer_types=LayerPlan(layers, pattern).layer_types,
        longgen={"pattern": pattern.to_dict()},
    )


def randomize(model: Any) -> Any:
    """Make norms and biases, which start as ones and zeros, matter."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5) if "norm" in name else parameter.uniform_(-1, 1)
    return model


def build(*args: Any, seed: int = 0, **kwargs: Any) -> Any:
    """Give a hybrid in evaluation mode; arguments as in `config`."""
    torch.manual_seed(seed)
    return randomize(AutoModelForCausalLM.from_config(config(*args, **kwargs))).eval()


def build_base(
    family: str,
    layers: int = 3,
    heads: int = 4,
    key_value_heads: int = 2,
    seed: int = 0,
    **fields: Any,
) -> Any:
    """Give transformers' own model of the family."""
    torch.manual_seed(seed)
    config_class = getattr(transformers, f"{FAMILIES[family][0]}Config")
    fields = {**base_fields("F" * layers, heads, key_value_heads), **fields}
    return randomize(AutoModelForCausalLM.from_config(config_class(**fields))).eval()


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    """Draw token ids that are neither padding nor a special token."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, shape, generator=generator)


def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def _rotate(x: torch.Tensor, positions: torch.Tensor, theta: float) -> torch.Tensor:
    half = x.shape[-1] // 2
    frequencies = theta ** -(torch.arange(half, dtype=x.dtype) / half)
    angles = (positions.to(x.dtype)[:, None] * frequencies)[:, None]
    a, b = x.split(half, -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def compute(
    config: Any,
    weights: dict[str, torch.Tensor],
    ids: torch.Tensor,
    lengths: Sequence[int] | None = None,
) -> torch.Tensor:
    """Compute the logits (T, V) of tokens `ids` (T,) by definition, in the dtype of the weights.

    Args:
        config: the hybrid's config.
        weights: its parameters by name.
        ids: documents one after another.
        lengths: of the documents; None is one.
    """
    layout = Layout.packed([0, *accumulate(lengths or [len(ids)])])
    positions = torch.from_numpy(layout.query_places()[1][0])
    plan, eps = config.layer_plan, config.rms_norm_eps
    h = weights["model.embed_tokens.weight"][ids]
    for index in range(plan.num_layers):
        w = {
            name.removeprefix(f"model.layers.{index}."): value
            for name, value in weights.items()
            if name.startswith(f"model.layers.{index}.")
        }
        x = _norm(h, w["input_layernorm.weight"], eps)
        q, k, v = (
            F.linear(x, w[f"self_attn.{n}.weight"], w.get(f"self_attn.{n}.bias")).unflatten(
                -1, (-1, HEAD_DIM)
            )
            for n in ("q_proj", "k_proj", "v_proj")
        )
        if "self_attn.q_norm.weight" in w:
            q = _norm(q, w["self_attn.q_norm.weight"], eps)
            k = _norm(k, w["self_attn.k_norm.weight"], eps)
        theta = config.rope_parameters["rope_theta"]
        q, k = _rotate(q, positions, theta), _rotate(k, positions, theta)
        mask = layout.dense_mask(plan.pattern_of(index), config.num_key_value_heads)
        attended = eager_attention(q[None], k[None], v[None], torch.from_numpy(mask))[0]
        h = h + F.linear(attended.flatten(1), w["self_attn.o_proj.weight"])
        x = _norm(h, w["post_attention_layernorm.weight"], eps)
        gate, up = (F.linear(x, w[f"mlp.{n}_proj.weight"]) for n in ("gate", "up"))
        h = h + F.linear(F.silu(gate) * up, w["mlp.down_proj.weight"])
    h = _norm(h, weights["model.norm.weight"], eps)
    return F.linear(h, weights.get("lm_head.weight", weights["model.embed_tokens.weight"]))


def weights_of(model: Any, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """Give copies of a model's parameters by name, as leaves that require gradients."""
    return {
        name: parameter.detach().to(dtype, copy=True).requires_grad_()
        for name, parameter in model.named_parameters()
    }


@dataclass
class Expected:
    """Hold a hybrid, documents, and their logits: in truth (fp64) and by plain fp32 arithmetic."""

    model: Any
    rows: list[torch.Tensor]
    eager: list[torch.Tensor]
    exact: list[torch.Tensor]

    @classmethod
    def of(cls, model: Any, rows: list[torch.Tensor]) -> Expected:
        with torch.no_grad():
            eager, exact = (
                [compute(model.config, weights_of(model, dtype), row) for row in rows]
                for dtype in (torch.float32, torch.float64)
            )
        return cls(model, rows, eager, exact)

    @cached_property
    def budget(self) -> float:
        """Twice the largest error of plain fp32 arithmetic, over all documents: with a few logits
        alone it would turn on luck."""
        return 2 * max(
            float((eager - exact).abs().max())
            for eager, exact in zip(self.eager, self.exact, strict=True)
        )

    def check(self, name: str, logits: torch.Tensor, row: int = 0, start: int = 0) -> None:
        """Assert that `logits` (T, V) are those of a row's tokens from `start` on."""
        exact = self.exact[row][start : start + len(logits)]
        assert logits.dtype == torch.float32 and logits.shape == exact.shape
        error = float((logits - exact).abs().max())
        assert error <= self.budget, f"{name}: error {error:.2e}, allowed is {self.budget:.2e}"


def check_gradients(
    got: dict[str, torch.Tensor], eager: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]
) -> None:
    """Assert that no parameter's gradient is, for its size, over twice as wrong as eager's worst.

    Parameter by parameter it would turn on luck: the few elements of a bias take all their error
    from the same rounding upstream, and eager's may be small by accident.
    """
    assert got.keys() == eager.keys() == exact.keys()

    def relative(found: dict[str, torch.Tensor]) -> dict[str, float]:
        return {
            name: float((value.double() - exact[name]).norm() / exact[name].norm())
            for name, value in found.items()
        }

    budget = 2 * max(relative(eager).values())
    for name, error in relative(got).items():
        assert error <= budget, f"{name}: relative error {error:.1e}, allowed is {budget:.1e}"


# Ratio of query to key/value heads: 1, 3, 4, 8. Every family meets both patterns.
CASES = {
    "llama-sink-4/4": ("llama", SINK, 4, 4),
    "mistral-strided-4/4": ("mistral", STRIDED, 4, 4),
    "mistral-sink-6/2": ("mistral", SINK, 6, 2),
    "qwen2-strided-6/2": ("qwen2", STRIDED, 6, 2),
    "qwen2-sink-8/2": ("qwen2", SINK, 8, 2),
    "qwen3-strided-8/2": ("qwen3", STRIDED, 8, 2),
    "qwen3-sink-16/2": ("qwen3", SINK, 16, 2),
    "llama-strided-16/2": ("llama", STRIDED, 16, 2),
}


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES.keys())
def hybrid(request: pytest.FixtureRequest) -> Expected:
    """A model of each family, pattern and ratio of heads, with documents of 61, 48 and 9 tokens."""
    family, pattern, heads, key_value_heads = request.param
    model = build(family, pattern, heads=heads, key_value_heads=key_value_heads)
    return Expected.of(model, [tokens(length, seed=length) for length in (61, 48, 9)])


@pytest.fixture(scope="module", params=[SINK, STRIDED], ids=["sink", "strided"])
def model(request: pytest.FixtureRequest) -> Any:
    """A llama hybrid of either pattern, for tests to which the family makes no difference."""
    return build(pattern=request.param)


Make = Callable[..., Any]


@pytest.fixture(scope="session", name="config")
def config_fixture() -> Make:
    return config


@pytest.fixture(scope="session", name="build")
def build_fixture() -> Make:
    return build


@pytest.fixture(scope="session", name="build_base")
def build_base_fixture() -> Make:
    return build_base


@pytest.fixture(scope="session", name="tokens")
def tokens_fixture() -> Make:
    return tokens


@pytest.fixture(scope="session", name="compute")
def compute_fixture() -> Make:
    return compute


@pytest.fixture(scope="session", name="weights_of")
def weights_of_fixture() -> Make:
    return weights_of


@pytest.fixture(scope="session", name="expect")
def expect_fixture() -> Make:
    return Expected.of


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session", name="check_gradients")
def check_gradients_fixture() -> Make:
    return check_gradients
