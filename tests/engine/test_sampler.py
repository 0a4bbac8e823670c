"""The sampler: each parameter does what its definition says, exactly where that can be computed."""

from array import array
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.sampler import SampleRow, sample
from engine.sampling_params import SamplingParams

_VOCAB = 50


def _row(seed: int = 1, tokens: list[int] | None = None, num_prompt: int = 1, **params: Any) -> SampleRow:
    return SampleRow(
        params=SamplingParams(**params),
        seed=seed,
        tokens=array("i", tokens or [7]),
        num_prompt_tokens=num_prompt,
        stop_token_ids=frozenset({0, 1}),
    )


def _logits(seed: int = 0, vocab: int = _VOCAB, scale: float = 2.0) -> torch.Tensor:
    return torch.randn(vocab, generator=torch.Generator().manual_seed(seed)) * scale


def _frequencies(logits: torch.Tensor, draws: int = 20_000, **params: Any) -> torch.Tensor:
    rows = [_row(seed, **params) for seed in range(draws)]
    tokens = [one.token for one in sample(logits.expand(draws, -1), rows)]
    return torch.bincount(torch.tensor(tokens), minlength=logits.numel()).double() / draws


def _expected(
    logits: torch.Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Any:
    """The distribution by definition, one filter after the other, in float64."""
    probs = (logits.double() / temperature).softmax(0)
    if top_k:
        probs = probs * (probs >= probs.sort(descending=True).values[top_k - 1])
        probs = probs / probs.sum()
    order = probs.argsort(descending=True)
    before = probs[order].cumsum(0) - probs[order]
    kept = torch.zeros_like(probs, dtype=torch.bool)
    kept[order[before < top_p]] = True
    probs = probs * kept * (probs >= min_p * probs.max())
    return probs / probs.sum()


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0, "top_k": 7},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"temperature": 1.5, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
    ],
)
def test_tokens_come_as_often_as_the_definition_says(params: dict[str, float]) -> None:
    logits = _logits()
    expected, found = _expected(logits, **params), _frequencies(logits, **params)
    assert (found[expected == 0] == 0).all(), "a filtered token was drawn"
    likely = expected > 1e-3
    chi_squared = (20_000 * (found - expected)[likely] ** 2 / expected[likely]).sum()
    assert chi_squared < likely.sum() + 5 * (2 * likely.sum()).sqrt()


def test_filters_are_exact_where_the_likeliest_thousand_do_not_decide() -> None:
    flat = _logits(vocab=5000, scale=0.01)
    assert (_frequencies(flat, draws=3000, top_p=0.999) > 0).sum() > 1200
    kept = _expected(flat, top_p=0.5) > 0
    assert (_frequencies(flat, draws=3000, top_p=0.5)[~kept] == 0).all()
    assert (_frequencies(flat, draws=2000, min_p=0.99)[_expected(flat, min_p=0.99) == 0] == 0).all()


def test_greedy_takes_the_most_likely_token() -> None:
    logits = torch.stack([_logits(seed) for seed in range(5)])
    tokens = [one.token for one in sample(logits, [_row(temperature=0.0)] * 5)]
    assert tokens == logits.argmax(-1).tolist()


@pytest.mark.parametrize(
    "own", [{}, {"top_p": 0.9}, {"top_k": 3}, {"top_k": 1000, "top_p": 0.5}, {"min_p": 0.05}], ids=str
)
@pytest.mark.parametrize("neighbour", [{}, {"top_p": 0.9}, {"top_k": 3000}, {"temperature": 0.0}], ids=str)
def test_a_seed_decides_the_token_whatever_kind_of_row_is_beside_it(
    own: dict[str, float], neighbour: dict[str, float]
) -> None:
    tied = (_logits(vocab=4000) * 4).round().bfloat16() / 4
    for seed in range(20):
        row = _row(seed, **own)
        (alone,) = sample(tied[None], [row])
        assert sample(torch.stack([tied, tied]), [_row(7, **neighbour), row])[1] == alone


@pytest.mark.parametrize(
    "filters", [{"top_p": 1e-50}, {"top_p": 1e-50, "top_k": 5}, {"min_p": 1.0}, {"top_k": 1}], ids=str
)
def test_the_narrowest_filter_leaves_the_most_likely_token(filters: dict[str, float]) -> None:
    logits = _logits(vocab=3000)
    tokens = {one.token for one in sample(logits.expand(20, -1), [_row(seed, **filters) for seed in range(20)])}
    assert tokens == {int(logits.argmax())}


def test_a_tiny_repetition_penalty_makes_no_infinities() -> None:
    logits = torch.zeros(_VOCAB)
    logits[[7, 8]] = torch.tensor([2.0, -3.0])
    (one,) = sample(logits[None], [_row(tokens=[7, 8], repetition_penalty=1e-40)])
    assert one.token == 7


@given(
    seed=st.integers(0, 2**90), others=st.lists(st.sampled_from([0.0, 0.7, 1.3]), max_size=4), place=st.integers(0, 4)
)
@settings(max_examples=50, deadline=None)
def test_a_seed_decides_the_token_whatever_else_is_in_the_batch(seed: int, others: list[float], place: int) -> None:
    own = _row(seed, temperature=0.9, top_p=0.9)
    (alone,) = sample(_logits()[None], [own])
    place = min(place, len(others))
    rows = [_row(9, temperature=t) for t in others]
    rows.insert(place, own)
    logits = torch.stack([_logits(5)] * place + [_logits()] + [_logits(6)] * (len(others) - place))
    assert sample(logits, rows)[place] == alone


