"""One pass of the model over new tokens of many sequences, laid end to end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from longgen.attention import attention
from longgen.engine.cache import EngineCache, Span
from longgen.engine.decode import DecodeBatch
from longgen.engine.kernels import launching_on
from longgen.transfer import to_device

# Tokens whose keys and values set the scales of an 8 bit cache.
_SCALE_TOKENS = 256


class Step:
    """Attend for the layers of one pass: each sequence to its own past.

    Args:
        cache: keys and values of all sequences.
        spans: pieces of prompts, in the order of the batch.
        decode: the sequences of which one token follows behind those; None if there are none.
        impl: the attention implementation of the prompts (`longgen.attention`).
    """

    def __init__(
        self,
        cache: EngineCache,
        spans: Sequence[Span],
        decode: DecodeBatch | None = None,
        impl: str = "auto",
    ) -> None:
        self.cache, self.spans, self.decode, self.impl = cache, list(spans), decode, impl

    def positions(self) -> torch.Tensor:
        """Return the position of every token in its sequence, (N,)."""
        device = self.cache.device
        parts = [
            torch.arange(span.start, span.start + span.length, device=device) for span in self.spans
        ]
        if self.decode is not None:
            parts.append(self.decode.lengths - 1)
        return torch.cat(parts)

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None
    ) -> torch.Tensor:
        """Store the new keys and values of a layer and attend.

        Args:
            layer: index of the layer.
            q: queries (1, H, N, D), rotary applied; N new tokens in all.
            k: keys (1, Hkv, N, D).
            v: values (1, Hkv, N, D).
            scale: factor on the scores.

        Returns:
            (1, N, H, D).
        """
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        is_full = self.cache.plan.layers[layer] == "F"
        pattern = self.cache.plan.pattern_of(layer)
        outputs, begin = [], 0
        for span in self.spans:
            own = slice(begin, begin + span.length)
            begin += span.length
            queries, keys, values = (x[0, :, own].transpose(0, 1) for x in (q, k, v))
            if is_full:
                span.write_full(layer, keys, values)
                layout = span.full_layout
                held = span.read_full(layer, q.dtype)
            else:
                layout = span.sparse_layout
                held = span.swap_sparse(layer, keys, values)
            outputs.append(
                attention(
                    queries[None],
                    *held,
                    pattern=pattern,
                    layout=layout,
                    scale=scale,
                    impl=self.impl,
                )
            )
        if self.decode is not None:
            queries, keys, values = (x[0, :, begin:].transpose(0, 1) for x in (q, k, v))
            outputs.append(self.decode.attend(layer, queries, keys, values, scale)[None])
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)


@torch.inference_mode()
def run(model: Any, step: Step, tokens: Sequence[int], rows: Sequence[int]) -> torch.Tensor:
    """Run a hybrid model over the new tokens of a step.

    Args:
        model: a LongGen causal language model.
        step: the sequences and their cache.
        tokens: the new tokens, end to end (N): spans, then those that decode.
        rows: of which of them logits are wanted.

    Returns:
        logits (len(rows), vocabulary).
    """
    device = step.cache.device
    return run_tokens(
        model,
        step,
        to_device(torch.tensor(list(tokens)), device),
        to_device(torch.tensor(list(rows), dtype=torch.long), device),
    )


def run_tokens(
    model: Any, step: Step, tokens: torch.Tensor, rows: torch.Tensor | None
) -> torch.Tensor:
    """Run a hybrid model over tokens (N,) on its device; `rows` None gives logits of all."""
    hidden = hidden_states(model, step, tokens)
    return model.lm_head(hidden if rows is None else hidden[rows])


def hidden_states(model: Any, step: Step, tokens: torch.Tensor) -> torch.Tensor:
    """Run a hybrid model over tokens (N,), up to its output head: (N, hidden size)."""
    with launching_on(step.cache.device):
        hidden: torch.Tensor = model.model(
            input_ids=tokens[None],
            position_ids=step.positions()[None],
            use_cache=False,
            longgen_step=step,
        ).last_hidden_state[0]
    return hidden


def set_scales(model: Any, cache: EngineCache, impl: str) -> None:
    """Have random tokens set the scales of an empty 8 bit cache, and leave it empty.

    So no request decides how the keys of all others are kept, and caches of one model and layout
    have the same scales. A cache of another format has none.
    """
    if cache.scales is None:
        return
    length = min(_SCALE_TOKENS, cache.max_length)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (length,), generator=generator).tolist()
    pages = cache.pages.take(cache.num_pages_for(length))
    run(model, Step(cache, [Span(cache, 0, length, 0, pages)], impl=impl), tokens, [0])
    cache.pages.give_back(pages)
    cache.clear_slot(0)
