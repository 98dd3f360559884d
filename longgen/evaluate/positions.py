"""Loss by position: does the model go on using its context, the further it reads?"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from longgen.engine import Engine
from longgen.engine.cache import Span
from longgen.engine.step import Step, hidden_states
from longgen.errors import UsageError
from longgen.evaluate.asking import STEP_TOKENS, evaluating
from longgen.evaluate.needle import Tokens
from longgen.evaluate.results import Row
from longgen.runtime import ENGINE, TRANSFORMERS, runtime_of

# Unless asked otherwise.
LOSS_WINDOWS = 8
LOSS_BUCKETS = 16
# Logits alive at once: 128 MiB in float32, whatever the vocabulary.
LOGITS_PER_CHUNK = 2**25


@dataclass(frozen=True, kw_only=True, slots=True)
class PositionLoss:
    """Hold the mean next-token loss in buckets of position.

    Attributes:
        context: tokens per window.
        num_windows: windows measured; fewer than asked for where the text holds no more.
        edges: bucket borders in tokens, shape (buckets + 1,). Bucket b holds the predictions made
            at the positions edges[b] .. edges[b + 1] - 1 of a window, a prediction at position p
            having seen p + 1 tokens.
        mean: nats per token, shape (buckets,).
        standard_error: of `mean` over the windows, shape (buckets,); None with a single window.
        by_window: mean of every window, nats per token.
        starts: where every window begins, in tokens of the text.
        within_documents: whether every window lies within one document; None where nobody said
            where documents begin.
        runtime: what ran the model, `longgen.runtime`'s name of it.
    """

    context: int
    num_windows: int
    edges: tuple[int, ...]
    mean: tuple[float, ...]
    standard_error: tuple[float, ...] | None
    by_window: tuple[float, ...] = ()
    starts: tuple[int, ...] = ()
    within_documents: bool | None = None
    runtime: str = TRANSFORMERS

    @property
    def overall(self) -> float:
        """Give the mean over all positions, in nats per token."""
        return float(np.average(self.mean, weights=np.diff(self.edges)))

    def rows(self, variant: str) -> list[dict[str, object]]:
        """Give one results row, case `loss.<variant>`, with the curve in it."""
        errors = None if self.standard_error is None else list(self.standard_error)
        return [
            {
                "case": f"loss.{variant}",
                "length": self.context,
                "value": self.overall,
                "unit": "nats per token",
                "n": self.num_windows,
                "edges": list(self.edges),
                "mean": list(self.mean),
                "standard_error": errors,
                "by_window": list(self.by_window),
                "starts": list(self.starts),
                "within_documents": self.within_documents,
                "runtime": self.runtime,
            }
        ]


def _span(context: int, bos_token_id: int | None) -> int:
    """Return the tokens of text that one window touches, the last only as a target."""
    return context + (bos_token_id is None)


def window_starts(num_tokens: int, span: int, context: int, num_windows: int) -> list[int]:
    """Return where windows begin that lie evenly over a text of at least `span` tokens: at most
    `num_windows`, `context` tokens or more apart, of which each touches `span`."""
    windows = min(num_windows, 1 + (num_tokens - span) // context)
    return [i * (num_tokens - span) // max(1, windows - 1) for i in range(windows)]


def lay_windows(
    num_tokens: int,
    span: int,
    context: int,
    num_windows: int,
    document_starts: Sequence[int] | np.ndarray | None = None,
) -> tuple[list[int], bool | None]:
    """Return where windows begin, in order, and whether each lies within one document.

    Windows keep to documents of at least `span` tokens, and each of those gets as many as the
    others as far as it has room. Where no document is so long, or nobody says where documents
    begin (None), they lie over the text as a whole.

    Args:
        num_tokens: of the text, at least `span`.
        span: tokens that a window touches.
        context: tokens from one window of a document to the next, at least.
        num_windows: at most.
        document_starts: where each document begins, in tokens, shape (documents,).

    Raises:
        UsageError: the documents' starts do not go from 0 up, within the text.
    """
    whole = window_starts(num_tokens, span, context, num_windows)
    if document_starts is None:
        return whole, None
    begins = np.asarray(document_starts)
    lengths = np.diff(begins, append=num_tokens)
    if not len(begins) or begins[0] != 0 or (lengths < 0).any():
        raise UsageError(
            f"Documents must begin at 0 and then one after another within the {num_tokens:,} tokens"
            f" of the text; got starts {begins.tolist()[:8]}."
        )
    fitting = [(b, n) for b, n in zip(begins.tolist(), lengths.tolist(), strict=True) if n >= span]
    if not fitting:
        return whole, False
    shares = _shares([1 + (length - span) // context for _, length in fitting], num_windows)
    starts = [
        begin + start
        for (begin, length), share in zip(fitting, shares, strict=True)
        for start in window_starts(length, span, context, share)
    ]
    return starts, True


def _shares(rooms: Sequence[int], num_windows: int) -> list[int]:
    """Deal windows out to documents that have room for so many each, one to each in every round."""
    shares = [0] * len(rooms)
    left = num_windows
    while left and (takers := [d for d, room in enumerate(rooms) if shares[d] < room]):
        # Fewer windows than documents are spread over these as windows are over tokens.
        chosen = window_starts(len(takers), 1, 1, left)
        for i in chosen:
            shares[takers[i]] += 1
        left -= len(chosen)
    return shares


def loss_by_position(
    model: PreTrainedModel,
    tokens: Tokens,
    context: int,
    *,
    num_windows: int = LOSS_WINDOWS,
    num_buckets: int = LOSS_BUCKETS,
    document_starts: Sequence[int] | np.ndarray | None = None,
    bos_token_id: int | None = None,
    kv_dtype: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> PositionLoss:
    """Measure the next-token loss over held-out windows, by position in the window.

    A hybrid's windows go through the engine's cache in pieces, as prompts do when it is served, and
    other models' through one forward pass of transformers.

    Logits of [context x vocabulary] never exist: the hidden states of a window go through the
    model's output head a few positions at a time, and the softmax is taken in float32. That is the
    model's own loss for every family whose logits are plainly `lm_head(hidden)`, which holds for
    those this package converts.

    Args:
        model: a causal language model with `model.model` and `model.lm_head`.
        tokens: held-out text as token ids, shape (tokens,).
        context: tokens per window.
        num_windows: windows, spread evenly over the text without overlap, as many as the text holds
            at most.
        num_buckets: equal buckets of position.
        document_starts: where each document of the text begins, in tokens, shape (documents,).
            Windows then keep to documents, as `lay_windows` says: where a second document begins
            within a window, the loss rises whatever the model makes of its context.
        bos_token_id: put before every window, where the tokenizer starts sequences with it. The
            window then reads context - 1 tokens of text, and its first prediction is made from bos.
        kv_dtype: of keys and values, as `Engine` takes it; only for hybrids.
        progress: called with (windows done, windows) after every window.

    Raises:
        UsageError: the text is shorter than one window and the token that follows it, or a count
            or the documents' starts make no sense.
    """
    runtime = runtime_of(model)
    if kv_dtype is not None and runtime != ENGINE:
        raise UsageError(
            f"Keys and values in {kv_dtype} are for hybrids, which the engine runs, and "
            f"{type(model).__name__} isn't one."
        )
    text = np.asarray(tokens)
    lead = [] if bos_token_id is None else [bos_token_id]
    span = _span(context, bos_token_id)
    if context < 1 or num_windows < 1 or not 1 <= num_buckets <= context:
        raise UsageError(
            "Loss by position needs at least one window, and between one bucket and as many as the"
            f" context has tokens; got {num_windows} windows and {num_buckets} buckets for a"
            f" context of {context}."
        )
    if len(text) < span:
        raise UsageError(
            f"The held-out text has {len(text):,} tokens, and loss by position over a context of"
            f" {context:,} needs at least {span:,}; give more text or ask for a shorter context."
        )
    starts, within = lay_windows(len(text), span, context, num_windows, document_starts)
    windows = len(starts)
    edges = [context * i // num_buckets for i in range(num_buckets + 1)]
    read: Callable[[torch.Tensor], Iterator[torch.Tensor]]
    read = _EngineReader(model, context, kv_dtype) if runtime == ENGINE else _reader(model)
    means = np.empty((windows, num_buckets))
    for w, start in enumerate(starts):
        sequence = torch.tensor(lead + text[start : start + span].tolist(), device=model.device)
        losses = _window_losses(model, read, sequence)
        means[w] = [losses[a:b].mean() for a, b in pairwise(edges)]
        if progress:
            progress(w + 1, windows)
    error = means.std(axis=0, ddof=1) / np.sqrt(windows) if windows > 1 else None
    return PositionLoss(
        context=context,
        num_windows=windows,
        edges=tuple(edges),
        mean=tuple(means.mean(axis=0).tolist()),
        standard_error=None if error is None else tuple(error.tolist()),
        by_window=tuple((means @ (np.diff(edges) / context)).tolist()),
        starts=tuple(starts),
        within_documents=within,
        runtime=runtime,
    )


def rows_of_windows(
    rows: Sequence[Row],
    num_tokens: int,
    num_windows: int,
    document_starts: Sequence[int] | np.ndarray | None,
    bos_token_id: int | None,
) -> list[dict[str, Any]]:
    """Return those of a text's results rows whose windows lie where `loss_by_position` lays them.

    The same tokens may be other documents; rows are told what is so of these. Those from before
    windows kept to documents don't say where theirs lay, which was over the text as a whole.

    Args:
        rows: results rows of the same text, with the same number of windows asked for.
        num_tokens: of the text.
        num_windows, document_starts, bos_token_id: as `loss_by_position` takes them.
    """
    found: list[dict[str, Any]] = []
    for row in rows:
        context = row["length"]
        size = (num_tokens, _span(context, bos_token_id), context, num_windows)
        starts, within = lay_windows(*size, document_starts)
        if row.get("starts", window_starts(*size)) == starts:
            found.append({**row, **({} if within is None else {"within_documents": within})})
    return found


class _EngineReader:
    """Read windows through the engine's cache, a piece after the other.

    Args:
        model: the hybrid; windows may go beyond its context.
        context: tokens of a window.
        kv_dtype: of keys and values.
    """

    def __init__(self, model: PreTrainedModel, context: int, kv_dtype: str | None) -> None:
        try:
            engine = Engine(
                model,
                max_length=context,
                beyond_context=True,
                max_sequences=1,
                kv_dtype=kv_dtype,
                enforce_eager=True,
            )
        except torch.OutOfMemoryError as error:
            raise UsageError(
                f"The keys and values of {context:,} tokens do not fit into the memory of "
                f"{model.device}; ask for the loss of a shorter context."
            ) from error
        self.model, self.cache, self.impl = engine.model, engine.cache, engine.impl

    def __call__(self, ids: torch.Tensor) -> Iterator[torch.Tensor]:
        """Give the hidden states (n, hidden) of the pieces of a window (T,)."""
        (slot,), pages = self.cache.slots.take(1), self.cache.pages.take(self.cache.pages.size)
        try:
            start = 0
            for piece in ids.split(STEP_TOKENS):
                span = Span(self.cache, start, len(piece), slot, pages)
                yield hidden_states(self.model, Step(self.cache, [span], impl=self.impl), piece)
                start += len(piece)
        finally:
            self.cache.slots.give_back([slot])
            self.cache.pages.give_back(pages)


def _reader(model: PreTrainedModel) -> Callable[[torch.Tensor], Iterator[torch.Tensor]]:
    """Return what reads a window in one forward pass."""

    def read(ids: torch.Tensor) -> Iterator[torch.Tensor]:
        yield model.model(input_ids=ids[None], use_cache=False).last_hidden_state[0]

    return read


def _window_losses(
    model: PreTrainedModel,
    read: Callable[[torch.Tensor], Iterator[torch.Tensor]],
    sequence: torch.Tensor,
) -> np.ndarray:
    """Give the loss in nats of predicting each token after the first; (T + 1,) to (T,), float64."""
    with evaluating(model):
        chunk = max(1, LOGITS_PER_CHUNK // model.config.vocab_size)
        losses, left = [], sequence[1:]
        for hidden in read(sequence[:-1]):
            targets, left = left[: len(hidden)], left[len(hidden) :]
            losses += [
                F.cross_entropy(model.lm_head(h).float(), target.to(h.device), reduction="none")
                for h, target in zip(hidden.split(chunk), targets.split(chunk), strict=True)
            ]
        return torch.cat(losses).double().cpu().numpy()
