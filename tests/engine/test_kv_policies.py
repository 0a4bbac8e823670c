"""Each KV policy's logits are the oracle's, however its requests are batched, chunked, shared and preempted."""

import asyncio
import functools
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.config import EngineConfig
from engine.kv_cache import KVCache
from engine.kv_policies.full import Full
from engine.kv_policies.h2o import H2O
from engine.kv_policies.knorm import KNorm
from engine.kv_policies.policy import KVPolicy
from engine.kv_policies.pyramid import Pyramid
from engine.kv_policies.registry import describe, make_policy, policy_setting
from engine.kv_policies.snapkv import SnapKV
from engine.kv_policies.spatten import SpAtten
from engine.kv_policies.streaming import Streaming
from engine.kv_policies.tova import TOVA
from engine.kv_policies.window import SlidingWindow
from engine.launch import LoadedModel, assemble, load_model
from engine.outputs import Output
from engine.sampling_params import SamplingParams
from kernels import ops
from kernels.kv_format import FORMATS
from tests.engine.checkpoints import SHAPE, random_model, save
from tests.engine.driving import Answer, PreemptionCount, ask, generate
from tests.engine.kv_oracle import (
    Cascade,
    Oracle,
    heaviest,
    in_two_steps,
    most_attended_now,
    observed_at_the_end,
    smallest_keys,
    window,
    without_smallest,
)

Expected = Callable[[str, Sequence[int], Sequence[int]], Tensor]
VOCAB = SHAPE["vocab_size"]
PARAMS = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, logprobs=VOCAB, repetition_penalty=100.0)
"""No token comes twice: in the first layer equal tokens have equal keys, and which of them goes is left to rounding."""

POLICIES: dict[str, tuple[KVPolicy, Callable[[Any, int], Oracle]]] = {
    "full": (Full(), lambda model, _: Oracle(model)),
    "window": (SlidingWindow(window=11), lambda model, _: Oracle(model, before=window(11))),
    "streaming": (
        Streaming(sinks=3, window=10),
        lambda model, _: Oracle(model, before=window(10, sinks=3), in_cache_positions=True),
    ),
    "streaming with many sinks": (
        Streaming(sinks=9, window=2),
        lambda model, _: Oracle(model, before=window(2, sinks=9), in_cache_positions=True),
    ),
    "h2o": (
        H2O(heavy=5, recent=5, slack=1, prompt_slack=1),
        lambda model, prompt: Oracle(model, after=heaviest(5, 5, (1, 1), prompt)),
    ),
    "h2o with slack": (
        H2O(heavy=7, recent=2, slack=4, prompt_slack=13),
        lambda model, prompt: Oracle(model, after=heaviest(7, 2, (13, 4), prompt)),
    ),
    "snapkv": (
        SnapKV(keep=9, observed=3, pooled=3),
        lambda model, prompt: Oracle(model, in_all_layers=observed_at_the_end(lambda layer: 9, 3, 3, prompt)),
    ),
    "pyramid": (  # 4 + 5 on average, 1 less in the last layer than in the first
        Pyramid(keep=9, observed=4, pooled=1, steepness=3),
        lambda model, prompt: Oracle(model, in_all_layers=observed_at_the_end(lambda n: (13, 5)[n], 4, 1, prompt)),
    ),
    "spatten": (
        SpAtten(keep=12, keep_last=8, sinks=2, recent=3, slack=3, prompt_slack=5),
        lambda model, prompt: Oracle(model, in_all_layers=Cascade((12, 8), (2, 2), (5, 3), prompt, 2, 3)),
    ),
    "spatten with fewer heads": (
        SpAtten(keep=11, keep_last=9, sinks=1, recent=2, slack=2, prompt_slack=3, heads=0.5),
        lambda model, prompt: Oracle(model, in_all_layers=Cascade((11, 9), (2, 1), (3, 2), prompt, 1, 2)),
    ),
    "spatten with everything": (
        SpAtten(
            keep=12,
            keep_last=7,
            sinks=1,
            recent=2,
            slack=1,
            prompt_slack=4,
            heads=0.5,
            values=0.4,
        ),
        lambda model, prompt: Oracle(
            model,
            in_all_layers=Cascade((12, 7), (2, 1), (4, 1), prompt, 1, 2),
            weights=without_smallest(0.4),
        ),
    ),
    "tova": (
        TOVA(keep=8, slack=1, prompt_slack=4),
        lambda model, prompt: Oracle(model, together=most_attended_now(8, (4, 1), prompt)),
    ),
    "knorm": (
        KNorm(keep=6, recent=3, slack=3, prompt_slack=9),
        lambda model, prompt: Oracle(model, after=smallest_keys(6, 3, (9, 3), prompt)),
    ),
}


