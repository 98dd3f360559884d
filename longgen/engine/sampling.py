"""Choose the next tokens: what a request may ask for, and draws that depend on nothing else.

Shapes: N rows of logits, one for each request that gets a token in this step; V entries in the
vocabulary.

A draw is reproducible bit for bit because nothing in it depends on the order of a sum.
Probabilities become whole numbers, whose running sums are exact on every device and for every
batch; one number between 0 and 1, hashed from the request's seed and the count of its tokens so
far, picks a token from them. No generator of PyTorch takes part, so CPU and GPU draw alike from the
same logits. (The logits themselves differ between devices in their last digits, as ever.)
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from longgen.errors import UsageError

# What `Sampler.sample` returns for a row from which no token can be chosen.
INVALID_TOKEN = -1

# The likeliest token weighs this much. Tokens 2**41 times less likely weigh nothing, and the sum of
# 2**22 such weights still fits 63 bits.
_TOP_WEIGHT = 2**40
_MAX_VOCAB_SIZE = 2**22
_MAX_SEED = 2**64 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Say how a request's tokens are chosen and where they end. Names are those of vLLM.

    top_k, top_p and min_p may be given at temperature 0 and then have no effect: the likeliest
    token passes all of them. `stop` and `stop_token_ids` may be given as lists; they are kept as
    tuples.

    Attributes:
        max_tokens: tokens to write at most.
        temperature: what logits are divided by; 0 takes the likeliest token (greedy).
        top_p: keep the likeliest tokens that together reach this probability; 1 keeps all.
        top_k: keep so many of the likeliest tokens, and those tied with the last; 0 keeps all.
        min_p: keep tokens at least this fraction as likely as the likeliest; 0 keeps all.
        repetition_penalty: what the positive logits of tokens in the prompt or the output are
            divided by, and the negative ones multiplied by; 1 changes nothing.
        stop: strings that end the text, which does not include them.
        stop_token_ids: tokens that end the text.
        ignore_eos: write on where the model would end its text.
        seed: decides what is drawn; None draws differently each time.

    Raises:
        UsageError: for a value that is not allowed.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int | None = None

    def __post_init__(self) -> None:
        self._check_whole("max_tokens", 1)
        self._check_number("temperature", "0 or a finite number above", lambda x: x >= 0)
        self._check_number("top_p", "a number above 0 and at most 1", lambda x: 0 < x <= 1)
        self._check_whole("top_k", 0)
        self._check_number("min_p", "a number from 0 to 1", lambda x: 0 <= x <= 1)
        self._check_number("repetition_penalty", "a finite number above 0", lambda x: x > 0)
        self._check_tuple("stop", "texts of at least one character", _is_text)
        self._check_tuple("stop_token_ids", "token ids, whole numbers of at least 0", _is_token_id)
        if not isinstance(self.ignore_eos, bool):
            raise self._refusal("ignore_eos", "true or false")
        if self.seed is not None:
            self._check_whole("seed", 0, _MAX_SEED)

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken, without a draw."""
        return self.temperature == 0

    @property
    def takes_likeliest(self) -> bool:
        """Whether the likeliest token is taken by the logits as they are."""
        return self.is_greedy and self.repetition_penalty == 1

    @property
    def is_filtered(self) -> bool:
        """Whether top_k, top_p or min_p leaves tokens out."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    def _refusal(self, name: str, allowed: str) -> UsageError:
        return UsageError(f"{name} is {getattr(self, name)!r}; give {allowed}.")

    def _check_whole(self, name: str, lowest: int, highest: int | None = None) -> None:
        value = getattr(self, name)
        if not _is_whole(value) or value < lowest or (highest is not None and value > highest):
            upwards = f"of at least {lowest}" if highest is None else f"from {lowest} to {highest}"
            raise self._refusal(name, f"a whole number {upwards}")

    def _check_number(self, name: str, allowed: str, holds: Callable[[float], bool]) -> None:
        value = getattr(self, name)
        try:
            number = float(value) if isinstance(value, float) or _is_whole(value) else math.nan
        except OverflowError:
            number = math.inf
        if not (math.isfinite(number) and holds(number)):
            raise self._refusal(name, allowed)
        object.__setattr__(self, name, number)

    def _check_tuple(self, name: str, items: str, holds: Callable[[Any], bool]) -> None:
        value = getattr(self, name)
        if not isinstance(value, tuple | list) or not all(map(holds, value)):
            raise self._refusal(name, f"a list of {items}")
        object.__setattr__(self, name, tuple(value))


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_token_id(value: Any) -> bool:
    return _is_whole(value) and value >= 0


class SamplingRow:
    """Hold what sampling knows of one request, for as long as the request lives.

    Preemption does not touch it: a request that is computed again keeps its row. `Sampler.sample`
    only reads it, so a step that failed can be repeated and draws the same.

    Attributes:
        params: what the request asks for.
        seed: the request's own, or one made up for it.
        num_sampled: tokens that the request has got so far.
    """

    __slots__ = ("_ids", "_is_seen", "_num_marked", "num_sampled", "params", "seed")

    def __init__(self, params: SamplingParams, prompt_ids: Iterable[int] = ()) -> None:
        """Begin a request with its prompt's token ids, which the repetition penalty needs."""
        self.params = params
        self.seed = secrets.randbelow(_MAX_SEED + 1) if params.seed is None else params.seed
        self.num_sampled = 0
        self._ids = list(prompt_ids) if params.repetition_penalty != 1 else []
        self._is_seen: Tensor | None = None
        self._num_marked = 0

    def append(self, token_id: int) -> None:
        """Note the token that the request got. Without this call the next draw is the same one."""
        assert token_id >= 0, token_id
        self.num_sampled += 1
        if self.params.repetition_penalty != 1:
            self._ids.append(token_id)

    def uniform(self) -> float:
        """Return the number in [0, 1) that decides the next token: a function of `seed` and
        `num_sampled` alone."""
        place = self.seed.to_bytes(8, "little") + self.num_sampled.to_bytes(8, "little")
        hashed = int.from_bytes(blake2b(place, digest_size=8).digest(), "little")
        return (hashed >> 11) * 2.0**-53

    def is_seen(self, vocab_size: int, device: torch.device) -> Tensor:
        """Return which tokens are in the prompt or the output, bool (V,); only for requests with a
        repetition penalty.

        Ids beyond the logits cannot be written by the model, and are passed over.
        """
        mask = self._is_seen
        if mask is None or mask.shape != (vocab_size,) or mask.device != device:
            mask = self._is_seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            self._num_marked = 0
        new = [token for token in self._ids[self._num_marked :] if token < vocab_size]
        if new:
            mask[torch.tensor(new, device=device)] = True
        self._num_marked = len(self._ids)
        return mask


