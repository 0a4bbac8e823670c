"""Beam search: equal to transformers' on a tiny random model, and to exhaustive search where that is possible."""

import math
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.beam_search import BeamParams, BeamSearch, Candidate, Extension, Hypothesis
from engine.outputs import TokenLogprob
from scheduler.request import StopRule
from tests.engine.checkpoints import SHAPE, random_model

Step = Callable[[Sequence[Sequence[int]], int], list[list[Candidate]]]
"""(live beams' output tokens, k) → each beam's k most likely next tokens, best first."""

_NEVER = float("-inf")


def _search(
    step: Step, width: int, params: BeamParams, stop: StopRule, num_candidates: int | None = None
) -> list[Hypothesis]:
    """All hypotheses of a search, driven as an engine would drive it."""
    search = BeamSearch(width, params, stop)
    beams: list[list[int]] = [[]]
    while beams:
        extensions = search.advance(step(beams, num_candidates or search.num_candidates))
        assert len(extensions) <= width
        beams = [[*beams[extension.parent], extension.token] for extension in extensions]
    return search.best(width)


def _hypothesis(tokens: Sequence[int], logprobs: Sequence[float], score: float, reason: Any) -> Hypothesis:
    chosen = tuple(TokenLogprob(*one, top=()) for one in zip(tokens, logprobs, strict=True))
    return Hypothesis(chosen, score, reason)


class _Table:
    """A made-up model: each prefix has its own random distribution over a small vocabulary."""

    def __init__(self, seed: int, vocab: int) -> None:
        self.seed, self.vocab = seed, vocab

    def logprobs(self, prefix: Sequence[int]) -> list[float]:
        """[vocab]"""
        random = Random(f"{self.seed} {prefix}")
        weights = [random.gauss(0, 2) for _ in range(self.vocab)]
        log_sum = math.log(sum(map(math.exp, weights)))
        return [weight - log_sum for weight in weights]

    def __call__(self, beams: Sequence[Sequence[int]], k: int) -> list[list[Candidate]]:
        """As a step."""
        rows = [list(enumerate(self.logprobs(list(beam)))) for beam in beams]
        return [sorted(row, key=lambda candidate: -candidate[1])[:k] for row in rows]

    def every_output(self, stop: StopRule, prefix: tuple[int, ...] = ()) -> list[tuple[int, ...]]:
        """All complete outputs that the rule allows."""
        outputs = []
        for token in range(self.vocab):
            output = (*prefix, token)
            if token in stop.stop_token_ids and len(output) <= stop.min_tokens:
                continue
            ended = token in stop.stop_token_ids or len(output) == stop.max_tokens
            outputs += [output] if ended else self.every_output(stop, output)
        return outputs

    def score(self, output: Sequence[int], length_penalty: float) -> float:
        """By definition."""
        total = sum(self.logprobs(list(output[:i]))[token] for i, token in enumerate(output))
        return float(total / len(output) ** length_penalty)


def _scripted(*steps: Sequence[Sequence[Candidate]]) -> Step:
    """The given candidates, step by step, whatever the beams are."""
    remaining = iter(steps)
    return lambda _beams, _k: [list(row) for row in next(remaining)]


# Against transformers.


@pytest.fixture(scope="module")
def model() -> Iterator[Any]:
    """Its distributions are peaked about as those of a language model: some beams win clearly, others do not."""
    model = random_model("llama", num_hidden_layers=1)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    model.generation_config.eos_token_id = None
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # it is so small that threads only wait for each other: 20 times as long on a busy machine
    yield model
    torch.set_num_threads(threads)


def _step_of(model: Any, prompt: Sequence[int]) -> Step:
    def step(beams: Sequence[Sequence[int]], k: int) -> list[list[Candidate]]:
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([[*prompt, *beam] for beam in beams])).logits[:, -1]
        values, ids = (part.tolist() for part in logits.float().log_softmax(dim=-1).topk(k, dim=-1))
        return [list(zip(*row, strict=True)) for row in zip(ids, values, strict=True)]

    return step


