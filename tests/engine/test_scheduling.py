"""What comes out does not depend on how it is scheduled: every kind of answer under every kind of pressure."""

import dataclasses
from typing import Any

import pytest
import torch

from engine.beam_search import BeamParams
from engine.launch import LoadedModel
from engine.sampling_params import SamplingParams
from tests.engine.checkpoints import random_model
from tests.engine.driving import GREEDY, Answer, PreemptionCount, generate

_PROMPTS = [[5 + i % 7 + j for j in range(3 + 4 * i)] for i in range(12)]
_KINDS = (
    dataclasses.replace(GREEDY, n=2),
    SamplingParams(temperature=1.0, max_tokens=12, seed=4, n=2, ignore_eos=True),
    SamplingParams(max_tokens=20, n=3, best_of=4, beams=BeamParams(), logprobs=0),
)
_PARAMS = [_KINDS[number % 3] for number in range(len(_PROMPTS))]
_SMALL = 9 * 16 * 3 * 2 * 2 * 16 * 4
"""Bytes of a KV cache of nine blocks."""
_MOVED = {"preemptions", "out", "back"}


@pytest.fixture(scope="module")
def alone(tiny: LoadedModel) -> list[Answer]:
    """What each request is answered when there is no other."""
    requests = zip(_PROMPTS, _PARAMS, strict=True)
    return [generate(tiny, [prompt], params, prefix_caching=False)[0] for prompt, params in requests]


@pytest.mark.parametrize(
    ("happens", "limits"),
    [
        (set(), {}),
        (set(), {"max_num_batched_tokens": 5}),
        (set(), {"max_num_seqs": 4}),
        (set(), {"max_num_seqs": 7, "prefix_caching": False}),
        (set(), {"block_size": 1}),
        (set(), {"block_size": 64}),
        ({"preemptions"}, {"kv_cache_memory": _SMALL}),
        ({"preemptions"}, {"kv_cache_memory": _SMALL, "max_num_batched_tokens": 9}),
        ({"preemptions"}, {"kv_cache_memory": _SMALL, "preemption": "recompute", "prefix_caching": False}),
        ({"preemptions"}, {"kv_cache_memory": _SMALL, "block_size": 4, "prefix_caching": False}),
        (_MOVED, {"kv_cache_memory": _SMALL, "preemption": "recompute", "swap_memory": 4 * _SMALL}),
        (_MOVED, {"kv_cache_memory": _SMALL, "preemption": "swap", "swap_memory": 4 * _SMALL}),
        (
            _MOVED,
            {"kv_cache_memory": _SMALL, "preemption": "swap", "swap_memory": 4 * _SMALL, "prefix_caching": False},
        ),
        (_MOVED, {"kv_cache_memory": _SMALL, "swap_memory": _SMALL, "block_size": 4}),
        (set(), {"batching": "none"}),
        (set(), {"batching": "static", "batch_size": 4}),
        ({"preemptions"}, {"batching": "dynamic", "batch_size": 5, "batch_delay": 0.001, "kv_cache_memory": _SMALL}),
        (set(), {"scheduling": "fair"}),
    ],
    ids=str,
)
def test_answers_of_every_kind_are_those_that_each_request_gets_alone(
    tiny: LoadedModel, alone: list[Answer], happens: set[str], limits: dict[str, Any]
) -> None:
    count = PreemptionCount()
    answers = generate(tiny, _PROMPTS, _PARAMS, observer=count, **limits)
    assert [answer.tokens for answer in answers] == [answer.tokens for answer in alone]
    assert [answer.text for answer in answers] == [answer.text for answer in alone]
    assert {name for name in _MOVED if getattr(count, name)} == happens


@pytest.fixture(scope="module")
def beams_of_transformers() -> list[list[list[int]]]:
    """For each of eight prompts the three best of four beams, from the model that `tiny` was saved from."""
    model = random_model("llama")
    found = [
        model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=20,
            do_sample=False,
            num_beams=4,
            num_return_sequences=3,
            length_penalty=0.8,
            eos_token_id=2,
            pad_token_id=0,
        )
        for prompt in _PROMPTS[:8]
    ]
    return [beams[:, len(prompt) :].tolist() for prompt, beams in zip(_PROMPTS, found, strict=False)]


@pytest.mark.parametrize(
    "limits", [{}, {"kv_cache_memory": _SMALL}, {"kv_cache_memory": _SMALL, "swap_memory": 8 * _SMALL}], ids=str
)
def test_beams_of_eight_prompts_are_those_of_transformers(
    tiny: LoadedModel, beams_of_transformers: list[list[list[int]]], limits: dict[str, Any]
) -> None:
    params, count = (
        SamplingParams(max_tokens=20, n=3, best_of=4, beams=BeamParams(length_penalty=0.8)),
        PreemptionCount(),
    )
    answers = generate(tiny, _PROMPTS[:8], params, observer=count, **limits)
    for answer, theirs in zip(answers, beams_of_transformers, strict=True):
        assert [
            answer.tokens[index] + [0] * (len(theirs[index]) - len(answer.tokens[index])) for index in range(3)
        ] == theirs
    assert bool(count.preemptions) == bool(limits)
    assert bool(count.back) == ("swap_memory" in limits)


def test_the_best_beam_comes_first(alone: list[Answer]) -> None:
    for answer in alone[2::3]:
        scores = [sum(one.logprob for one in output.logprobs) / len(output.logprobs) for output in answer.outputs]
        assert scores == sorted(scores, reverse=True)
        assert len(set(scores)) == 3
