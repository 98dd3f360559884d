"""Sampling: parameters, transformers' processors, exact distributions, and independent draws."""

import itertools
import math
import random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from longgen.engine.sampling import INVALID_TOKEN, Sampler, SamplingParams, SamplingRow
from longgen.errors import UsageError

DRAWS = 20_000


def rows_of(*params: SamplingParams) -> list[SamplingRow]:
    return [SamplingRow(each) for each in params]


@st.composite
def params(draw: st.DrawFn, greedy: bool = True) -> SamplingParams:
    temperatures = st.floats(0.05, 4.0)
    return SamplingParams(
        temperature=draw(st.just(0.0) | temperatures if greedy else temperatures),
        top_p=draw(st.just(1.0) | st.floats(0.01, 1.0)),
        top_k=draw(st.sampled_from((0, 0, 1, 2, 7, 50, 1000))),
        min_p=draw(st.just(0.0) | st.floats(0.0, 1.0)),
        repetition_penalty=draw(st.just(1.0) | st.floats(0.3, 3.0)),
        seed=draw(st.integers(0, 2**64 - 1)),
    )


def normal_logits(seed: int, num_rows: int, vocab_size: int, scale: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, vocab_size, generator=generator) * scale


def prompt(seed: int, vocab_size: int) -> list[int]:
    return random.Random(seed).choices(range(vocab_size), k=9)


# Parameters


def test_defaults_are_greedy_and_unfiltered() -> None:
    default = SamplingParams()
    assert (default.max_tokens, default.is_greedy, default.is_filtered) == (256, True, False)
    assert SamplingParams(temperature=1, stop=["a"], stop_token_ids=[3]) == SamplingParams(
        temperature=1.0, stop=("a",), stop_token_ids=(3,)
    )
    # Without effect at temperature 0, and allowed.
    assert SamplingParams(top_p=0.5, top_k=3, min_p=0.1).is_greedy


NO_NUMBERS = (math.nan, math.inf, -math.inf, True, "1", None, 10**400, -0.1)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *itertools.product(("temperature", "top_p", "min_p", "repetition_penalty"), NO_NUMBERS),
        *itertools.product(("max_tokens", "top_k", "seed"), (-1, True, 1.0, math.nan, "1")),
        *itertools.product(("top_p", "min_p"), (1.001, 2)),
        *itertools.product(("top_p", "repetition_penalty", "max_tokens"), (0,)),
        *itertools.product(("max_tokens", "top_k"), (None,)),
        *itertools.product(("stop", "stop_token_ids"), ("ab", None, 3, {"a"}, (None,), (1.0,))),
        *[("stop", ("a", "")), ("stop", (3,))],
        *[("stop_token_ids", (-1,)), ("stop_token_ids", (True,)), ("stop_token_ids", ("a",))],
        *itertools.product(("ignore_eos",), (0, 1, None, "yes")),
        *[("seed", 2**64)],
    ],
)
def test_a_value_that_is_not_allowed_is_named(name: str, value: Any) -> None:
    with pytest.raises(UsageError) as caught:
        SamplingParams(**{name: value})
    message = str(caught.value)
    assert message.startswith(f"{name} is {value!r}; give ") and message.endswith(".")


# The distribution


def expected_probabilities(
    logits: torch.Tensor, given: SamplingParams, ids: list[int]
) -> torch.Tensor:
    """Return what transformers' processors make of one row (V,), in fp64."""
    chain = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(given.repetition_penalty)])
    if given.temperature:
        chain.append(TemperatureLogitsWarper(given.temperature))
        if given.top_k:
            chain.append(TopKLogitsWarper(given.top_k))
        if given.top_p < 1:
            chain.append(TopPLogitsWarper(given.top_p))
        if given.min_p:
            chain.append(MinPLogitsWarper(given.min_p))
    scores = chain(torch.tensor([ids]), logits[None].double())[0]
    if not given.temperature:
        return torch.zeros_like(scores).index_fill(0, scores.argmax(), 1.0)
    return scores.softmax(-1)