def _by_transformers(
    model: Any, prompt: Sequence[int], width: int, params: BeamParams, stop: StopRule
) -> list[Hypothesis]:
    """What ``generate`` returns, in our terms."""
    result = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        num_beams=width,
        num_return_sequences=width,
        length_penalty=params.length_penalty,
        early_stopping=params.early_stopping,
        max_new_tokens=stop.max_tokens,
        min_new_tokens=stop.min_tokens,
        eos_token_id=sorted(stop.stop_token_ids) or None,
        pad_token_id=0,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
    )
    logprobs = model.compute_transition_scores(result.sequences, result.scores, result.beam_indices)
    hypotheses = []
    for row, own, beams, score in zip(
        result.sequences, logprobs, result.beam_indices, result.sequences_scores.tolist(), strict=True
    ):
        length = int((beams >= 0).sum())
        tokens = row[len(prompt) : len(prompt) + length].tolist()
        reason = "stop" if tokens[-1] in stop.stop_token_ids else "length"
        hypotheses.append(_hypothesis(tokens, own[:length].tolist(), score, reason))
    return hypotheses


def _random_task(model: Any, seed: int | str) -> tuple[list[int], StopRule]:
    """A prompt, and a rule with some stop tokens that a search without them would choose, or a lot of random ones."""
    random = Random(seed)
    vocabulary = range(SHAPE["vocab_size"])
    prompt = random.choices(vocabulary, k=random.randint(1, 5))
    max_tokens = random.choice([1, 4, 8, 20])
    min_tokens = min(random.choice([0, 0, 0, 1, 3]), max_tokens)
    if random.random() < 0.6:
        stop_token_ids = random.sample(vocabulary, random.choice([30, 60]))
    else:
        free = _search(_step_of(model, prompt), 4, BeamParams(), StopRule(max_tokens=5))
        stop_token_ids = random.sample([token for one in free for token in one.tokens], random.choice([0, 1, 2, 4]))
    return prompt, StopRule(max_tokens=max_tokens, min_tokens=min_tokens, stop_token_ids=frozenset(stop_token_ids))


def _assert_equal(ours: list[Hypothesis], theirs: list[Hypothesis]) -> None:
    assert [(one.tokens, one.finish_reason) for one in ours] == [(one.tokens, one.finish_reason) for one in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert one.score == pytest.approx(other.score, abs=1e-4)
        assert [t.logprob for t in one.logprobs] == pytest.approx([t.logprob for t in other.logprobs], abs=1e-4)


@pytest.mark.parametrize("early_stopping", [True, False, "never"])
@pytest.mark.parametrize("length_penalty", [0.0, 0.6, 1.0, 2.0, -0.5])
@pytest.mark.parametrize("width", [2, 4, 5])
def test_hypotheses_and_scores_are_those_of_transformers(
    model: Any, width: int, length_penalty: float, early_stopping: Any
) -> None:
    params = BeamParams(length_penalty=length_penalty, early_stopping=early_stopping)
    for i in range(2):
        prompt, stop = _random_task(model, seed=f"{width} {params} {i}")
        _assert_equal(
            _search(_step_of(model, prompt), width, params, stop), _by_transformers(model, prompt, width, params, stop)
        )


def test_each_kind_of_early_stopping_finds_what_it_finds_in_transformers(model: Any) -> None:
    prompt, stop = _random_task(model, seed=144)
    found = []
    kinds: tuple[Any, ...] = (True, False, "never")
    for kind in kinds:
        params = BeamParams(early_stopping=kind)
        found.append(_search(_step_of(model, prompt), 4, params, stop))
        _assert_equal(found[-1], _by_transformers(model, prompt, 4, params, stop))
    assert found[0] != found[1] != found[2] != found[0]
    assert found[0][0].score <= found[1][0].score <= found[2][0].score


@pytest.mark.parametrize("early_stopping", [True, False, "never"])
def test_one_beam_is_greedy(model: Any, early_stopping: Any) -> None:
    for seed in range(6):
        prompt, stop = _random_task(model, seed)
        (ours,) = _search(_step_of(model, prompt), 1, BeamParams(early_stopping=early_stopping), stop)
        greedy = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=stop.max_tokens,
            min_new_tokens=stop.min_tokens,
            eos_token_id=sorted(stop.stop_token_ids) or None,
            pad_token_id=0,
            do_sample=False,
        )
        assert [*prompt, *ours.tokens] == greedy[0].tolist()


