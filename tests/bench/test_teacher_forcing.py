"""A text's likelihood through scheduler, cache and runner is the model's own, and a policy's is the oracle's."""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.teacher_forcing import Steps, load, score
from engine.config import EngineConfig
from engine.kv_policies.full import Full
from engine.kv_policies.h2o import H2O
from engine.kv_policies.policy import KVPolicy
from engine.kv_policies.streaming import Streaming
from engine.kv_policies.window import SlidingWindow
from engine.launch import LoadedModel
from scheduler.kv_budget import Window
from tests.engine.checkpoints import SHAPE, random_model, save
from tests.engine.kv_oracle import Oracle, heaviest, window

STEPS = Steps(chunk=9, block_size=4)
FEW = 20
"""Tokens of a prompt."""

POLICIES: dict[str, tuple[KVPolicy, Callable[[Any], Oracle]]] = {
    "window": (SlidingWindow(window=11), lambda model: Oracle(model, before=window(11))),
    "streaming": (
        Streaming(sinks=3, window=10),
        lambda model: Oracle(model, before=window(10, sinks=3), in_cache_positions=True),
    ),
    "h2o": (
        H2O(heavy=5, recent=4, slack=2, prompt_slack=6),
        lambda model: Oracle(model, after=heaviest(5, 4, (6, 2), FEW)),
    ),
}


@pytest.fixture(scope="module")
def model() -> Any:
    return random_model("llama", num_hidden_layers=2, max_position_embeddings=64)


@pytest.fixture(scope="module")
def loaded(model: Any, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = save(model, tmp_path_factory.mktemp("llama"))
    return load(EngineConfig(model=str(folder), dtype="float32", threads=1))[0]


@pytest.fixture(scope="module")
def texts() -> list[list[int]]:
    """No token comes twice: equal ones would leave it to rounding which of them a policy selects."""
    source = random.Random(3)
    return [source.sample(range(3, SHAPE["vocab_size"]), k=60) for _ in range(3)]


def nll_of(logits: Tensor, text: list[int]) -> Tensor:
    """−ln p of each token but the first, by the logits [tokens, vocab] after each."""
    return torch.nn.functional.cross_entropy(logits[:-1].double(), torch.tensor(text[1:]), reduction="none")


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=1e-4, equal_nan=True)


def test_with_all_kept_it_is_the_cross_entropy_of_transformers(
    model: Any, loaded: LoadedModel, texts: list[list[int]]
) -> None:
    scores = score(loaded, Full(), texts, STEPS)
    for nll, text in zip(scores.nll, texts, strict=True):
        with torch.inference_mode():
            logits = model.double()(torch.tensor([text])).logits[0]
        assert_same(nll[1:], nll_of(logits, text))


@pytest.mark.parametrize("name", POLICIES)
def test_under_a_policy_it_is_the_oracles(model: Any, loaded: LoadedModel, texts: list[list[int]], name: str) -> None:
    policy, oracle = POLICIES[name]
    scores = score(loaded, policy, texts, replace(STEPS, prompt_len=FEW))
    for nll, text in zip(scores.nll, texts, strict=True):
        assert_same(nll[1:], nll_of(oracle(model).run(text), text))


@pytest.mark.parametrize("name", ["full", "window", "streaming"])
@pytest.mark.parametrize(
    "steps",
    [
        Steps(chunk=512, block_size=16),
        Steps(chunk=7, block_size=4, texts_at_a_time=2),
        Steps(chunk=2, block_size=1),
        Steps(chunk=9, block_size=4, prompt_len=1),
    ],
    ids=["whole texts", "chunks", "blocks of one token", "one by one"],
)
def test_it_does_not_matter_how_a_text_is_cut_into_steps(
    loaded: LoadedModel, texts: list[list[int]], name: str, steps: Steps
) -> None:
    policy: KVPolicy = Full() if name == "full" else POLICIES[name][0]
    assert_same(score(loaded, policy, texts, steps).nll, score(loaded, policy, texts, STEPS).nll)


def test_what_is_to_be_skipped_is_not_scored_and_changes_nothing_behind(
    loaded: LoadedModel, texts: list[list[int]]
) -> None:
    everything, rest = (score(loaded, Full(), texts, STEPS, skip=skip).nll for skip in (0, 30))
    assert everything[:, 0].isnan().all()
    assert not everything[:, 1:].isnan().any()
    assert rest[:, :31].isnan().all()
    assert_same(rest[:, 31:], everything[:, 31:])


def test_what_is_skipped_is_the_prompt_where_that_makes_a_difference(
    loaded: LoadedModel, texts: list[list[int]]
) -> None:
    policy = POLICIES["h2o"][0]
    by_default = score(loaded, policy, texts, STEPS, skip=FEW).nll
    assert_same(by_default, score(loaded, policy, texts, replace(STEPS, prompt_len=FEW), skip=FEW).nll)
    assert not by_default.equal(score(loaded, policy, texts, replace(STEPS, prompt_len=60), skip=FEW).nll)


@pytest.mark.parametrize("name", POLICIES)
def test_a_stream_past_the_trained_length_holds_no_more_than_its_budget(loaded: LoadedModel, name: str) -> None:
    policy, text = POLICIES[name][0], [*range(3, 203)]
    budget = policy.budget()
    assert budget is not None
    told: list[int] = []
    scores = score(loaded, policy, [text], STEPS, on_tokens=told.append)
    held = [blocks for _, blocks in scores.blocks]
    assert max(held) <= budget.max_blocks(9, 4) <= 10 < 200 / 4
    assert max(held[-20:]) == max(held[len(held) // 2 :])
    assert scores.blocks[-1][0] == sum(told) == 199  # the last token is only predicted


def test_a_model_with_windows_of_its_own_is_scored_in_the_memory_that_they_need(tmp_path: Path) -> None:
    model, text = random_model("mistral", num_hidden_layers=2, sliding_window=8), [*range(3, 203)]
    config = EngineConfig(model=str(save(model, tmp_path)), dtype="float32", threads=1)
    scores = score(load(config)[0], Full(), [text], STEPS)
    with torch.inference_mode():
        assert_same(scores.nll[0][1:], nll_of(model.double()(torch.tensor([text])).logits[0], text))
    assert max(blocks for _, blocks in scores.blocks) <= 5


def test_a_policy_that_takes_more_than_its_budget_says_is_found_out(loaded: LoadedModel) -> None:
    class Greedy(Window):
        def droppable(self, num_computed: int, num_dropped: int, block_size: int) -> tuple[int, int]:
            return 0, 0

    class Liar(SlidingWindow):
        def budget(self) -> Window:
            return Greedy(window=11)

    with pytest.raises(RuntimeError, match="'window' takes more blocks than its budget says"):
        score(loaded, Liar(window=11), [[*range(3, 43)]], STEPS)