@given(st.lists(params(), min_size=1, max_size=5), st.integers(0, 2**32), st.integers(2, 300))
def test_probabilities_are_those_of_transformers_processors(
    many: list[SamplingParams], seed: int, vocab_size: int
) -> None:
    logits = normal_logits(seed, len(many), vocab_size)
    ids = prompt(seed, vocab_size)
    found = Sampler().probabilities(logits, [SamplingRow(each, ids) for each in many])
    expected = torch.stack(
        [expected_probabilities(*each, ids) for each in zip(logits, many, strict=True)]
    )
    assert torch.equal(found > 1e-9, expected > 1e-9)
    # Penalised logits are fp32: half a digit of 2**-24, up to 60, over a temperature of 0.05.
    torch.testing.assert_close(found, expected, rtol=0, atol=60 * 2**-24 / 0.05)


def test_top_k_keeps_what_is_tied_with_the_last_and_top_p_does_not() -> None:
    logits = torch.tensor([[0.0, 1.0, 1.0, 1.0, -1.0]]).expand(2, -1)
    rows = rows_of(SamplingParams(temperature=1, top_k=2), SamplingParams(temperature=1, top_p=0.4))
    top_k, top_p = Sampler().probabilities(logits, rows)
    third = torch.tensor(1 / 3, dtype=torch.float64)
    torch.testing.assert_close(top_k[1:4], third.expand(3))
    # Two of the three make up 0.59 of the whole; of equal ones, the first are kept.
    assert top_p.tolist() == [0.0, 0.5, 0.5, 0.0, 0.0]


def chi_square_p(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    """Return how likely counts (V,) at least this far from the probabilities are."""
    assert not counts[probabilities == 0].any()
    expected = probabilities[probabilities > 0] * counts.sum()
    statistic = ((counts[probabilities > 0] - expected) ** 2 / expected).sum()
    freedom = torch.tensor((len(expected) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic / 2))


SAMPLED = [
    SamplingParams(temperature=1.0, seed=11),
    SamplingParams(temperature=0.6, seed=12),
    SamplingParams(temperature=1.5, top_k=5, seed=13),
    SamplingParams(temperature=1.0, top_p=0.8, seed=14),
    SamplingParams(temperature=2.0, min_p=0.2, seed=15),
    SamplingParams(
        temperature=1.2, top_k=9, top_p=0.95, min_p=0.05, repetition_penalty=1.5, seed=16
    ),
]


@pytest.mark.parametrize("given_params", SAMPLED)
@pytest.mark.parametrize("vary", ["token", "seed"])
def test_draws_follow_the_exact_probabilities(given_params: SamplingParams, vary: str) -> None:
    logits = normal_logits(5, 1, 12, scale=1.5)
    ids = [0, 1, 2]
    rows = [SamplingRow(given_params, ids) for _ in range(DRAWS)]
    for i, row in enumerate(rows):
        if vary == "token":
            row.num_sampled = i
        else:
            row.seed = i
    counts = Sampler().sample(logits.expand(DRAWS, -1), rows).bincount(minlength=12)
    expected = expected_probabilities(logits[0], given_params, ids)
    assert chi_square_p(counts.double(), expected) > 1e-4


def test_successive_draws_are_not_related() -> None:
    row = SamplingRow(SamplingParams(temperature=1, seed=3))
    numbers = []
    for _ in range(DRAWS):
        numbers.append(row.uniform())
        row.append(0)
    pairs = torch.tensor(
        [int(8 * a) * 8 + int(8 * b) for a, b in zip(numbers[::2], numbers[1::2], strict=True)]
    )
    flat = torch.full((64,), 1 / 64, dtype=torch.float64)
    assert chi_square_p(pairs.bincount(minlength=64).double(), flat) > 1e-4
    assert min(numbers) >= 0 and max(numbers) < 1


def test_draws_are_the_same_in_every_release() -> None:
    """What a seed stands for is a promise: these were written down when it was first made."""
    row = SamplingRow(SamplingParams(temperature=1, seed=2024))
    numbers = []
    for _ in range(3):
        numbers.append(row.uniform())
        row.append(0)
    assert numbers == [0.13026992391823278, 0.39631491729297474, 0.5933388587449825]


# Greedy


@given(st.integers(0, 2**32), st.floats(0.3, 3.0))
def test_greedy_is_the_likeliest_penalised_token(seed: int, penalty: float) -> None:
    logits = normal_logits(seed, 2, 40, scale=0.5)
    ids = prompt(seed, 40)
    rows = [SamplingRow(SamplingParams(repetition_penalty=penalty), ids) for _ in range(2)]
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([ids, ids]), logits.clone())
    assert torch.equal(Sampler().sample(logits, rows), expected.argmax(-1))