# Against the definition, on made-up models.


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    vocab=st.integers(2, 3),
    max_tokens=st.integers(1, 4),
    min_tokens=st.integers(0, 3),
    num_stops=st.integers(0, 2),
    length_penalty=st.sampled_from([-0.5, 0.0, 1.0, 2.0]),
    early_stopping=st.sampled_from([True, False, "never"]),
)
def test_a_search_wide_enough_finds_every_output_in_order_of_score(
    seed: int,
    vocab: int,
    max_tokens: int,
    min_tokens: int,
    num_stops: int,
    length_penalty: float,
    early_stopping: Any,
) -> None:
    table = _Table(seed, vocab)
    num_stops = min(num_stops, vocab - 1)  # or all outputs might be forbidden
    stop = StopRule(max_tokens=max_tokens, min_tokens=min_tokens, stop_token_ids=frozenset(range(num_stops)))
    params = BeamParams(length_penalty=length_penalty, early_stopping=early_stopping)
    found = _search(table, vocab**max_tokens, params, stop)
    every = {output: table.score(output, length_penalty) for output in table.every_output(stop)}
    assert [one.tokens for one in found] == sorted(every, key=lambda output: -every[output])
    assert [one.score for one in found] == pytest.approx(sorted(every.values(), reverse=True))
    assert [one.finish_reason == "stop" for one in found] == [one.tokens[-1] < num_stops for one in found]


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    width=st.integers(1, 4),
    stop_token_ids=st.frozensets(st.integers(0, 11), max_size=4),
    min_tokens=st.integers(0, 3),
    early_stopping=st.sampled_from([True, False, "never"]),
)
def test_more_candidates_than_asked_for_change_nothing(
    seed: int, width: int, stop_token_ids: frozenset[int], min_tokens: int, early_stopping: Any
) -> None:
    table, params = _Table(seed, vocab=12), BeamParams(early_stopping=early_stopping)
    stop = StopRule(max_tokens=6, min_tokens=min_tokens, stop_token_ids=stop_token_ids)
    found = _search(table, width, params, stop)
    assert found == _search(table, width, params, stop, num_candidates=table.vocab)
    assert len(found) == width
    assert not any(stop_token_ids & set(one.tokens[: max(min_tokens, len(one.tokens) - 1)]) for one in found)


# Rules, one by one.


def test_an_end_that_is_not_among_the_best_continuations_is_dropped() -> None:
    stop = StopRule(max_tokens=9, stop_token_ids=frozenset({0}))
    search = BeamSearch(2, BeamParams(), stop)
    assert search.num_candidates == 3
    assert search.advance([[(1, -0.5), (2, -1.0), (0, -2.0)]]) == (Extension(0, 1), Extension(0, 2))
    assert search.best(2) == []
    # An end among the best does not cost a live beam: the third best goes on in its place.
    extensions = search.advance([[(3, -1.0), (4, -2.0), (0, -3.0)], [(0, -0.1), (5, -4.0), (6, -5.0)]])
    assert extensions == (Extension(0, 3), Extension(0, 4))
    assert search.best(2) == [_hypothesis((2, 0), (-1.0, -0.1), -1.1 / 2, "stop")]


def test_equal_sums_rank_by_beam_and_then_as_they_came() -> None:
    search = BeamSearch(3, BeamParams(), StopRule(max_tokens=9))
    assert [one.token for one in search.advance([[(8, -1.0), (7, -1.0), (9, -1.0)]])] == [8, 7, 9]
    rows = [[(1, -1.0)], [(2, -0.5), (1, -0.5)], [(3, -0.5)]]
    assert search.advance(rows) == (Extension(1, 2), Extension(1, 1), Extension(2, 3))


