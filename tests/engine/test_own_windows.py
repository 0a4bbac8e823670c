"""A model whose every layer has a sliding window of its own: what nobody will see is not kept, and nothing changes.

The oracle keeps all keys and looks at the newest; transformers' Mistral masks.
"""

import asyncio
import functools
import random
from array import array
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.config import EngineConfig
from engine.engine_info import EngineInfo
from engine.errors import InvalidRequestError
from engine.forward_batch import ForwardBatch
from engine.kv_policies.fit import budget_refusal, fitted
from engine.kv_policies.full import Full
from engine.kv_policies.policy import KVPolicy
from engine.kv_policies.streaming import Streaming
from engine.kv_policies.window import SlidingWindow
from engine.launch import LoadedModel, assemble, load_model
from engine.sampling_params import SamplingParams
from scheduler.batch import ScheduledSequence
from scheduler.kv_budget import Selection, Window
from tests.engine.checkpoints import SHAPE, random_model, save
from tests.engine.driving import PreemptionCount, ask, generate
from tests.engine.kv_oracle import Evict, Oracle, window
from tests.engine.test_kv_policies import assert_close

OWN = 8
"""Tokens that each layer sees."""
VOCAB = SHAPE["vocab_size"]
PARAMS = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, logprobs=VOCAB, repetition_penalty=100.0)
BLOCK_BYTES = 2 * 2 * SHAPE["num_key_value_heads"] * SHAPE["head_dim"] * 4 * 4
"""Of a block of 4 tokens in the model's two layers, in float32."""

Expected = Callable[[Sequence[int], Sequence[int], Evict, bool], Tensor]


@pytest.fixture(scope="module")
def model() -> Any:
    return random_model("mistral", num_hidden_layers=2, sliding_window=OWN)