def test_the_penalty_follows_the_output() -> None:
    row = SamplingRow(SamplingParams(repetition_penalty=2.0), [3])
    logits = torch.tensor([[3.0, 2.0, 1.6, 100.0 / 64, -1.0]])
    taken = []
    for _ in range(4):
        taken.append(Sampler().sample(logits, [row]).item())
        row.append(taken[-1])
    assert taken == [0, 1, 2, 0]
    # As in transformers, tokens that the logits do not reach are passed over.
    row.append(1000)
    assert Sampler().sample(logits, [row]).item() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_logits_of_any_float_dtype_are_left_as_they_are(dtype: torch.dtype) -> None:
    logits = normal_logits(1, 3, 64).to(dtype)
    before = logits.clone()
    some = [SamplingParams(repetition_penalty=2.0), *SAMPLED[-2:]]
    found = Sampler().sample(logits, [SamplingRow(each, [1, 2]) for each in some])
    assert torch.equal(logits, before) and found.dtype == torch.int64
    again = Sampler().sample(logits.float(), [SamplingRow(each, [1, 2]) for each in some])
    assert torch.equal(found, again)


# Independence


@given(
    st.lists(params(), min_size=1, max_size=8),
    st.integers(0, 2**32),
    st.randoms(use_true_random=False),
    st.integers(1, 400),
)
def test_a_row_draws_the_same_alone_and_in_any_company(
    many: list[SamplingParams], seed: int, order: random.Random, max_logits: int
) -> None:
    vocab_size = 97
    logits = normal_logits(seed, len(many), vocab_size)
    rows = [SamplingRow(each, prompt(seed + i, vocab_size)) for i, each in enumerate(many)]
    for row in rows:
        row.num_sampled = order.randrange(1000)
    together = Sampler().sample(logits, rows)
    alone = [Sampler().sample(logits[i : i + 1], [row]).item() for i, row in enumerate(rows)]
    assert together.tolist() == alone
    places = list(range(len(rows)))
    order.shuffle(places)
    shuffled = Sampler(max_logits=max_logits).sample(logits[places], [rows[i] for i in places])
    assert shuffled.tolist() == [alone[i] for i in places]


def test_a_request_continues_as_if_it_had_never_been_interrupted() -> None:
    """The engine keeps the row of a preempted request, and its logits are computed again."""
    logits = normal_logits(9, 20, 50)
    given_params = SamplingParams(temperature=1.3, top_p=0.9, repetition_penalty=1.2, seed=4)

    def run(retry_at: int | None, device_change_at: int | None = None) -> list[int]:
        row, taken = SamplingRow(given_params, [1, 2, 3]), []
        for step, each in enumerate(logits):
            if step == retry_at:
                Sampler().sample(each[None], [row])  # a step whose result was lost
            if step == device_change_at:
                row.is_seen(7, torch.device("cpu"))  # its table is made anew
            taken.append(int(Sampler().sample(each[None], [row])))
            row.append(taken[-1])
        return taken

    plain = run(None)
    assert plain == run(5) == run(None, 8) and len(set(plain)) > 5


def test_a_seed_is_made_up_for_those_without() -> None:
    rows = rows_of(*[SamplingParams(temperature=1)] * 8)
    assert len({row.seed for row in rows}) == 8
    tokens = Sampler().sample(torch.zeros(8, 4000), rows)
    assert len(set(tokens.tolist())) > 4


def test_no_rows_give_no_tokens() -> None:
    assert Sampler().sample(torch.zeros(0, 5), []).tolist() == []
    assert Sampler().probabilities(torch.zeros(0, 5), []).shape == (0, 5)


