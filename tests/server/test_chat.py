"""POST /v1/chat/completions, as the official client sees it."""

from collections.abc import Callable

import pytest

from tests.server.conftest import Live
from tests.server.fakes import TEMPLATE, FakeEngine, byte_tokenizer


def prompt_of(live: Live) -> str:
    """What the model saw last."""
    return live.engine.tokenizer.decode(live.engine.submitted[-1].prompt, skip_special_tokens=False)


def test_a_message_is_answered(live: Live) -> None:
    answer = live.openai.chat.completions.create(model="fake", messages=[{"role": "user", "content": "Hi"}])
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    assert choice.message.content is not None
    assert choice.message.content.startswith("The café's 😀 answer")
    assert choice.finish_reason == "stop"


def test_the_template_alone_writes_the_special_tokens(live: Live) -> None:
    live.openai.chat.completions.create(
        model="fake",
        messages=[
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello!"},
            {"role": "user", "content": [{"type": "text", "text": "A"}, {"type": "text", "text": "B"}]},
        ],
    )
    assert prompt_of(live) == "<s><|system|>Be kind.\n<|user|>Hi\n<|assistant|>Hello!\n<|user|>A\nB\n<|assistant|>"


def test_a_developers_message_is_a_system_message(live: Live) -> None:
    live.openai.chat.completions.create(model="fake", messages=[{"role": "developer", "content": "x"}])
    assert prompt_of(live) == "<s><|system|>x\n<|assistant|>"


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_either_name_limits_the_tokens(live: Live, name: str) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}], name: 3}
    answer = live.http.post("/v1/chat/completions", json=body).json()
    assert answer["choices"][0]["message"]["content"] == "The"
    assert answer["choices"][0]["finish_reason"] == "length"


def test_without_a_limit_the_context_is_the_limit(live: Live) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}], "ignore_eos": True}
    usage = live.http.post("/v1/chat/completions", json=body).json()["usage"]
    assert usage["total_tokens"] == live.engine.max_model_len


def test_logprobs_are_a_list_of_objects(live: Live) -> None:
    answer = live.openai.chat.completions.create(
        model="fake",
        messages=[{"role": "user", "content": "Hi"}],
        logprobs=True,
        top_logprobs=3,
        max_tokens=1,
    )
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.content is not None
    (token,) = answer.choices[0].logprobs.content
    assert (token.token, token.logprob, token.bytes) == ("T", -1.5, [84])
    # Minus infinity is no JSON.
    assert [top.logprob for top in token.top_logprobs] == [-0.5, -1.5, -9999.0]


def test_logprobs_work_without_alternatives(live: Live) -> None:
    answer = live.openai.chat.completions.create(
        model="fake", messages=[{"role": "user", "content": "Hi"}], logprobs=True, max_tokens=1
    )
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.content is not None
    assert answer.choices[0].logprobs.content[0].top_logprobs == []


def test_several_answers_differ_and_are_numbered(live: Live) -> None:
    answer = live.openai.chat.completions.create(model="fake", messages=[{"role": "user", "content": "Hi"}], n=3)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in answer.choices}) == 3


def test_a_clients_own_answer_can_be_sent_back_as_it_came(live: Live) -> None:
    first = live.openai.chat.completions.create(model="fake", messages=[{"role": "user", "content": "Hi"}])
    messages = [{"role": "user", "content": "Hi"}, first.choices[0].message.model_dump()]
    body = {"messages": [*messages, {"role": "user", "content": "And?"}]}
    assert live.http.post("/v1/chat/completions", json=body).status_code == 200


def test_a_model_without_a_template_does_not_chat(start: Callable[..., Live]) -> None:
    live = start(FakeEngine(tokenizer=byte_tokenizer(chat_template=None)))
    answer = live.http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "Hi"}]})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "no_chat_template"
    assert live.http.post("/v1/completions", json={"prompt": "Hi"}).status_code == 200


def test_a_broken_template_of_a_checkpoint_leaves_completions_working(start: Callable[..., Live]) -> None:
    live = start(FakeEngine(tokenizer=byte_tokenizer(chat_template="{% if %}")))
    assert live.http.post("/v1/completions", json={"prompt": "Hi"}).status_code == 200


def test_the_tokenizer_tells_its_special_tokens_and_template(live: Live) -> None:
    info = live.http.get("/tokenizer_info").json()
    assert info == {"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE}


def test_tokenize_and_detokenize_are_inverse(live: Live) -> None:
    tokens = live.http.post("/tokenize", json={"prompt": "Grüße"}).json()
    assert tokens["count"] == len(tokens["tokens"]) == 8
    text = live.http.post("/detokenize", json={"tokens": tokens["tokens"]}).json()
    assert text == {"prompt": "<s>Grüße"}


def test_a_conversation_can_be_tokenized(live: Live) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}]}
    ids = live.http.post("/tokenize", json=body).json()["tokens"]
    assert live.engine.tokenizer.decode(ids, skip_special_tokens=False) == "<s><|user|>Hi\n<|assistant|>"


@pytest.mark.parametrize("count", [1, 200])
def test_a_variable_of_the_template_may_have_any_name(live: Live, count: int) -> None:
    body = {"messages": [{"role": "user", "content": "x"}] * count, "max_tokens": 1}
    variables = {"self": 1, "context": 2, "not a name": 3}
    answer = live.http.post("/v1/chat/completions", json={**body, "chat_template_kwargs": variables})
    assert answer.status_code == (200 if count == 1 else 400)  # 200 messages are too long, and nothing else


def test_messages_in_any_number_are_rendered_alike(start: Callable[..., Live]) -> None:
    live = start(FakeEngine(max_model_len=100_000))
    for count in (1, 100):
        messages = [{"role": "user", "content": "x"}] * count
        answer = live.http.post("/tokenize", json={"messages": messages}).json()
        text = live.http.post("/detokenize", json={"tokens": answer["tokens"]}).json()["prompt"]
        assert text == "<s>" + "<|user|>x\n" * count + "<|assistant|>"
    long = {"messages": [{"role": "user", "content": "x" * 90_000}]}
    assert live.http.post("/tokenize", json=long).json()["count"] > 90_000
