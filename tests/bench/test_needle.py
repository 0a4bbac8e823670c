import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from bench import needle
from bench.needle import Needles, plant
from bench.policy_list import Candidate
from engine.kv_policies.full import Full
from engine.kv_policies.policy import KVPolicy
from engine.tokenizer import Tokenizer
from tests.engine.checkpoints import byte_tokenizer

TOKENIZER = Tokenizer(byte_tokenizer())
FILLER = TOKENIZER.encode("." * 100)


@pytest.mark.parametrize(("depth", "place"), [(0.0, 0), (0.25, 25), (1.0, 100)])
def test_a_number_is_told_at_its_depth_and_asked_for_at_the_end(depth: float, place: int) -> None:
    trial = plant(FILLER, depth, random.Random(1), TOKENIZER)
    text = TOKENIZER.decode(trial.prompt)
    before, told, rest = text.partition("\nThe secret number of ")
    assert before == "." * place
    name = rest.split()[0]
    assert (told + rest).startswith(f"\nThe secret number of {name} is {trial.answer}.\n")
    assert rest.endswith("." * (100 - place) + f"\nThe secret number of {name} is")
    assert text.count(trial.answer) == 1


def test_names_and_numbers_differ_between_trials_and_not_between_runs() -> None:
    first, again = ([plant(FILLER, 0.5, source, TOKENIZER) for _ in range(9)] for source in map(random.Random, (1, 1)))
    assert first == again
    assert len({trial.answer for trial in first}) == 9


class Answering:
    """Finds what is told in the prompt's last ``seen`` characters."""

    def __init__(self, seen: int) -> None:
        self.seen = seen

    def greedy(
        self, prompts: Sequence[Sequence[int]], policy: KVPolicy, most: int, on_answer: Callable[[], object]
    ) -> list[list[int]]:
        answers = []
        for prompt in prompts:
            _, found, told = TOKENIZER.decode(prompt[-self.seen :]).partition(" is ")
            answers.append(TOKENIZER.encode(f" {told[:5]}. The" if found else " 12")[:most])
            on_answer()
        return answers


class Engine:
    tokenizer = TOKENIZER


def test_what_is_found_is_counted_by_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def answering(engine: object) -> Iterator[Answering]:
        yield Answering(seen=110)

    monkeypatch.setattr(needle, "answering", answering)
    trials = [plant(FILLER, (index + 0.5) / 10, random.Random(index), TOKENIZER) for index in range(10)]
    engine: Any = Engine()
    measurement = Needles(engine, trials, 100, "dots")
    (found,) = measurement.each([Candidate(Full(), "full", None)])
    assert found.found == [False] * 3 + [True] * 7
    assert found.by_depth == [0, 0.5, 1, 1, 1]
    assert found.accuracy == 0.7
    row = measurement.table([found]).splitlines()[-1].split()
    assert row == ["full", "all", "70%", "0%", "50%", "100%", "100%", "100%"]
