"""What one decoder layer keeps in training for its backward pass, counted as autograd keeps it
(tests/test_activations.py weighs it)."""

from __future__ import annotations

from dataclasses import dataclass

from longgen.accounting import FP32
from longgen.pattern import SparsePattern
from longgen.shapes import ModelShape
from longgen.training_setup import DEFAULT_SETUP, TrainingSetup

_TILE = 128


@dataclass(frozen=True, slots=True)
class LayerActivations:
    """Hold the bytes that autograd keeps of one decoder layer, on one GPU.

    Attributes:
        input: the residual stream that goes in: all that "full" checkpointing keeps.
        attention_side: of the first norm, the projections and attention, `input` (where it is kept
            as it is) and `attended` included.
        mlp_side: of the second norm and the MLP.
        attended: attention's output and its log-sum-exp, which "selective" keeps too.
        products: results of the matrix products, the last one's left out, which "elementwise" keeps
            too.
        repeated: what of `products` is kept in `total` as well.
        exchanged: queries, keys and values on their way to other GPUs and back, for a moment.
    """

    input: int
    attention_side: int
    mlp_side: int
    attended: int
    products: int
    repeated: int
    exchanged: int

    @property
    def total(self) -> int:
        """All that is kept without checkpointing."""
        return self.attention_side + self.mlp_side

    def kept(self, checkpointing: str) -> int:
        """Bytes that are kept from the forward to the backward pass."""
        if checkpointing == "off":
            return self.total
        kept = self.input
        if checkpointing in ("elementwise", "selective"):
            kept += self.attended
        return kept + (self.products if checkpointing == "elementwise" else 0)

    def again(self, checkpointing: str, *, compile: bool) -> int:
        """Bytes that come to what is kept when the layer is computed again."""
        if checkpointing == "off":
            return 0
        again = self.total
        # What was kept of it is not made again: attention's output, and the input if the norm keeps
        # it as it is (separate operations keep another copy).
        again -= self.attended if checkpointing != "full" else 0
        again -= self.repeated if checkpointing == "elementwise" else 0
        return again - (self.input if compile else 0)


def layer_activations(
    shape: ModelShape,
    length: int,
    setup: TrainingSetup = DEFAULT_SETUP,
    pattern: SparsePattern | None = None,
) -> LayerActivations:
    """Return what one layer keeps for its backward pass, with e bytes an element, for each token:

    - a norm: its input (e h) if compiled, else a copy of it in fp32 and the normalised one (4 h + e
      h), and 4 bytes of the scale; Qwen3's norms of heads likewise;
    - inputs of linear layers: one (e h) each for q, k, v and for gate, up together;
    - attention: q, k, v, the output (e D (2 H + 2 K)) and the log-sum-exp (4 H), as the flash
      kernels keep them; the rotary embedding keeps nothing;
    - the MLP: gate, up and their product (3 e i), and silu(gate) if not compiled (4 e i).

    Of results of products it keeps v, gate and up, and those of q and k for compiled norms of
    heads; "elementwise" checkpointing keeps all but the last.

    Under context parallelism a sparse layer's keys and values include those fetched (of the last
    rank, which fetches most); a full one's q, k, v and output are those of all tokens and a share
    of the heads, and the output is kept once more after its way back.

    Args:
        shape: the model.
        length: tokens of one sequence.
        setup: how it is trained.
        pattern: what the layer sees; it matters under context parallelism only. None is full.
    """
    e, tokens = setup.bytes_per_element, setup.tokens(length)
    h, width = shape.hidden_size, shape.head_dim
    heads, kv_heads = shape.num_attention_heads, shape.num_key_value_heads
    norm = tokens * ((e * h if setup.compile else (FP32 + e) * h) + FP32)
    inputs = tokens * e * h
    mlp = tokens * e * shape.intermediate_size * (3 if setup.compile else 4)
    attended = tokens * heads * (e * width + FP32)
    queries, keys = tokens * e * heads * width, 2 * tokens * e * kv_heads * width
    gate_and_up = 2 * tokens * e * shape.intermediate_size
    head_norms, repeated = 0, keys // 2 + gate_and_up
    if shape.family == "qwen3":
        kept = e * width if setup.compile else (FP32 + e) * width
        head_norms = tokens * (heads + kv_heads) * (kept + FP32)
        repeated += queries + keys // 2 if setup.compile else 0
    extra = exchanged = 0
    if setup.context_parallel > 1:
        if pattern is None or pattern.is_full:
            extra, exchanged = _full_exchange(shape, setup, tokens)
        else:
            fetched = setup.batch * _fetched(pattern, length, setup.context_parallel, kv_heads)
            extra = exchanged = 2 * fetched * e * kv_heads * width
    attention = queries + keys + attended + extra
    return LayerActivations(
        input=inputs,
        attention_side=norm + inputs + head_norms + attention,
        mlp_side=norm + inputs + mlp,
        attended=attended,
        products=queries + keys + inputs + gate_and_up,
        repeated=repeated,
        exchanged=exchanged,
    )


def _full_exchange(shape: ModelShape, setup: TrainingSetup, tokens: int) -> tuple[int, int]:
    """Return what a full layer keeps more under context parallelism, and what it has on its way."""
    # It needs torch, and planning for one GPU should not wait for it.
    from longgen.parallel.heads import heads_obstacle, heads_per_rank

    e, width, size = setup.bytes_per_element, shape.head_dim, setup.context_parallel
    heads, kv_heads = shape.num_attention_heads, shape.num_key_value_heads
    if heads_obstacle(heads, kv_heads, size):
        fetched = tokens * (size - 1) * 2 * e * kv_heads * width
        return fetched, fetched
    queries, keys = heads_per_rank(heads, kv_heads, size)
    copies = size * keys - kv_heads
    moved = size * tokens * e * width * (queries + 2 * keys)
    return tokens * e * width * (heads + 2 * copies), moved


def _fetched(pattern: SparsePattern, length: int, size: int, num_key_value_heads: int) -> int:
    """Return the keys that the last of `size` ranks fetches of one document, in whole tiles."""
    start = (size - 1) * length // size
    most = max(
        sum(min(stop, start) - first for first, stop in ranges if first < start)
        for head in range(min(pattern.num_head_classes, num_key_value_heads))
        for ranges in [pattern.key_ranges(start, length, head)]
    )
    return -(-most // _TILE) * _TILE
