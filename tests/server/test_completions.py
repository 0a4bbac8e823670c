"""POST /v1/completions, as the official client sees it."""

import json
from typing import Any

import pytest

from engine.outputs import TokenLogprob
from server.logprobs import LegacyLogprobs
from tests.server.conftest import Live
from tests.server.fakes import SENTENCE, byte_tokenizer


def answer_to(live: Live, prompt: str, index: int = 0, seed: int | None = None) -> str:
    """What the fake engine says."""
    return f"{SENTENCE}{sum(live.engine.tokenizer.encode(prompt))}, {seed} or {index}."


def test_a_text_is_continued(live: Live) -> None:
    answer = live.openai.completions.create(model="fake", prompt="Hello", max_tokens=100)
    assert answer.object == "text_completion"
    assert answer.model == "fake"
    assert answer.id.startswith("cmpl-")
    (choice,) = answer.choices
    assert choice.text == answer_to(live, "Hello")
    assert choice.finish_reason == "stop"
    assert choice.logprobs is None


def test_sixteen_tokens_are_the_default(live: Live) -> None:
    answer = live.openai.completions.create(model="fake", prompt="Hello")
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16
    assert answer.choices[0].finish_reason == "length"


def test_usage_counts_prompt_and_cached_and_generated_tokens(live: Live) -> None:
    answer = live.openai.completions.create(model="fake", prompt="a" * 40, max_tokens=5)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 41  # <s> comes first
    assert answer.usage.completion_tokens == 5
    assert answer.usage.total_tokens == 46
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 32


def test_the_four_forms_of_a_prompt_mean_the_same(live: Live) -> None:
    ids = [live.engine.tokenizer.encode(text) for text in ("one", "two")]
    single = [
        live.openai.completions.create(model="fake", prompt=form, max_tokens=99).choices[0].text
        for form in ("one", ["one"], ids[0], [ids[0]])
    ]
    assert set(single) == {answer_to(live, "one")}
    for form in (["one", "two"], ids):
        answer = live.openai.completions.create(model="fake", prompt=form, max_tokens=99)
        assert [choice.text for choice in answer.choices] == [answer_to(live, "one"), answer_to(live, "two")]


def test_a_choices_index_is_prompt_times_n_plus_continuation(live: Live) -> None:
    answer = live.openai.completions.create(model="fake", prompt=["one", "two"], n=3, max_tokens=99, seed=7)
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert [choice.text for choice in answer.choices] == [
        answer_to(live, prompt, index, seed=7) for prompt in ("one", "two") for index in range(3)
    ]


@pytest.mark.parametrize("stop", ["answer", ["nothing", "answer"]])
def test_a_stop_string_ends_the_text_and_is_not_in_it(live: Live, stop: str | list[str]) -> None:
    answer = live.openai.completions.create(model="fake", prompt="x", max_tokens=99, stop=stop)
    assert answer.choices[0].text == "The café's 😀 "
    assert answer.choices[0].finish_reason == "stop"


def test_echo_puts_the_prompt_before_the_text(live: Live) -> None:
    answer = live.openai.completions.create(model="fake", prompt=["é!", "b"], echo=True, max_tokens=99)
    assert [choice.text for choice in answer.choices] == ["é!" + answer_to(live, "é!"), "b" + answer_to(live, "b")]


def test_echo_of_token_ids_is_their_text(live: Live) -> None:
    ids = live.engine.tokenizer.encode("words")
    answer = live.openai.completions.create(model="fake", prompt=ids, echo=True, max_tokens=3)
    assert answer.choices[0].text == "wordsThe"


@pytest.mark.parametrize("stream", [False, True])
def test_zero_tokens_with_echo_give_the_prompt_alone_without_troubling_the_engine(live: Live, stream: bool) -> None:
    before = len(live.engine.submitted)
    body = {"prompt": "Hello", "echo": True, "max_tokens": 0, "stream": stream}
    answer = live.http.post("/v1/completions", json=body)
    assert answer.status_code == 200
    assert '"text": "Hello"' in answer.text
    assert '"finish_reason": "length"' in answer.text
    assert len(live.engine.submitted) == before


def test_an_echo_with_logprobs_has_aligned_arrays_over_prompt_and_output(live: Live) -> None:
    answer = live.openai.completions.create(model="fake", prompt=["é!", "b"], n=2, echo=True, max_tokens=2, logprobs=1)
    for index, (text, tokens, offsets) in enumerate(
        [("é!Th", ["<s>", "bytes:\\xc3", "bytes:\\xa9", "!", "T", "h"], [0, 0, 0, 1, 2, 3])] * 2
        + [("bTh", ["<s>", "b", "T", "h"], [0, 0, 1, 2])] * 2
    ):
        choice = answer.choices[index]
        logprobs = choice.logprobs
        assert logprobs is not None
        assert choice.text == text
        assert logprobs.tokens == tokens
        assert logprobs.text_offset == offsets
        assert logprobs.token_logprobs == [None, *[-2.0] * (len(tokens) - 3), -1.5, -1.5]
        assert logprobs.top_logprobs is not None
        assert logprobs.top_logprobs[:2] == [None, {tokens[1]: -2.0} | {"b": -0.5}]
    assert live.engine.submitted[-1].params.prompt_logprobs == 1