@pytest.mark.parametrize("impossible", [_NEVER, math.nan])
def test_impossible_tokens_are_never_taken_and_leave_fewer_beams(impossible: float) -> None:
    search = BeamSearch(3, BeamParams(), StopRule(max_tokens=2))
    assert search.advance([[(1, -0.5), (2, impossible), (3, impossible)]]) == (Extension(0, 1),)
    assert search.advance([[(4, -1.0), (5, -2.0), (6, impossible)]]) == ()
    assert [one.tokens for one in search.best(3)] == [(1, 4), (1, 5)]


def test_beams_that_cannot_go_on_count_only_if_nothing_was_found() -> None:
    stop = StopRule(max_tokens=9, stop_token_ids=frozenset({0}))
    nowhere = [(1, _NEVER), (2, _NEVER)]
    first = [[(1, -1.0), (2, -2.0)]]
    assert _search(_scripted(first, [nowhere, nowhere]), 2, BeamParams(), stop) == [
        _hypothesis((1,), (-1.0,), -1.0, "length"),
        _hypothesis((2,), (-2.0,), -2.0, "length"),
    ]
    first = [[(1, -1.0), (0, -2.0), (2, -3.0)]]
    assert _search(_scripted(first, [nowhere, nowhere]), 2, BeamParams(), stop) == [
        _hypothesis((0,), (-2.0,), -2.0, "stop")
    ]
    assert _search(_scripted([nowhere]), 2, BeamParams(), stop) == [_hypothesis((), (), 0.0, "length")]


def test_each_token_comes_with_the_most_likely_ones_of_its_place() -> None:
    first = [(1, -1.0), (2, -2.0), (3, -3.0)]
    second = [[(4, -1.0), (5, -2.0), (6, -3.0)], [(7, -0.1), (8, -4.0), (9, -5.0)]]
    search = BeamSearch(2, BeamParams(), StopRule(max_tokens=2), num_top=3)
    assert search.num_candidates == 3
    search.advance([first])
    search.advance(second)
    best, other = search.best(2)
    assert (best.tokens, other.tokens) == ((1, 4), (2, 7))
    assert best.logprobs[1] == TokenLogprob(4, -1.0, tuple(second[0]))
    assert [token.top for token in other.logprobs] == [tuple(first), tuple(second[1])]


def test_a_stop_token_in_the_last_place_is_a_stop() -> None:
    stop = StopRule(max_tokens=1, stop_token_ids=frozenset({0}))
    found = _search(_scripted([[(1, -0.5), (0, -1.0), (2, -2.0)]]), 2, BeamParams(), stop)
    assert [(one.tokens, one.finish_reason) for one in found] == [((1,), "length"), ((0,), "stop")]


def test_every_live_beam_brings_its_own_candidates() -> None:
    search = BeamSearch(2, BeamParams(), StopRule(max_tokens=9))
    with pytest.raises(ValueError, match="2 lists of candidates for 1 live beams"):
        search.advance([[(1, -1.0)], [(2, -1.0)]])


@pytest.mark.parametrize("wrong", [{"length_penalty": math.nan}, {"length_penalty": math.inf}])
def test_parameters_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="length_penalty is"):
        BeamParams(**wrong)


@pytest.mark.parametrize("length_penalty", [-10.0, 10.0])
def test_long_outputs_and_extreme_penalties_stay_finite(length_penalty: float) -> None:
    length = 5_000
    params = BeamParams(length_penalty=length_penalty, early_stopping="never")
    search, live = BeamSearch(2, params, StopRule(max_tokens=length)), 1
    while live:
        live = len(search.advance([[(1, -0.5), (2, -1.0)]] * live))
    best, second = search.best(2)
    assert math.isfinite(best.score)
    assert best.score > second.score
    assert best.tokens == (1,) * length
    assert sorted(second.tokens) == [1] * (length - 1) + [2]
