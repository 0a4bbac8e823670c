"""A prompt's own log-probabilities are those of the model, however the prompt is computed."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from engine.kv_policies.streaming import Streaming
from engine.launch import LoadedModel
from engine.outputs import TokenLogprob
from tests.engine.driving import GREEDY, PreemptionCount, all_logits, generate

SCORED = replace(GREEDY, max_tokens=4, prompt_logprobs=3)
PROMPTS = [[5, 9, 200, 17, 31, 44, 90, 12, 77, 250, 61, 8, 130], [*range(30, 70)], [7]]


def assert_model_says(loaded: LoadedModel, prompt: list[int], scores: list[TokenLogprob], count: int = 3) -> None:
    """Every token but the first, with the best in its place, as one pass over the whole prompt has them."""
    likelihoods = all_logits(loaded, prompt, [len(prompt)]).float().log_softmax(-1)
    assert [one.token_id for one in scores] == prompt[1:]
    for one, row in zip(scores, likelihoods, strict=False):
        assert one.logprob == pytest.approx(float(row[one.token_id]), abs=1e-4)
        best = row.topk(count)
        assert [token for token, _ in one.top] == best.indices.tolist()
        torch.testing.assert_close(torch.tensor([value for _, value in one.top]), best.values, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "limits",
    [
        pytest.param({}, id="all at once"),
        pytest.param({"max_num_batched_tokens": 7, "block_size": 4}, id="in chunks"),
        pytest.param({"max_num_seqs": 2}, id="two at a time"),
    ],
)
def test_every_prompt_token_has_the_models_likelihood(tiny: LoadedModel, limits: dict[str, Any]) -> None:
    mixed = [SCORED, replace(SCORED, n=2, temperature=1.0, seed=1), SCORED]
    for prompt, answer in zip(PROMPTS, generate(tiny, PROMPTS, mixed, **limits), strict=True):
        assert_model_says(tiny, prompt, answer.prompt_logprobs)


def test_what_is_generated_is_what_it_was(tiny: LoadedModel) -> None:
    plain = replace(SCORED, prompt_logprobs=None, logprobs=2)
    both = generate(tiny, [*PROMPTS, *PROMPTS], [*[plain] * 3, *[replace(plain, prompt_logprobs=0)] * 3])
    for alone, scored in zip(both[:3], both[3:], strict=True):
        assert scored.tokens == alone.tokens
        assert not alone.prompt_logprobs


def test_a_scored_prompt_comes_from_no_cache_and_enters_it(tiny: LoadedModel) -> None:
    prompt = PROMPTS[1]
    answers = generate(tiny, [prompt] * 3, [replace(SCORED, prompt_logprobs=None), SCORED, GREEDY], max_num_seqs=1)
    assert [answer.cached_tokens for answer in answers] == [0, 0, 32]
    assert_model_says(tiny, prompt, answers[1].prompt_logprobs)


def test_a_preempted_prompt_is_scored_once_more(tiny: LoadedModel) -> None:
    observer = PreemptionCount()
    params = replace(SCORED, max_tokens=30)
    prompts = [[*range(10 * i + 3, 10 * i + 13)] for i in range(4)]
    block = tiny.decoder.config.kv_rows_per_token * tiny.decoder.config.head_dim * 4 * 4
    answers = generate(tiny, prompts, params, observer, block_size=4, kv_cache_memory=14 * block)
    assert observer.preemptions > 0
    for prompt, answer in zip(prompts, answers, strict=True):
        assert_model_says(tiny, prompt, answer.prompt_logprobs)


def test_likelihoods_under_a_policy_are_those_that_it_leads_to(tiny: LoadedModel) -> None:
    full, streaming = (
        generate(tiny, [PROMPTS[1]], SCORED, kv_policy=policy)[0].prompt_logprobs
        for policy in (Streaming(sinks=2, window=60), Streaming(sinks=2, window=8))
    )
    assert [one.logprob for one in full[:9]] == pytest.approx([one.logprob for one in streaming[:9]], abs=1e-4)
    assert full[-1].logprob != pytest.approx(streaming[-1].logprob, abs=1e-3)
