"""Text of a demanded form, on both endpoints: a real engine, and a model that says as little as it may."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from server.config import ServerConfig
from tests.server.conftest import Live
from tests.server.obedient import obedient
from tests.server.scripted import Stage, staged

HI = {"messages": [{"role": "user", "content": "Hi"}]}
PERSON = {
    "type": "object",
    "properties": {"name": {"enum": ["Ada"]}, "born": {"type": "integer", "minimum": 3, "maximum": 9}},
    "required": ["name", "born"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with staged(ServerConfig(port=0), script=obedient, max_num_seqs=4) as stage:
        yield stage


DEMANDS: list[tuple[dict[str, Any], str]] = [
    ({"response_format": {"type": "json_object"}}, "{}"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "p", "schema": PERSON, "strict": True}}},
        '{"name":"Ada","born":3}',
    ),
    ({"guided_json": PERSON}, '{"name":"Ada","born":3}'),
    ({"guided_json": json.dumps(PERSON)}, '{"name":"Ada","born":3}'),
    ({"guided_regex": "[x-z]{2}-?!"}, "xx!"),
    ({"guided_choice": ['no "quotes"', "yes"]}, 'no "quotes"'),
    ({"guided_grammar": 'start: "a" b\nb: "c" | "d"'}, "ac"),
    ({"structured_outputs": {"json": PERSON}}, '{"name":"Ada","born":3}'),
    ({"structured_outputs": {"regex": "x{3}"}}, "xxx"),
    ({"structured_outputs": {"choice": ["maybe"]}}, "maybe"),
    ({"structured_outputs": {"grammar": 'start: "z"'}}, "z"),
    ({"structured_outputs": {"json_object": True}}, "{}"),
]


@pytest.mark.parametrize(("demand", "text"), DEMANDS, ids=[str(demand)[:50] for demand, _ in DEMANDS])
def test_a_demand_is_met_on_both_endpoints(stage: Stage, demand: dict[str, Any], text: str) -> None:
    http = stage.live.http
    (choice,) = http.post("/v1/completions", json={"prompt": "x", "max_tokens": 60, **demand}).json()["choices"]
    assert (choice["text"], choice["finish_reason"]) == (text, "stop")
    (choice,) = http.post("/v1/chat/completions", json={**HI, **demand}).json()["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == (text, "stop")


def test_it_is_streamed_like_any_text(stage: Stage) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
    chunks = list(
        stage.live.openai.chat.completions.create(
            model="fake", messages=[{"role": "user", "content": "Hi"}], response_format=form, stream=True, n=2
        )
    )
    for index in (0, 1):
        own = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
        assert "".join(one.delta.content or "" for one in own) == '{"name":"Ada","born":3}'
        assert [one.finish_reason for one in own if one.finish_reason] == ["stop"]


def test_what_cannot_be_enforced_is_let_pass_unless_the_schema_is_strict(stage: Stage) -> None:
    schema = {"type": "object", "properties": {}, "not": {"required": ["a"]}, "additionalProperties": False}
    for strict, status in ((None, 200), (False, 200), (True, 400)):
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": strict}}
        answer = stage.live.http.post("/v1/chat/completions", json={**HI, "response_format": form})
        assert answer.status_code == status
    assert "Unimplemented keys" in answer.json()["error"]["message"]


def test_a_clients_own_options_for_the_library_are_dropped(stage: Stage) -> None:
    """Their patterns would have no limits: one of 100 kB takes the compiler minutes."""
    body = {"prompt": "x", "guided_json": {**PERSON, "x-guidance": {"key_separator": "=", "lenient": True}}}
    (choice,) = stage.live.http.post("/v1/completions", json=body).json()["choices"]
    assert choice["text"] == '{"name":"Ada","born":3}'[: len(choice["text"])]
    assert "=" not in choice["text"]


def test_a_text_that_is_cut_off_says_so(stage: Stage) -> None:
    body = {"prompt": "x", "max_tokens": 5, "guided_json": PERSON}
    (choice,) = stage.live.http.post("/v1/completions", json=body).json()["choices"]
    assert (choice["text"], choice["finish_reason"]) == ('{"nam', "length")


def test_a_search_does_not_take_a_demand(stage: Stage) -> None:
    body = {"prompt": "x", "use_beam_search": True, "n": 2, "guided_regex": "a"}
    error = stage.live.http.post("/v1/completions", json=body).json()["error"]
    assert error["param"] == "use_beam_search"


def test_a_bad_schema_is_a_400_with_its_field_and_the_reason(live: Live) -> None:
    body = {"prompt": "x", "guided_json": {"type": "objekt"}}
    error = live.http.post("/v1/completions", json=body).json()["error"]
    assert error["message"] == "guided_json: the output cannot be constrained: Invalid type: objekt"
    assert error["param"] == "guided_json"


def test_a_stream_with_a_bad_schema_has_the_status_of_its_error(live: Live) -> None:
    body = {"prompt": "x", "guided_json": {"type": "objekt"}, "stream": True}
    assert live.http.post("/v1/completions", json=body).status_code == 400