# Numbers at the edge


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-8, 1e8, 1.7e308])
def test_extreme_temperatures(temperature: float) -> None:
    logits = torch.tensor([[0.0, 3e38, -3e38, -math.inf, 2.9e38, 3.0e38]])
    row = SamplingRow(SamplingParams(temperature=temperature, seed=1))
    found = Sampler().probabilities(logits, [row])[0]
    if temperature < 1e10:
        assert found.tolist() == [0.0, 0.5, 0.0, 0.0, 0.0, 0.5]
    else:
        even = torch.tensor([0.2, 0.2, 0.2, 0.0, 0.2, 0.2], dtype=torch.float64)
        torch.testing.assert_close(found, even)
    assert Sampler().sample(logits, [row]).item() in found.nonzero()


@given(st.lists(params(), min_size=4, max_size=6))
def test_rows_without_a_distribution_fail_alone(many: list[SamplingParams]) -> None:
    logits = normal_logits(2, len(many), 33)
    rows = rows_of(*many)
    expected = Sampler().sample(logits, rows)
    broken = logits.clone()
    broken[0, 5] = math.nan
    broken[1, 6] = math.inf
    broken[2] = -math.inf
    found = Sampler().sample(broken, rows)
    assert found[:3].tolist() == [INVALID_TOKEN] * 3
    assert torch.equal(found[3:], expected[3:])
    probabilities = Sampler().probabilities(broken, rows)
    assert probabilities[:3].isnan().all() and not probabilities[3:].isnan().any()


class Given(SamplingRow):
    """Draw with a given number."""

    number = 0.0

    def uniform(self) -> float:
        return self.number


@pytest.mark.parametrize("options", [{}, {"min_p": 1e-30}])
@pytest.mark.parametrize("vocab_size", [7, 20_000])
def test_the_ends_of_a_draw_are_tokens_that_can_be_drawn(
    options: dict[str, float], vocab_size: int
) -> None:
    logits = torch.linspace(0.0, -26.0, vocab_size)[None]
    logits[0, 0] = logits[0, -1] = -math.inf
    row = Given(SamplingParams(temperature=1.0, **options))
    assert Sampler().sample(logits, [row]).item() == 1
    row.number = 1 - 2.0**-53
    assert Sampler().sample(logits, [row]).item() == vocab_size - 2


@given(params(greedy=False), st.integers(0, 32))
def test_masked_tokens_are_never_drawn(each: SamplingParams, only: int) -> None:
    logits = torch.full((1, 33), -math.inf)
    logits[0, only] = -7.0
    assert Sampler().sample(logits, rows_of(each)).item() == only


def test_the_reason_for_an_invalid_token_is_a_sentence() -> None:
    row = SamplingRow(SamplingParams())
    row.append(3)
    logits = torch.zeros(2000)
    logits[3:5], logits[7], logits[9:12] = math.nan, math.inf, -math.inf
    message = Sampler().explain(logits, row)
    assert message.startswith(
        "Token 2 cannot be chosen: of 2,000 logits, 2 are NaN, 1 +inf and 3 -inf. "
    )
    # A penalty can overflow sound logits, and then the sentence names it.
    row = SamplingRow(SamplingParams(repetition_penalty=1e-30), [1])
    logits = torch.full((1, 4), 1e10)
    assert Sampler().sample(logits, [row]).item() == INVALID_TOKEN
    assert "1 +inf and 0 -inf (after a repetition_penalty of 1e-30)" in Sampler().explain(
        logits[0], row
    )


@pytest.mark.gpu
def test_a_gpu_draws_what_a_cpu_draws() -> None:
    logits = normal_logits(6, 40 * len(SAMPLED), 32_000)
    rows = rows_of(*SAMPLED * 40)
    for i, row in enumerate(rows):
        row.num_sampled = i
    assert torch.equal(Sampler().sample(logits.cuda(), rows).cpu(), Sampler().sample(logits, rows))
    # A row alone goes through other kernels than one of many, and sums there come out the same.
    alone = [
        Sampler().sample(logits[i : i + 1].cuda(), rows[i : i + 1]).item() for i in range(len(rows))
    ]
    assert alone == Sampler().sample(logits, rows).tolist()