@pytest.mark.parametrize("max_tokens", [0, 1, 5])
def test_a_streamed_echo_with_logprobs_equals_the_whole(live: Live, max_tokens: int) -> None:
    body = {"prompt": ["é!", "b"], "echo": True, "max_tokens": max_tokens, "logprobs": 2, "n": 2}
    whole = live.http.post("/v1/completions", json=body).json()
    assert whole["usage"]["completion_tokens"] == 4 * max_tokens
    assert len(whole["choices"][0]["logprobs"]["tokens"]) == 4 + max_tokens
    pieces: dict[int, dict[str, Any]] = {}
    for line in live.http.post("/v1/completions", json={**body, "stream": True}).text.splitlines():
        if not line.startswith("data: {"):
            continue
        for choice in json.loads(line.removeprefix("data: "))["choices"]:
            piece = pieces.setdefault(choice["index"], {"text": "", "logprobs": {}, "finish_reason": None})
            assert piece["finish_reason"] is None
            piece["text"] += choice["text"]
            piece["finish_reason"] = choice["finish_reason"]
            for name, values in choice["logprobs"].items():
                piece["logprobs"].setdefault(name, []).extend(values)
    assert [{"index": index, **pieces[index]} for index in sorted(pieces)] == whole["choices"]


def test_logprobs_come_in_aligned_arrays(live: Live) -> None:
    answer = live.openai.completions.create(model="fake", prompt="x", max_tokens=4, logprobs=1)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens == ["T", "h", "e", " "]
    assert logprobs.token_logprobs == [-1.5] * 4
    assert logprobs.text_offset == [0, 1, 2, 3]
    # One alternative each, and the sampled token beside it.
    assert logprobs.top_logprobs is not None
    assert all(len(top) == 2 for top in logprobs.top_logprobs)
    assert all(top[token] == -1.5 for top, token in zip(logprobs.top_logprobs, logprobs.tokens, strict=True))


@pytest.mark.parametrize("pieces", [1, 100])
def test_offsets_follow_the_text_through_characters_of_several_tokens(pieces: int) -> None:
    tokenizer = byte_tokenizer()
    text = "I 😀 b 日本"
    ids = tokenizer.encode(text, add_special_tokens=False)
    tokens = [TokenLogprob(one, -1.0, ()) for one in [*ids[:3], 256, *ids[3:]]]  # <s> is not in the text
    maker, offsets = LegacyLogprobs(tokenizer, 0), []
    for start in range(0, len(tokens), pieces):
        offsets += maker.add(tokens[start : start + pieces])["text_offset"]
    expected = [index for index, character in enumerate(text) for _ in character.encode()]
    assert offsets == [*expected[:3], expected[3], *expected[3:]]


def test_zero_logprobs_give_the_sampled_tokens_alone(live: Live) -> None:
    answer = live.openai.completions.create(model="fake", prompt="x", max_tokens=2, logprobs=0)
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.top_logprobs == [{"T": -1.5}, {"h": -1.5}]


def test_a_token_that_is_part_of_a_character_is_spelled_in_bytes(live: Live) -> None:
    answer = live.openai.completions.create(model="fake", prompt="x", max_tokens=9, logprobs=0)
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.tokens is not None
    assert answer.choices[0].logprobs.tokens[7:9] == ["bytes:\\xc3", "bytes:\\xa9"]


def test_sampling_fields_reach_the_engine(live: Live) -> None:
    body = {
        "prompt": "x",
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": -1,
        "min_p": 0.1,
        "seed": 3,
        "presence_penalty": 1,
        "frequency_penalty": -1,
        "repetition_penalty": 1.1,
        "logit_bias": {"5": -100},
        "stop": "z",
        "stop_token_ids": [7],
        "ignore_eos": True,
        "min_tokens": 2,
        "max_tokens": 8,
    }
    assert live.http.post("/v1/completions", json=body).status_code == 200
    params = live.engine.submitted[-1].params
    assert (params.temperature, params.top_p, params.top_k, params.min_p, params.seed) == (0.5, 0.9, 0, 0.1, 3)
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (1, -1, 1.1)
    assert (params.logit_bias, params.stop, params.stop_token_ids) == ({5: -100}, ("z",), (7,))
    assert (params.ignore_eos, params.min_tokens, params.max_tokens) == (True, 2, 8)


def test_what_a_request_leaves_open_comes_from_the_checkpoint(live: Live) -> None:
    live.engine.default_sampling = {"temperature": 0.6, "top_k": 20}
    live.http.post("/v1/completions", json={"prompt": "x", "top_k": 5, "temperature": None})
    params = live.engine.submitted[-1].params
    assert (params.temperature, params.top_k, params.top_p) == (0.6, 5, 1.0)


def test_null_and_neutral_values_ask_for_nothing(live: Live) -> None:
    neutral = {
        "model": None,
        "best_of": 1,
        "suffix": "",
        "n": None,
        "logprobs": None,
        "stop": None,
        "stream": None,
        "stream_options": None,
        "logit_bias": None,
        "guided_json": None,
        "use_beam_search": False,
        "length_penalty": 1,
        "early_stopping": False,
        "response_format": {"type": "text"},
        "kv_policy": "full",
        "unknown": {"field": 1},
        "user": "me",
    }
    assert live.http.post("/v1/completions", json={"prompt": "x", **neutral}).status_code == 200


def test_a_default_number_of_tokens_gives_way_to_the_context_length(live: Live) -> None:
    answer = live.openai.completions.create(model="fake", prompt="a" * 250)
    assert answer.usage is not None
    assert answer.usage.total_tokens == live.engine.max_model_len