def test_the_draw_depends_on_the_position() -> None:
    draws = {_row(1, tokens=[7] * length).uniform() for length in range(1, 50)}
    assert len(draws) == 49
    assert all(0 <= draw < 1 for draw in draws)


def test_the_logits_are_left_as_they_are() -> None:
    logits = torch.stack([_logits()] * 2)
    before = logits.clone()
    sample(logits, [_row(logit_bias={3: 5.0}, frequency_penalty=1.0), _row(temperature=0.0, min_tokens=3)])
    assert torch.equal(logits, before)


def test_presence_and_frequency_penalties_count_the_output_alone() -> None:
    logits = torch.zeros(_VOCAB)
    logits[[3, 4, 5]] = torch.tensor([3.0, 2.9, 2.0])
    row = {"tokens": [5, 5, 5, 3, 3, 4], "num_prompt": 3, "temperature": 0.0}
    assert sample(logits[None], [_row(**row)])[0].token == 3
    assert sample(logits[None], [_row(**row, frequency_penalty=0.2)])[0].token == 4
    assert sample(logits[None], [_row(**row, presence_penalty=1.1)])[0].token == 5


class _InMemory(array):  # type: ignore[type-arg]
    """Numbers that are not turned into Python's, one by one."""

    def __getitem__(self, index: object) -> Any:
        raise AssertionError("a million of them would take longer than a step")

    def __iter__(self) -> Any:
        raise AssertionError("a million of them would take longer than a step")


def test_penalties_count_tokens_where_they_lie() -> None:
    """A stream under a KV policy may have a million, and every other row of the batch waits for it."""
    tokens = _InMemory("i", [3, 3, 3, *range(_VOCAB), *(token for token in range(_VOCAB) if token != 3)])
    row = _row(temperature=0.0, frequency_penalty=0.5, presence_penalty=0.5, repetition_penalty=2.0)
    (one,) = sample(torch.ones(1, _VOCAB), [replace(row, tokens=tokens, num_prompt_tokens=3)])
    assert one.token == 3, "of the output it is the rarest"


def test_a_repetition_penalty_lowers_prompt_and_output_whatever_their_sign() -> None:
    logits = torch.full((_VOCAB,), -10.0)
    logits[[3, 4, 5]] = torch.tensor([2.0, -1.0, -1.5])
    row = {"tokens": [3, 4], "num_prompt": 1, "temperature": 0.0, "logprobs": 0}
    assert sample(logits[None], [_row(**row)])[0].token == 3
    assert sample(logits[None], [_row(**row, repetition_penalty=4.0)])[0].token == 3
    logits[3] = -0.5
    assert sample(logits[None], [_row(**row, repetition_penalty=4.0)])[0].token == 5


def test_a_logit_bias_is_added() -> None:
    logits = _logits()
    assert sample(logits[None], [_row(temperature=0.0, logit_bias={33: 100.0})])[0].token == 33
    banned = int(logits.argmax())
    assert sample(logits[None], [_row(temperature=0.0, logit_bias={banned: -100.0})])[0].token != banned


def test_stop_tokens_are_not_sampled_before_min_tokens() -> None:
    logits = torch.zeros(_VOCAB)
    logits[1] = 50.0
    early, late = _row(min_tokens=2, tokens=[7, 8]), _row(min_tokens=2, tokens=[7, 8, 9])
    tokens = Counter(one.token for one in sample(logits.expand(40, -1), [early] * 20 + [late] * 20))
    assert tokens[1] == 20


def test_logprobs_are_those_of_the_raw_distribution() -> None:
    logits = _logits()
    exact = logits.double().log_softmax(0)
    (one,) = sample(logits[None], [_row(temperature=0.3, top_k=2, logit_bias={4: 20.0}, logprobs=3)])
    assert one.logprob is not None
    assert one.logprob.token_id == one.token
    assert one.logprob.logprob == pytest.approx(exact[one.token].item(), abs=1e-5)
    best = exact.topk(3)
    assert [token for token, _ in one.logprob.top] == best.indices.tolist()
    assert [value for _, value in one.logprob.top] == pytest.approx(best.values.tolist(), abs=1e-5)


def test_rows_may_ask_for_different_numbers_of_logprobs() -> None:
    logits = torch.stack([_logits(seed) for seed in range(5)])
    rows = [_row(logprobs=0), _row(), _row(logprobs=2), _row(best_of=2), _row(logprobs=3)]
    samples = sample(logits, rows)
    assert [None if one.logprob is None else len(one.logprob.top) for one in samples] == [0, None, 2, 0, 3]
    for row, own, one in zip(rows, logits, samples, strict=True):
        asked = SampleRow(SamplingParams(logprobs=3), row.seed, row.tokens, row.num_prompt_tokens, row.stop_token_ids)
        (alone,) = sample(own[None], [asked])
        if one.logprob is not None and alone.logprob is not None:
            assert one.logprob.logprob == alone.logprob.logprob
            assert one.logprob.top == alone.logprob.top[: len(one.logprob.top)]
