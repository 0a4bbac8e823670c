"""Streams: the same answers, piece by piece."""

import json
import threading
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import openai
import pytest

from tests.server.conftest import Live
from tests.server.fakes import FakeEngine

MESSAGES = [{"role": "user", "content": "Hi"}]
BODIES = {
    "/v1/completions": {"prompt": ["one", "two", "three"], "n": 2, "max_tokens": 60, "echo": True},
    "/v1/chat/completions": {"messages": MESSAGES, "n": 3},
}


def events(live: Live, path: str, body: dict[str, Any]) -> list[Any]:
    """Every event's data, parsed; the last must be [DONE]."""
    answer = live.http.post(path, json={**body, "stream": True})
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.text.endswith("\n\n")
    lines = answer.text.removesuffix("\n\n").split("\n\n")
    assert all(line.startswith("data: ") and "\n" not in line for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def piece(choice: dict[str, Any]) -> str:
    """The new text in a chunk."""
    return str(choice["text"] if "text" in choice else choice["delta"].get("content", ""))


def whole(choice: dict[str, Any]) -> str:
    """The text of a whole answer."""
    return str(choice["text"] if "text" in choice else choice["message"]["content"])


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("stop", [None, "answer", ["is 5", "9"]])
def test_a_stream_equals_the_whole_answer(live: Live, path: str, stop: object) -> None:
    body = {**BODIES[path], "stop": stop}
    answer = live.http.post(path, json=body).json()
    texts: dict[int, str] = defaultdict(str)
    reasons: dict[int, list[str]] = defaultdict(list)
    for chunk in events(live, path, body):
        (choice,) = chunk["choices"]
        assert not reasons[choice["index"]], "nothing follows a finish_reason"
        texts[choice["index"]] += piece(choice)
        if choice["finish_reason"] is not None:
            reasons[choice["index"]].append(choice["finish_reason"])
    expected = sorted(answer["choices"], key=lambda choice: choice["index"])
    assert [texts[index] for index in sorted(texts)] == [whole(choice) for choice in expected]
    assert [reasons[index] for index in sorted(reasons)] == [[choice["finish_reason"]] for choice in expected]


@pytest.mark.parametrize("path", BODIES)
def test_id_created_and_model_stay_the_same(live: Live, path: str) -> None:
    chunks = events(live, path, BODIES[path])
    assert len({(chunk["id"], chunk["created"], chunk["model"], chunk["object"]) for chunk in chunks}) == 1


@pytest.mark.parametrize("path", BODIES)
def test_usage_comes_last_and_only_when_asked_for(live: Live, path: str) -> None:
    assert all("usage" not in chunk for chunk in events(live, path, BODIES[path]))
    body = {**BODIES[path], "stream_options": {"include_usage": True}}
    *chunks, last = events(live, path, body)
    assert all(chunk["usage"] is None and chunk["choices"] for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"] == live.http.post(path, json=BODIES[path]).json()["usage"]


def test_the_first_delta_of_each_choice_has_the_role_and_no_other_has(live: Live) -> None:
    seen = set()
    for chunk in events(live, "/v1/chat/completions", BODIES["/v1/chat/completions"]):
        (choice,) = chunk["choices"]
        assert ("role" in choice["delta"]) == (choice["index"] not in seen)
        seen.add(choice["index"])
    assert seen == {0, 1, 2}


def test_no_piece_ends_within_a_character(live: Live) -> None:
    for chunk in events(live, "/v1/chat/completions", {"messages": MESSAGES}):
        assert "\ufffd" not in piece(chunk["choices"][0])


def test_streams_of_several_prompts_advance_together(live: Live) -> None:
    body = {"prompt": ["a", "b", "c", "d"], "max_tokens": 30, "stream": True}
    count: dict[int, int] = defaultdict(int)
    for chunk in events(live, "/v1/completions", body):
        count[chunk["choices"][0]["index"]] += 1
        assert max(count.values()) - min(count[index] for index in range(4)) <= 4


@pytest.mark.parametrize("count", [0, 2])
def test_streamed_logprobs_equal_the_whole_ones(live: Live, count: int) -> None:
    body = {"prompt": "x", "max_tokens": 12, "logprobs": count}
    joined: dict[str, list[Any]] = defaultdict(list)
    for chunk in events(live, "/v1/completions", body):
        for name, values in chunk["choices"][0]["logprobs"].items():
            joined[name] += values
    assert joined == live.http.post("/v1/completions", json=body).json()["choices"][0]["logprobs"]
    chat = {"messages": MESSAGES, "logprobs": True, "top_logprobs": count}
    content = [
        token
        for chunk in events(live, "/v1/chat/completions", chat)
        if chunk["choices"][0]["logprobs"]
        for token in chunk["choices"][0]["logprobs"]["content"]
    ]
    answer = live.http.post("/v1/chat/completions", json=chat).json()
    assert content == answer["choices"][0]["logprobs"]["content"]


def test_the_official_client_reads_both_kinds(live: Live) -> None:
    completion = live.openai.completions.create(model="fake", prompt="x", max_tokens=99, stream=True)
    assert "".join(chunk.choices[0].text for chunk in completion).startswith("The café's 😀")
    chat = live.openai.chat.completions.create(model="fake", messages=MESSAGES, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chat).startswith("The café's 😀")


@pytest.mark.parametrize("path", BODIES)
def test_a_failure_in_mid_stream_is_the_streams_last_event(live: Live, path: str) -> None:
    live.engine.fail_after = 3
    text = live.http.post(path, json={**BODIES[path], "stream": True}).text
    last = json.loads(text.removesuffix("\n\n").split("\n\n")[-1].removeprefix("data: "))
    assert last == {
        "error": {
            "message": "The request failed in the engine.",
            "type": "server_error",
            "param": None,
            "code": "engine_error",
        }
    }
    assert "[DONE]" not in text
    assert "/home" not in text


@pytest.mark.parametrize("path", BODIES)
def test_a_failure_of_a_whole_answer_is_a_500_without_details(live: Live, path: str) -> None:
    live.engine.fail_after = 3
    answer = live.http.post(path, json=BODIES[path])
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "engine_error"
    assert "/home" not in answer.text


@pytest.mark.parametrize("path", BODIES)
def test_a_failure_before_anything_was_sent_has_its_status(live: Live, path: str) -> None:
    live.engine.fail_after = 0
    answer = live.http.post(path, json={**BODIES[path], "echo": False, "stream": True})
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "engine_error"


def test_a_failure_in_mid_stream_reaches_the_official_client(live: Live) -> None:
    live.engine.fail_after = 3
    with pytest.raises(openai.APIError, match="failed in the engine"):
        list(live.openai.completions.create(model="fake", prompt="x", stream=True))


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_stops_does_not_make_an_answer_look_complete(
    start: Callable[..., Live], path: str, stream: bool
) -> None:
    live = start(FakeEngine(pace=0.02))
    stop = threading.Timer(0.2, lambda: [one.abort() for one in list(live.engine.open)])
    stop.start()
    answer = live.http.post(path, json={**BODIES[path], "stream": stream, "ignore_eos": True, "max_tokens": 100})
    stop.join()
    assert answer.status_code == (200 if stream else 503)
    last = answer.text.removesuffix("\n\n").split("\n\n")[-1].removeprefix("data: ")
    assert json.loads(last)["error"]["code"] == "aborted"
    assert "[DONE]" not in answer.text