class Sampler:
    """Choose a token from each row of logits.

    Processors come in transformers' order: repetition penalty, temperature, top-k, top-p, min-p.
    The sampler holds no state; that of a request is in its `SamplingRow`.
    """

    def __init__(self, *, max_logits: int = 2**22) -> None:
        """Set how many logits are worked on at a time: about 60 bytes each, and at least one row.
        It bounds memory and does not change what is drawn."""
        assert max_logits > 0, max_logits
        self.max_logits = max_logits

    def sample(self, logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
        """Return a token for each row.

        A row that holds NaN or +inf, or nothing above -inf, gets `INVALID_TOKEN` and leaves the
        others as they are. Nothing raises here, since on a GPU that would wait for the device: look
        for negative tokens where they are read anyway, fail that request with what `explain` says,
        and call `SamplingRow.append` for every other one.

        Args:
            logits: (N, V), any float dtype, any device; left as it is. Worked on in fp32.
            rows: N of them.

        Returns:
            (N,), int64, on the device of `logits`.
        """
        tokens = [_choose(_penalise(part, some), some) for part, some in self._parts(logits, rows)]
        return torch.cat(tokens) if tokens else logits.new_empty(0, dtype=torch.int64)

    def probabilities(self, logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
        """Return what `sample` draws from: (N, V), fp64.

        A greedy row has 1 at its token; a row from which no token can be chosen has only NaN.
        Arguments are those of `sample`.
        """
        parts = [
            _probabilities(_penalise(part, some), some) for part, some in self._parts(logits, rows)
        ]
        return torch.cat(parts) if parts else logits.new_empty(logits.shape, dtype=torch.float64)

    def explain(self, logits: Tensor, row: SamplingRow) -> str:
        """Say why a row got `INVALID_TOKEN`, given its logits (V,) and itself."""
        scores = _penalise(logits[None], [row])[0]
        nan, high, low = (
            int(found.sum()) for found in (scores.isnan(), scores.isposinf(), scores.isneginf())
        )
        penalty = row.params.repetition_penalty
        return (
            f"Token {row.num_sampled + 1:,} cannot be chosen: of {len(scores):,} logits, {nan:,} "
            f"are NaN, {high:,} +inf and {low:,} -inf"
            + (f" (after a repetition_penalty of {penalty:g})" if penalty != 1 else "")
            + ". The model's output for this text overflowed or its weights are damaged; try a "
            "wider dtype (bfloat16 or float32)."
        )

    def _parts(
        self, logits: Tensor, rows: Sequence[SamplingRow]
    ) -> list[tuple[Tensor, Sequence[SamplingRow]]]:
        assert logits.ndim == 2 and logits.is_floating_point(), (logits.shape, logits.dtype)
        assert len(logits) == len(rows), (len(logits), len(rows))
        assert 0 < logits.shape[1] <= _MAX_VOCAB_SIZE, logits.shape
        size = max(1, self.max_logits // logits.shape[1])
        return [
            (logits[start : start + size], rows[start : start + size])
            for start in range(0, len(rows), size)
        ]


def _penalise(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Return logits (N, V) in fp32, after the repetition penalty."""
    scores = logits.float()
    places = [i for i, row in enumerate(rows) if row.params.repetition_penalty != 1]
    if not places:
        return scores
    device = scores.device
    index = torch.tensor(places, device=device)
    penalty = torch.tensor([[rows[i].params.repetition_penalty] for i in places], device=device)
    is_seen = torch.stack([rows[i].is_seen(scores.shape[1], device) for i in places])
    part = scores[index]
    penalised = torch.where(part < 0, part * penalty, part / penalty)
    return scores.index_copy(0, index, torch.where(is_seen, penalised, part))


def _choose(scores: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Return the tokens (N,) for penalised scores (N, V)."""
    tokens, is_valid = _likeliest(scores)
    for index, some, candidates in _drawn(scores, is_valid, rows):
        uniform = torch.tensor([[row.uniform()] for row in some], dtype=torch.float64)
        tokens[index] = candidates.pick(uniform.to(scores.device))
    return tokens.where(is_valid, INVALID_TOKEN)


def _probabilities(scores: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Return the probabilities (N, V) for penalised scores (N, V)."""
    tokens, is_valid = _likeliest(scores)
    result = torch.zeros(scores.shape, dtype=torch.float64, device=scores.device)
    result.scatter_(1, tokens[:, None], 1.0)
    for index, _, candidates in _drawn(scores, is_valid, rows):
        result[index] = candidates.probabilities()
    return result.masked_fill(~is_valid[:, None], torch.nan)


def likeliest(logits: Tensor) -> Tensor:
    """Return what `Sampler.sample` does for rows (N, V) of which all take the likeliest token."""
    tokens, is_valid = _likeliest(logits.float())
    return tokens.where(is_valid, INVALID_TOKEN)


def _likeliest(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return the likeliest token of each row, (N,), and which rows are valid, bool (N,)."""
    top, tokens = scores.max(dim=-1)
    # The largest is NaN where anything is, and infinite where no softmax is defined.
    return tokens, top.isfinite()


def _drawn(
    scores: Tensor, is_valid: Tensor, rows: Sequence[SamplingRow]
) -> Iterator[tuple[Tensor, list[SamplingRow], _Candidates]]:
    """Give the indices of rows that are drawn, the rows, and what they are drawn from.

    Filtered rows are sorted, the others are not. Which a row is depends on its own parameters
    alone, and so does what it draws. Invalid rows get some valid candidates.
    """
    for is_filtered in (False, True):
        places = [
            i
            for i, row in enumerate(rows)
            if not row.params.is_greedy and row.params.is_filtered == is_filtered
        ]
        if places:
            index = torch.tensor(places, device=scores.device)
            some = [rows[i] for i in places]
            valid = scores[index].masked_fill(~is_valid[index, None], 0.0)
            yield index, some, _Candidates.of(valid, some)


@dataclass(frozen=True, slots=True)
class _Candidates:
    """Hold R rows' tokens with whole-number weights; the first of each row, up to `total`, remain.

    Attributes:
        weights: int64 (R, V).
        cumulative: their running sums, (R, V).
        total: the running sum up to the last token that remains, (R, 1).
        order: the token at each place, (R, V); None where places are tokens.
    """

    weights: Tensor
    cumulative: Tensor
    total: Tensor
    order: Tensor | None

    @classmethod
    def of(cls, scores: Tensor, rows: Sequence[SamplingRow]) -> _Candidates:
        """Weigh and filter tokens by finite-topped scores (R, V); all rows are filtered or none."""
        asked = [
            (row.params.temperature, row.params.top_k, row.params.top_p, row.params.min_p)
            for row in rows
        ]
        # One transfer to the device for all of them.
        settings = torch.tensor(asked, dtype=torch.float64).to(scores.device)
        temperature, top_k, top_p, min_p = settings.split(1, dim=-1)
        order = None
        if rows[0].params.is_filtered:
            # Stable: which of equal tokens top-p leaves out must not depend on the batch.
            scores, order = scores.sort(dim=-1, descending=True, stable=True)
        top = scores.amax(-1, keepdim=True).double()
        # In fp64, an exponential's last digit almost never decides how a weight is rounded.
        weights = ((scores.double() - top) / temperature).exp().mul(_TOP_WEIGHT).round().long()
        cumulative = weights.cumsum(-1)
        total = cumulative[:, -1:]
        if order is not None:
            # Tokens come likeliest first, so what each filter keeps is the beginning of the row.
            vocab_size = scores.shape[1]
            kth = torch.where(top_k > 0, top_k, vocab_size).clamp(max=vocab_size).long() - 1
            in_k = scores >= scores.gather(-1, kth)
            total = cumulative.gather(-1, in_k.sum(-1, keepdim=True) - 1)
            in_p = cumulative - weights < top_p * total
            in_min = weights >= min_p * _TOP_WEIGHT
            kept = (in_k & in_p & in_min).sum(-1, keepdim=True)
            total = cumulative.gather(-1, kept - 1)
        return cls(weights, cumulative, total, order)

    def pick(self, uniform: Tensor) -> Tensor:
        """Return the tokens (R,) for numbers in [0, 1), fp64 (R, 1)."""
        # Below the total even after rounding: the largest number is 1 - 2**-53.
        target = (uniform * self.total).long()
        # The first place whose running sum is above the target: never one that weighs nothing.
        place = torch.searchsorted(self.cumulative, target, right=True)
        return (place if self.order is None else self.order.gather(-1, place))[:, 0]

    def probabilities(self) -> Tensor:
        """Return each token's probability, fp64 (R, V)."""
        remaining = self.weights.where(self.cumulative <= self.total, 0)
        shares = remaining / self.total.double()
        if self.order is None:
            return shares
        return torch.zeros_like(shares).scatter(-1, self.order, shares)