@pytest.fixture(scope="module")
def loaded(model: Any, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(EngineConfig(model=str(save(model, tmp_path_factory.mktemp("mistral"))), dtype="float32"))


@pytest.fixture(scope="module")
def expected(model: Any) -> Expected:
    """The oracle's log-probabilities [output tokens, vocab] for a prompt and what came out."""

    @functools.cache
    def compute(tokens: tuple[int, ...], seen: Evict, in_cache_positions: bool) -> Tensor:
        return Oracle(model, before=seen, in_cache_positions=in_cache_positions).run(tokens).log_softmax(-1)

    def of(prompt: Sequence[int], output: Sequence[int], seen: Evict, in_cache_positions: bool = False) -> Tensor:
        return compute((*prompt, *output[:-1]), seen, in_cache_positions)[len(prompt) - 1 :]

    return of


SEES_OWN = window(OWN)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Some begin alike; of all lengths around blocks and windows."""
    tokens = random.Random(5).sample(range(3, VOCAB), k=90)
    common = tokens[:30]
    return [common[:12], [*common[:20], *tokens[30:32]], common, tokens[32:77], [tokens[78]]]


class Watching(PreemptionCount):
    """Also knows the largest share of the blocks that was held, and what was evicted."""

    most = 0.0
    evicted = 0

    def on_step(self, *, kv_usage: float, **others: Any) -> None:
        """Remember the largest."""
        self.most = max(self.most, kv_usage)

    def on_eviction(self, *, policy: str, tokens: int) -> None:
        """Add them."""
        self.evicted += tokens


@torch.inference_mode()
def test_greedy_answers_are_those_of_transformers(model: Any, loaded: LoadedModel, prompts: list[list[int]]) -> None:
    greedy = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    for prompt, answer in zip(prompts, generate(loaded, prompts, greedy, block_size=4), strict=True):
        tokens = [*prompt, *answer.tokens[0]]
        logits = model.double()(torch.tensor([tokens[:-1]])).logits[0, len(prompt) - 1 :]
        assert logits.argmax(-1).tolist() == answer.tokens[0]


@pytest.mark.parametrize(
    "limits",
    [
        pytest.param({}, id="whole prompts"),
        pytest.param({"max_num_batched_tokens": 7, "block_size": 4}, id="chunks"),
        pytest.param({"block_size": 4, "max_num_seqs": 2}, id="two at a time, prefixes shared"),
        pytest.param({"block_size": 1, "max_num_batched_tokens": 16}, id="blocks of one token"),
    ],
)
@pytest.mark.parametrize(
    ("policy", "seen"),
    [
        (Full(), SEES_OWN),
        (SlidingWindow(window=OWN), SEES_OWN),
        (SlidingWindow(window=100), SEES_OWN),
        (SlidingWindow(window=5), window(5)),
    ],
    ids=["full", "its own window", "a wider window", "a narrower window"],
)
def test_logits_are_the_oracles(
    loaded: LoadedModel,
    expected: Expected,
    prompts: list[list[int]],
    policy: KVPolicy,
    seen: Evict,
    limits: dict[str, Any],
) -> None:
    for prompt, answer in zip(prompts, generate(loaded, prompts, PARAMS, kv_policy=policy, **limits), strict=True):
        assert_close(answer, expected(prompt, answer.tokens[0], seen, False))


def test_sinks_that_its_layers_would_see_anyway_are_streamingllms(
    loaded: LoadedModel, expected: Expected, prompts: list[list[int]]
) -> None:
    policy = Streaming(sinks=3, window=5)
    for prompt, answer in zip(prompts, generate(loaded, prompts, PARAMS, kv_policy=policy, block_size=4), strict=True):
        assert_close(answer, expected(prompt, answer.tokens[0], window(5, sinks=3), True))


def test_no_more_blocks_are_held_than_the_window_needs(loaded: LoadedModel) -> None:
    """A prompt of 100 tokens and an answer of as many, 8 a step: at most 7 tokens before them in blocks of 4."""
    observer = Watching()
    (answer,) = generate(
        loaded,
        [[*range(3, 103)]],
        replace(PARAMS, max_tokens=100),
        observer,
        block_size=4,
        max_num_batched_tokens=8,
        kv_cache_memory=100 * BLOCK_BYTES,
    )
    assert len(answer.tokens[0]) == 100
    assert 3 <= round(observer.most * 100) <= Window(window=OWN).max_blocks(8, 4) == 5


def test_an_answer_may_be_longer_than_the_cache(loaded: LoadedModel, expected: Expected) -> None:
    limits = {"block_size": 4, "max_num_batched_tokens": 8, "kv_cache_memory": 5 * BLOCK_BYTES}
    (answer,) = generate(loaded, [[5]], replace(PARAMS, max_tokens=200), **limits)
    assert_close(answer, expected([5], answer.tokens[0], SEES_OWN))
    info = assemble(EngineConfig(**limits), loaded).info  # type: ignore[arg-type]
    assert (info.max_model_len, info.kv_tokens, info.full_length_requests) == (256, 20, 1.0)


def test_a_plain_request_is_told_of_no_eviction(loaded: LoadedModel) -> None:
    observer = Watching()
    plain, narrower = (
        generate(loaded, [[*range(3, 103)]], PARAMS, observer, kv_policy=policy, block_size=4)[0].evicted_tokens
        for policy in (Full(), SlidingWindow(window=5))
    )
    assert plain == 0
    assert narrower == observer.evicted > 100


def test_prefixes_longer_than_the_window_are_shared(loaded: LoadedModel, expected: Expected) -> None:
    """The second turn of a conversation finds all whole blocks of the first, of which all but a window was dropped."""

    async def serve() -> None:
        engine = assemble(EngineConfig(block_size=4, max_num_batched_tokens=16, kv_cache_memory=1 << 20), loaded)
        await engine.start()
        first = await ask(engine, [*range(3, 63)], PARAMS)
        second_prompt = [*range(3, 63), *first.tokens[0], *range(100, 110)]
        second = await ask(engine, second_prompt, PARAMS)
        assert (first.cached_tokens, second.cached_tokens) == (0, 80)  # the answer's last token was never computed
        assert_close(second, expected(second_prompt, second.tokens[0], SEES_OWN))
        narrower = await ask(engine, second_prompt, PARAMS, kv_policy=SlidingWindow(window=5))
        assert narrower.cached_tokens == 4
        assert_close(narrower, expected(second_prompt, narrower.tokens[0], window(5), False))
        await engine.stop()

    asyncio.run(serve())


@pytest.mark.parametrize("swap", [None, 40 * BLOCK_BYTES], ids=["recomputed", "swapped"])
def test_preemption_changes_nothing(loaded: LoadedModel, expected: Expected, swap: int | None) -> None:
    observer, prompts = Watching(), [[5], [6, 7, 8], [5, 6, 7, 8, 9], [10, 11]]
    answers = generate(
        loaded,
        prompts,
        PARAMS,
        observer,
        block_size=4,
        max_num_batched_tokens=8,
        kv_cache_memory=8 * BLOCK_BYTES,
        swap_memory=swap,
    )
    assert observer.preemptions > 0
    for prompt, answer in zip(prompts, answers, strict=True):
        assert_close(answer, expected(prompt, answer.tokens[0], SEES_OWN))


def test_each_of_four_continuations_is_the_oracles(
    loaded: LoadedModel, expected: Expected, prompts: list[list[int]]
) -> None:
    params = replace(PARAMS, n=4, temperature=1.0, seed=1, max_tokens=10)
    (answer,) = generate(loaded, [prompts[1]], params, block_size=4)
    assert len({tuple(tokens) for tokens in answer.tokens.values()}) > 1
    for index, tokens in answer.tokens.items():
        assert_close(answer, expected(prompts[1], tokens, SEES_OWN), index)


def test_a_plain_batch_is_what_it_is_on_any_other_model() -> None:
    item = ScheduledSequence(None, 0, array("i", [5]), array("i", [0]), 1, 0, Window(window=OWN, own=True))  # type: ignore[arg-type]
    assert ForwardBatch.build([item], 4, torch.device("cpu")).limits is None


# what a request gets


@pytest.mark.parametrize(
    ("windows", "budget", "expected"),
    [
        ((), None, None),
        ((None, None), None, None),
        ((8, None), None, None),
        ((8, None), Window(window=20), Window(window=20)),
        ((8, 8), None, Window(window=8, own=True)),
        ((8, 16), None, Window(window=16, own=True)),
        ((8, 16), Window(window=16), Window(window=16, own=True)),
        ((8, 16), Window(window=99), Window(window=16, own=True)),
        ((8, 16), Window(window=15), Window(window=15)),
        ((8, 16), Window(window=4, sinks=2), Window(window=4, sinks=2)),
    ],
)
def test_a_request_holds_no_more_than_any_layer_sees(
    windows: tuple[int | None, ...], budget: Window | None, expected: Window | None
) -> None:
    assert fitted(budget, windows) == expected


@pytest.fixture(scope="module")
def info(loaded: LoadedModel) -> EngineInfo:
    return assemble(EngineConfig(kv_cache_memory=1 << 20), loaded).info


def test_sinks_farther_away_than_a_layer_sees_are_refused(info: EngineInfo) -> None:
    assert budget_refusal(Window(window=6, sinks=2), replace(info, windows=(16, 8, None))) is None
    refusal = budget_refusal(Window(window=6, sinks=3), replace(info, windows=(16, 8, None)))
    assert refusal is not None
    assert refusal.startswith("this model has layers that see 8 tokens")
    assert "not 9" in refusal


def test_no_tokens_are_selected_where_a_layer_has_a_window(info: EngineInfo) -> None:
    assert budget_refusal(Selection(slots=4), replace(info, windows=(None, None))) is None
    assert "cannot select" in str(budget_refusal(Selection(slots=4), replace(info, windows=(None, 8))))


def test_a_request_for_too_many_sinks_is_refused(loaded: LoadedModel) -> None:
    async def refused() -> None:
        engine = assemble(EngineConfig(kv_cache_memory=1 << 20), loaded)
        await engine.start()
        with pytest.raises(InvalidRequestError, match="at most that, not 9") as caught:
            engine.submit([5], PARAMS, request_id="r", kv_policy=Streaming(sinks=1, window=8))
        assert caught.value.param == "kv_policy"
        await engine.stop()

    asyncio.run(refused())
