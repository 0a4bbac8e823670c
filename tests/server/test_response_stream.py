"""The events of /v1/responses: in order, numbered, and together the whole answer."""

import json
from typing import Any, Literal

import pytest
from openai.types.responses import ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

from engine.errors import InvalidRequestError, RequestTimeoutError
from tests.server.conftest import Live
from tests.server.fakes import SENTENCE
from tests.server.obedient import obedient
from tests.server.refusals import check_error
from tests.server.scripted import staged
from tests.server.test_responses import CLOCK, WEATHER
from tests.server.test_tools import CALL

PATH = "/v1/responses"
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


def events_of(live: Live, **fields: Any) -> list[dict[str, Any]]:
    """All events, each checked against what its type says and numbered one after the other."""
    answer = live.http.post(PATH, json={"input": "Hi", **fields, "stream": True})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.text.endswith("\n\n")
    events = []
    for block in answer.text.removesuffix("\n\n").split("\n\n"):
        kind, data = block.split("\n")
        EVENT.validate_json(data.removeprefix("data: "), strict=True)
        events.append(json.loads(data.removeprefix("data: ")))
        assert kind == f"event: {events[-1]['type']}"
    assert [event["sequence_number"] for event in events] == [*range(len(events))]
    return events


def without_ids(response: dict[str, Any]) -> dict[str, Any]:
    """What two answers to the same request have in common."""
    items = [{k: v for k, v in item.items() if k not in ("id", "call_id")} for item in response["output"]]
    return {**response, "id": None, "created_at": None, "completed_at": None, "output": items}


def test_the_events_of_a_text_come_in_their_order(live: Live) -> None:
    events = events_of(live, max_output_tokens=3)
    assert [event["type"].removeprefix("response.") for event in events] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        *["output_text.delta"] * 3,
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "incomplete",
    ]
    item = events[2]["item"]
    assert (item["status"], item["content"]) == ("in_progress", [])
    assert {event["item_id"] for event in events[3:9]} == {item["id"]}
    assert {event["output_index"] for event in events[2:10]} == {0}
    assert "".join(event["delta"] for event in events[4:7]) == events[7]["text"] == events[8]["part"]["text"] == "The"
    assert events[0]["response"]["status"] == events[1]["response"]["status"] == "in_progress"
    assert events[0]["response"]["output"] == []
    assert events[0]["response"]["usage"] is None
    assert events[-1]["response"]["output"] == [events[9]["item"]]
    assert {event["response"]["id"] for event in events if "response" in event} == {events[0]["response"]["id"]}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"max_output_tokens": 5, "top_logprobs": 2},
        {"tools": [WEATHER, CLOCK], "top_logprobs": 1},
        {"tools": [WEATHER], "tool_choice": "none"},
        {"tools": [WEATHER, CLOCK], "max_output_tokens": 60},
        {"stop": "I"},
        {"kv_policy": "streaming", "instructions": "Be kind.", "metadata": {"a": "b"}},
    ],
    ids=str,
)
@pytest.mark.parametrize("words", [f"I ask. {CALL}\n{CALL} So.", SENTENCE, CALL])
def test_the_last_event_holds_what_is_given_whole_and_the_others_add_up_to_it(
    wide: Live, fields: dict[str, Any], words: str
) -> None:
    wide.engine.words = words
    whole = wide.http.post(PATH, json={"input": "Hi", **fields}).json()
    events = events_of(wide, **fields)
    last = events[-1]["response"]
    assert events[-1]["type"] == f"response.{last['status']}"
    assert without_ids(last) == without_ids(whole)
    for index, item in enumerate(last["output"]):
        own = [event for event in events if event.get("output_index") == index]
        assert own[0]["type"] == "response.output_item.added"
        assert own[-1] == {**own[-1], "type": "response.output_item.done", "item": item}
        deltas = "".join(event.get("delta", "") for event in own)
        logprobs = [one for event in own if event["type"].endswith("text.delta") for one in event["logprobs"]]
        if item["type"] == "message":
            assert deltas == item["content"][0]["text"]
            assert logprobs == item["content"][0]["logprobs"][: len(logprobs)]
        else:
            assert deltas == item["arguments"]


def test_the_official_clients_stream_ends_with_the_whole_response(live: Live) -> None:
    with live.openai.responses.stream(model="fake", input="Hi", max_output_tokens=99) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        final = stream.get_final_response()
    assert final.status == "completed"
    assert final.output_text == text
    assert text.startswith("The café's 😀 answer")
    assert final.usage is not None
    assert final.usage.output_tokens > 20


def test_the_official_clients_stream_follows_calls(wide: Live) -> None:
    wide.engine.words = f"I ask. {CALL}\n{CALL}"
    with wide.openai.responses.stream(model="fake", input="Hi", tools=[{**WEATHER, "strict": True}]) as stream:
        arguments = [e.snapshot for e in stream if e.type == "response.function_call_arguments.delta"]
        final = stream.get_final_response()
    assert json.loads(arguments[-1]) == {"city": "Paris"}
    assert [item.type for item in final.output] == ["message", "function_call", "function_call"]


class City(BaseModel):
    city: Literal["Paris"]


def test_the_official_clients_stream_parses_what_has_a_form() -> None:
    with (
        staged(script=obedient) as stage,
        stage.live.openai.responses.stream(model="fake", input="Hi", text_format=City) as stream,
    ):
        stream.until_done()
        assert stream.get_final_response().output_parsed == City(city="Paris")


def test_a_plain_stream_of_the_official_client_is_a_series_of_events(live: Live) -> None:
    kinds = [event.type for event in live.openai.responses.create(model="fake", input="Hi", stream=True)]
    assert kinds[0] == "response.created"
    assert kinds[-1] == "response.completed"


@pytest.mark.parametrize(
    ("failure", "code", "message"),
    [
        (None, "server_error", "The request failed in the engine."),
        (RequestTimeoutError("the time limit was up", queued=False), "server_error", "the time limit was up"),
        (InvalidRequestError("the form is too complex"), "invalid_prompt", "the form is too complex"),
    ],
)
def test_a_failure_in_mid_stream_is_its_last_event(
    live: Live, failure: Exception | None, code: str, message: str
) -> None:
    original = live.engine.failure
    live.engine.fail_after = 5
    live.engine.failure = failure or original
    try:
        events = events_of(live)
    finally:
        live.engine.failure = original
    last = events[-1]["response"]
    assert (events[-1]["type"], last["status"]) == ("response.failed", "failed")
    assert (last["error"]["code"], last["error"]["message"]) == (code, message)
    (item,) = last["output"]
    assert (item["status"], item["content"][0]["text"]) == ("incomplete", "The c")
    assert "/home" not in json.dumps(events)


def test_a_failure_before_the_first_event_has_its_own_status(live: Live) -> None:
    live.engine.fail_after = 0
    check_error(live.http.post(PATH, json={"input": "Hi", "stream": True}), 500)
