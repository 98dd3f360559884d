"""The engine in bf16 beside transformers in bf16, both against the same weights in fp32."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch

from longgen.attention.testing import eager_attention
from longgen.engine import Engine, SamplingParams
from longgen.engine.cache import Span
from longgen.engine.decode import DecodeBatch
from longgen.engine.step import Step, run
from longgen.hf import attention as attention_module
from longgen.pattern import SparsePattern
from tests.hf.conftest import build, tokens

VOCABULARY = 2048


def make_model(
    pattern: SparsePattern, family: str = "llama", heads: tuple[int, int] = (8, 2)
) -> Any:
    """Build a small hybrid that a GPU's kernels take; `heads` are query and key/value heads."""
    return build(
        family,
        pattern=pattern,
        layers="SFFS",
        heads=heads[0],
        key_value_heads=heads[1],
        head_dim=64,
        hidden_size=512,
        intermediate_size=1024,
        vocab_size=VOCABULARY,
        max_position_embeddings=4096,
        initializer_range=0.06,
    )


def make_prompt(length: int) -> list[int]:
    """Draw tokens from the whole of its vocabulary."""
    drawn = 31 * tokens(length, seed=length) + tokens(length, seed=length + 1)
    return drawn.remainder(VOCABULARY).tolist()  # type: ignore[no-any-return]


def eager(q: Any, k: Any, v: Any, *, pattern: Any, layout: Any, scale: Any, **_: Any) -> Any:
    """Attend in plain PyTorch, in the inputs' own dtype: what transformers calls eager."""
    mask = torch.from_numpy(layout.dense_mask(pattern, k.shape[2])).to(q.device)
    return eager_attention(q, k, v, mask, scale)


@torch.no_grad()
def forward(model: Any, ids: list[int]) -> torch.Tensor:
    """Return the logits (T, V), fp32, of transformers' forward pass with eager attention."""
    with mock.patch.object(attention_module, "attention", eager):
        logits: torch.Tensor = model(torch.tensor([ids], device=model.device)).logits[0]
    return logits.float()


@torch.inference_mode()
def engine_logits(engine: Engine, ids: list[int], num_prompt: int, piece: int) -> torch.Tensor:
    """Return the logits (T, V), fp32, of tokens that are all given: a prompt in pieces, then one
    token a step, as requests go."""
    cache = engine.cache
    (slot,), pages = cache.slots.take(1), cache.pages.take(cache.num_pages_for(len(ids)))
    found, start = [], 0
    while start < len(ids):
        length = min(piece, num_prompt - start) if start < num_prompt else 1
        new = ids[start : start + length]
        place = [start + length], [slot], [pages]
        if start < num_prompt:
            step = Step(cache, [Span(cache, start, length, slot, pages)], None, engine.impl)
            logits = run(engine.model, step, new, range(length))
        elif engine.decode_runner is not None:
            logits = engine.decode_runner(new, *place)[0].clone()
        else:
            logits = run(engine.model, Step(cache, [], DecodeBatch.of(cache, *place)), new, [0])
        found.append(logits.float())
        start += length
    cache.slots.give_back([slot])
    cache.pages.give_back(pages)
    return torch.cat(found)


@dataclass
class Divergence:
    """Hold where two greedy texts part: `gap` is how far apart their two tokens' logits are in
    fp32, `allowed` what both roundings can turn round."""

    prompt: int
    position: int
    gap: float
    allowed: float


@dataclass
class Comparison:
    """Hold errors against fp32, over all logits, and where greedy texts part.

    Attributes:
        num_logits: rows of logits compared.
        num_tokens: greedy tokens of all prompts.
        num_equal: those up to where texts part.
        engine, eager: root mean square and largest error, of the engine and of transformers.
        divergences: one a text that parts.
    """

    num_logits: int = 0
    num_tokens: int = 0
    num_equal: int = 0
    engine: tuple[float, float] = (0.0, 0.0)
    eager: tuple[float, float] = (0.0, 0.0)
    divergences: list[Divergence] = field(default_factory=list)

    def check(self) -> None:
        """Assert twice eager's error at most, and that texts part at near-ties alone."""
        for mine, theirs in zip(self.engine, self.eager, strict=True):
            assert 0 < mine <= 2 * theirs, self.summary()
        assert all(one.gap <= one.allowed for one in self.divergences), self.summary()

    def summary(self) -> str:
        """Say it all in a few lines."""
        lines = [
            f"{self.num_logits:,} rows of logits against fp32, root mean square and largest error: "
            f"engine {self.engine[0]:.4f}, {self.engine[1]:.3f}; "
            f"eager {self.eager[0]:.4f}, {self.eager[1]:.3f}",
            f"{self.num_equal:,} of {self.num_tokens:,} greedy tokens before any text parts; "
            f"{len(self.divergences)} texts part:",
        ]
        lines += [
            f"  prompt {one.prompt}, token {one.position}: the two tokens are {one.gap:.4f} apart "
            f"in fp32 (near-tie up to {one.allowed:.3f})"
            for one in self.divergences
        ]
        return "\n".join(lines)


def compare(
    model: Any,
    prompts: list[list[int]],
    count: int,
    piece: int,
    dtype: torch.dtype = torch.bfloat16,
    **settings: Any,
) -> Comparison:
    """Compare the engine with transformers over prompts and `count` greedy tokens after each.

    Args:
        model: a hybrid on its device, in any dtype.
        prompts: token ids.
        count: tokens to write.
        piece: tokens of a prompt that the engine reads at a time.
        dtype: to compare in.
        settings: for the engine.
    """
    low = model.to(dtype)
    true = copy.deepcopy(low).float()
    engine = Engine(
        copy.deepcopy(low),
        max_length=max(map(len, prompts)) + count,
        max_sequences=len(prompts),
        prefill_chunk=piece,
        **settings,
    )
    done = engine.generate(prompts, SamplingParams(max_tokens=count, ignore_eos=True))
    result = Comparison()
    errors: list[tuple[torch.Tensor, torch.Tensor]] = []
    written: list[list[int]] = []
    for prompt, request in zip(prompts, done, strict=True):
        ids = torch.tensor([prompt], device=low.device)
        with mock.patch.object(attention_module, "attention", eager):
            out = low.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=count,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        theirs = out[0, len(prompt) :].tolist()
        written.append(theirs)
        whole = [*prompt, *request.output[:-1]]
        exact = forward(true, whole)
        mine = engine_logits(engine, whole, len(prompt), piece)
        errors.append((mine - exact, forward(low, whole) - exact))
        result.num_logits += len(whole)
        result.num_tokens += count
        # Of the last prompt's token and each new one but the last: what chose a token.
        chose = exact[len(prompt) - 1 :]
        pairs = list(zip(request.output, theirs, strict=True))
        at = next((i for i, (a, b) in enumerate(pairs) if a != b), count)
        result.num_equal += at
        if at < count:
            a, b = (chose[at, token] for token in pairs[at])
            result.divergences.append(Divergence(len(written) - 1, at, float((a - b).abs()), 0.0))
    for name, which in (("engine", 0), ("eager", 1)):
        every = torch.cat([pair[which].flatten() for pair in errors])
        both = float(every.square().mean().sqrt()), float(every.abs().max())
        setattr(result, name, both)
    for one in result.divergences:
        # Each of the two tokens' logits is off by at most twice eager's largest error.
        one.allowed = 4 * result.eager[1]
    return result