@pytest.fixture(scope="module")
def model() -> Any:
    return random_model("llama", num_hidden_layers=2, max_position_embeddings=72)


@pytest.fixture(scope="module")
def loaded(model: Any, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = save(model, tmp_path_factory.mktemp("llama"))
    return load_model(EngineConfig(model=str(folder), dtype="float32"))


@pytest.fixture(scope="module")
def expected(model: Any) -> Expected:
    """The oracle's log-probabilities [output tokens, vocab] for a prompt and what came out, under a policy's name."""

    @functools.cache
    def compute(name: str, prompt: tuple[int, ...], output: tuple[int, ...]) -> Tensor:
        logits = POLICIES[name][1](model, len(prompt)).run([*prompt, *output[:-1]])
        return logits[len(prompt) - 1 :].log_softmax(-1)

    return lambda name, prompt, output: compute(name, tuple(prompt), tuple(output))


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Some begin alike; of all lengths around blocks and windows."""
    source = random.Random(5)
    tokens = source.sample(range(3, VOCAB), k=80)
    common = tokens[:30]
    return [common[:12], [*common[:20], *tokens[30:32]], common, tokens[32:77], [tokens[78]]]


def actual(output: Output) -> Tensor:
    """All log-probabilities after a token, [vocab]."""
    (sampled,) = output.logprobs
    found = torch.full((VOCAB,), torch.nan, dtype=torch.float64)
    for token, logprob in sampled.top:
        found[token] = logprob
    return found


def assert_close(answer: Answer, expected: Tensor, index: int = 0) -> None:
    """Every log-probability after every token of a continuation, within 1e-4 of those expected [tokens, vocab]."""
    outputs = [output for output in answer.outputs if output.index == index]
    for output, likelihoods in zip(outputs, expected, strict=True):
        torch.testing.assert_close(actual(output), likelihoods, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize(
    "limits",
    [
        pytest.param({}, id="whole prompts"),
        pytest.param({"max_num_batched_tokens": 7, "block_size": 4}, id="chunks"),
        pytest.param({"block_size": 4, "max_num_seqs": 2}, id="two at a time, prefixes shared"),
    ],
)
def test_logits_are_the_oracles(
    loaded: LoadedModel, expected: Expected, prompts: list[list[int]], name: str, limits: dict[str, Any]
) -> None:
    for prompt, answer in zip(
        prompts, generate(loaded, prompts, PARAMS, kv_policy=POLICIES[name][0], **limits), strict=True
    ):
        assert_close(answer, expected(name, prompt, answer.tokens[0]))


BLOCK_BYTES = 2 * 2 * SHAPE["num_key_value_heads"] * SHAPE["head_dim"] * 4 * 4
"""Of a block of 4 tokens in the model's two layers, in float32."""


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("swap", [None, 40 * BLOCK_BYTES], ids=["recomputed", "swapped"])
def test_preemption_changes_nothing(loaded: LoadedModel, expected: Expected, name: str, swap: int | None) -> None:
    """A pool in which a whole request just fits, and four of them that begin small."""
    policy, prompts = POLICIES[name][0], [[5], [6, 7, 8], [5, 6, 7, 8, 9], [10, 11]]
    observer = PreemptionCount()
    answers = generate(
        loaded,
        prompts,
        PARAMS,
        observer,
        kv_policy=policy,
        block_size=4,
        max_num_batched_tokens=8,
        kv_cache_memory=8 * BLOCK_BYTES,
        swap_memory=swap,
    )
    assert observer.preemptions > 0
    for prompt, answer in zip(prompts, answers, strict=True):
        assert_close(answer, expected(name, prompt, answer.tokens[0]))


@pytest.mark.parametrize("name", POLICIES)
def test_each_of_four_continuations_is_the_oracles(
    loaded: LoadedModel, expected: Expected, prompts: list[list[int]], name: str
) -> None:
    params = replace(PARAMS, n=4, temperature=1.0, seed=1, max_tokens=10)
    (answer,) = generate(loaded, [prompts[1]], params, kv_policy=POLICIES[name][0], block_size=4)
    assert len({tuple(tokens) for tokens in answer.tokens.values()}) > 1
    for index, tokens in answer.tokens.items():
        assert_close(answer, expected(name, prompts[1], tokens), index)


def test_an_answers_queries_meet_high_bits_first(model: Any, loaded: LoadedModel, prompts: list[list[int]]) -> None:
    """SpAtten's progressive quantization. Where a number lies just between two codes the oracle may take the other one,
    so that few tokens' likelihoods differ a little; one step instead of two, or in the prompt too: by 0.2 to 0.8."""
    policy = SpAtten(keep=60, keep_last=60, recent=8, slack=20, prompt_slack=20, high_bits=4, low_bits=4, threshold=0.3)
    for prompt, answer in zip(prompts, generate(loaded, prompts, PARAMS, kv_policy=policy), strict=True):
        oracle = Oracle(model, probabilities=in_two_steps(4, 4, 0.3, len(prompt)))
        likelihoods = oracle.run([*prompt, *answer.tokens[0][:-1]])[len(prompt) - 1 :].log_softmax(-1)
        differences = sorted(
            (actual(output) - one).abs().max() for output, one in zip(answer.outputs, likelihoods, strict=True)
        )
        assert differences[len(differences) // 2] < 0.01
        assert differences[-1] < 0.1


def test_a_stream_runs_past_the_trained_length_at_constant_memory(
    model: Any, loaded: LoadedModel, expected: Expected
) -> None:
    """4 times the trained length, in a cache that would hold a third of it."""
    policy, length = POLICIES["streaming"][0], 4 * model.config.max_position_embeddings
    limits = {"kv_policy": policy, "block_size": 4, "kv_cache_memory": 6 * BLOCK_BYTES, "max_num_batched_tokens": 4}
    (answer,) = generate(loaded, [[5]], replace(PARAMS, max_tokens=length), **limits)
    tokens = answer.tokens[0]
    assert len(tokens) == length
    assert_close(answer, expected("streaming", [5], tokens))


def test_requests_with_different_policies_share_a_batch(
    loaded: LoadedModel, expected: Expected, prompts: list[list[int]]
) -> None:
    named = [(name, policy, prompt) for name, (policy, _) in POLICIES.items() for prompt in prompts[1:4:2]]

    async def serve() -> list[Answer]:
        engine = assemble(EngineConfig(block_size=4, max_num_batched_tokens=29), loaded)
        await engine.start()
        asked = (ask(engine, prompt, PARAMS, f"{i}", kv_policy=policy) for i, (_, policy, prompt) in enumerate(named))
        answers = await asyncio.gather(*asked)
        assert engine.stats().used_blocks == 0
        await engine.stop()
        return answers

    for (name, _, prompt), answer in zip(named, asyncio.run(serve()), strict=True):
        assert_close(answer, expected(name, prompt, answer.tokens[0]))


@pytest.mark.parametrize("stored", ["fp16", "int8", "int4"])
def test_under_every_policy_rows_are_worth_what_they_decode_to_whatever_happens_to_a_request(
    loaded: LoadedModel, stored: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Expected is what comes out of a plain cache that is given decoded rows, one request after the other.

    Where sums are in another order, a value may just be rounded to the next code, so the tolerance is larger.
    """
    prompts, params = [[6, 7, 8], [*range(5, 29)], [*range(5, 27), 34]], replace(PARAMS, max_tokens=12, logprobs=1)
    named = [(POLICIES[name][0], prompt) for name in ("full", "streaming", "h2o", "knorm") for prompt in prompts]
    kv_format, write = FORMATS[stored], ops.kv_write
    block = KVCache.block_bytes(loaded.decoder.config, 4, torch.float32, kv_format)
    small = {"kv_cache_dtype": stored, "kv_cache_memory": 12 * block}

    async def serve(**limits: Any) -> list[Answer]:
        observer = PreemptionCount()
        engine = assemble(EngineConfig(block_size=4, **limits), loaded, observer)
        await engine.start()
        asked = (ask(engine, prompt, params, f"{i}", kv_policy=policy) for i, (policy, prompt) in enumerate(named))
        answers = await asyncio.gather(*asked)
        await engine.stop()
        assert (observer.preemptions > 0, observer.back > 0) == ("kv_cache_memory" in limits, "swap_memory" in limits)
        return answers

    def write_decoded(k: Tensor, v: Tensor, *rest: Any) -> None:
        write(*(kv_format.decode(kv_format.encode(heads)) for heads in (k, v)), *rest)

    with monkeypatch.context() as patch:
        patch.setattr(ops, "kv_write", write_decoded)
        alone = asyncio.run(serve(max_num_seqs=1, prefix_caching=False))
    for limits in ({"kv_cache_dtype": stored, "max_num_batched_tokens": 29}, small, {**small, "swap_memory": 1 << 20}):
        for answer, expected in zip(asyncio.run(serve(**limits)), alone, strict=True):
            assert answer.tokens == expected.tokens
            for output, wanted in zip(answer.outputs, expected.outputs, strict=True):
                assert output.logprobs[0].logprob == pytest.approx(wanted.logprobs[0].logprob, abs=0.01)


def test_what_was_evicted_is_counted(loaded: LoadedModel) -> None:
    """17 prompt and 23 computed output tokens: the last query, at position 39, sees from 29 on, in blocks of 4."""
    (answer,) = generate(loaded, [[*range(3, 20)]], PARAMS, kv_policy=SlidingWindow(window=11), block_size=4)
    assert answer.evicted_tokens == 28


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("h3o", "there is no policy 'h3o'"),
        ({"type": "snapkv", "observed": 300}, "observed must be at least 1 and at most what is kept, 256"),
        ({"type": "snapkv", "pooled": 4}, "pooled must be an odd number, not 4"),
        ({"type": "pyramid", "steepness": 0}, "steepness must be at least 1"),
        ({"type": "spatten", "keep": 64}, "keep_last must be at least sinks"),
        ({"type": "spatten", "heads": 0}, "heads must be more than 0"),
        ({"type": "spatten", "values": float("nan")}, "values must be a number of a sane size"),
        ({"type": "spatten", "values": "0.5"}, "values must be a number"),
        ({"type": "spatten", "threshold": 10**400}, "threshold must be a number of a sane size"),
        ({"type": "spatten", "high_bits": 1}, "high_bits must be 0 or from 2 to 12"),
        ({"type": "streaming", "sinks": "4"}, "sinks must be a whole number"),
        ({"type": "streaming", "sinks": True}, "sinks must be a whole number"),
        ({"type": "streaming", "sinks": 0}, "at least 1 sink"),
        ({"type": "streaming", "heavy": 4}, "has only 'sinks', 'window', not 'heavy'"),
        ({"type": "window", "window": 0}, "a window has at least 1 token"),
        ({"type": "full", "window": 1}, "has no fields"),
        ({"window": 1}, "must be a policy's name"),
        (["streaming"], "must be a policy's name"),
        (None, "must be a policy's name"),
    ],
)
def test_a_policy_that_makes_no_sense_is_refused_in_words(given: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_policy(given)


@pytest.mark.parametrize("policy", [policy for policy, _ in POLICIES.values()])
def test_a_described_policy_is_made_again(policy: KVPolicy) -> None:
    assert make_policy(describe(policy)) == policy
    assert policy_setting(json.dumps(describe(policy))) == policy
