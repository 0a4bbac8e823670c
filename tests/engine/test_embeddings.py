"""A prompt's pooled states are those of transformers, however the prompt is computed and whatever else is."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.config import EngineConfig
from engine.errors import InvalidRequestError
from engine.kv_policies.streaming import Streaming
from engine.launch import LoadedModel, assemble, load_model
from engine.request_state import Vector
from engine.sampling_params import Pooling, SamplingParams
from tests.engine.checkpoints import random_model, save
from tests.engine.driving import GREEDY, Answer, PreemptionCount, generate
from tests.engine.prompts import PROMPTS

MEAN, LAST = SamplingParams(max_tokens=0, pooling="mean"), SamplingParams(max_tokens=0, pooling="last")
TEXTS = [[5, 9, 200, 17, 31, 44, 90, 12, 77, 250, 61, 8, 130], [*range(30, 70)], [7], [*range(100, 117)]]
LIMITS = [
    pytest.param({}, id="all at once"),
    pytest.param({"max_num_batched_tokens": 7, "block_size": 4}, id="in chunks"),
    pytest.param({"max_num_seqs": 1}, id="one at a time"),
]


@torch.inference_mode()
def expected(model: Any, tokens: list[int], pooling: Pooling) -> Vector:
    """Of a model of transformers without its head."""
    states = model(torch.tensor([tokens])).last_hidden_state[0].double()
    return (states.mean(0) if pooling == "mean" else states[-1]).float().numpy()


def assert_equal(ours: Vector, theirs: Vector) -> None:
    assert ours.dtype == np.float32
    assert np.linalg.norm(ours - theirs) < 1e-5 * np.linalg.norm(theirs)


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_embeddings_equal_transformers_states_beside_requests_of_all_kinds(
    model_type: str, limits: dict[str, Any], tmp_path: Path
) -> None:
    model = random_model(model_type)
    loaded = load_model(EngineConfig(model=str(save(model, tmp_path)), dtype="float32"))
    kinds = [MEAN, LAST, GREEDY, replace(GREEDY, prompt_logprobs=2), replace(MEAN, pooling=None, prompt_logprobs=0)]
    asked = [(text, kind) for text in TEXTS for kind in kinds]
    answers = generate(loaded, [text for text, _ in asked], [kind for _, kind in asked], **limits)
    for (text, kind), answer in zip(asked, answers, strict=True):
        assert len(answer.tokens[0]) == kind.max_tokens
        assert len(answer.prompt_logprobs) == (0 if kind.prompt_logprobs is None else len(text) - 1)
        if kind.pooling is None:
            assert answer.embedding is None
        else:
            assert_equal(answer.embedding, expected(model.model, text, kind.pooling))


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_the_embedded_models_embeddings_equal_those_of_transformers(
    embedded: LoadedModel, oracle: Any, pooling: Pooling
) -> None:
    prompts = [embedded.checkpoint.tokenizer.encode(text) for text in (PROMPTS[0], PROMPTS[2], PROMPTS[15])]
    for limits in ({}, {"max_num_batched_tokens": 5}):
        answers = generate(embedded, prompts, replace(MEAN, pooling=pooling), **limits)
        for prompt, answer in zip(prompts, answers, strict=True):
            assert_equal(answer.embedding, expected(oracle.model, prompt, pooling))


def test_an_embedding_ends_with_one_empty_output(tiny: LoadedModel) -> None:
    (answer,) = generate(tiny, [TEXTS[0]], MEAN)
    (output,) = answer.outputs
    assert (output.text, output.token_ids, output.finish_reason) == ("", (), "length")


@pytest.mark.parametrize(("params", "cached"), [(MEAN, 0), (LAST, 32)])
def test_a_mean_needs_the_whole_prompt_and_the_last_state_only_what_the_cache_lacks(
    tiny: LoadedModel, params: SamplingParams, cached: int
) -> None:
    first, again, after = generate(tiny, [TEXTS[1]] * 3, [params, params, GREEDY], max_num_seqs=1)
    assert (first.cached_tokens, again.cached_tokens, after.cached_tokens) == (0, cached, 32)
    assert_equal(again.embedding, first.embedding)


@pytest.mark.parametrize("host", [0, 1 << 20])
def test_a_preempted_prompt_is_pooled_once(tiny: LoadedModel, host: int) -> None:
    """Streams make room for themselves in the middle of long prompts."""
    observer = PreemptionCount()
    block = tiny.decoder.config.kv_rows_per_token * tiny.decoder.config.head_dim * 4 * 4
    streams = [([3 + i], replace(GREEDY, max_tokens=30)) for i in range(3)]
    texts = [([*range(10 * i, 10 * i + 38)], MEAN) for i in range(4)]
    asked = [*streams, *texts]
    answers = generate(
        tiny,
        [prompt for prompt, _ in asked],
        [params for _, params in asked],
        observer,
        block_size=4,
        max_num_batched_tokens=5,
        kv_cache_memory=26 * block,
        swap_memory=host or None,
    )
    assert observer.preemptions > 0
    for (prompt, _), answer in zip(texts, answers[3:], strict=True):
        assert_equal(answer.embedding, generate(tiny, [prompt], MEAN)[0].embedding)


def test_an_embedding_under_a_policy_is_the_one_that_it_leads_to(tiny: LoadedModel) -> None:
    def embedding(policy: Streaming) -> Answer:
        return generate(tiny, [TEXTS[1]], MEAN, kv_policy=policy)[0]

    whole = generate(tiny, [TEXTS[1]], MEAN)[0]
    assert_equal(embedding(Streaming(sinks=2, window=60)).embedding, whole.embedding)
    assert not np.allclose(embedding(Streaming(sinks=2, window=8)).embedding, whole.embedding, atol=1e-3)


@pytest.mark.parametrize("length", [256, 257])
async def test_a_prompt_may_fill_the_context_where_nothing_follows(tiny: LoadedModel, length: int) -> None:
    engine = assemble(EngineConfig(kv_cache_memory=1 << 24), tiny)
    await engine.start()
    prompt = [1 + number % 300 for number in range(length)]
    if length > engine.max_model_len:
        with pytest.raises(InvalidRequestError, match="context length is 256") as caught:
            engine.submit(prompt, MEAN, request_id="a")
        assert caught.value.code == "context_length_exceeded"
    else:
        stream = engine.submit(prompt, MEAN, request_id="a")
        assert [output.finish_reason async for output in stream] == ["length"]
        assert stream.embedding is not None
    await engine.stop()


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (replace(MEAN, best_of=3), "max_tokens must be at least 1"),
        (replace(MEAN, prompt_logprobs=1), "either scored or pooled"),
        (replace(MEAN, max_tokens=-1), "max_tokens must be at least 0"),
    ],
)
async def test_what_cannot_be_is_refused(tiny: LoadedModel, params: SamplingParams, message: str) -> None:
    engine = assemble(EngineConfig(kv_cache_memory=1 << 20), tiny)
    await engine.start()
    with pytest.raises(InvalidRequestError, match=message):
        engine.submit([1, 2], params, request_id="a")
    await engine.stop()
