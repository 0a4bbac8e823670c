"""A request's time is up: what its client is told, and that nothing of it stays behind."""

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest

from engine.errors import RequestTimeoutError
from tests.server.conftest import Live
from tests.server.fakes import FakeEngine
from tests.server.refusals import check_error
from tests.server.scripted import Stage, staged
from tests.server.test_metrics import samples

BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "x", "max_tokens": 400, "ignore_eos": True},
    "/v1/chat/completions": {
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 400,
        "ignore_eos": True,
    },
}
TIME = 0.2
"""Seconds: enough to begin on a busy machine, too little for 400 tokens at 2 ms."""
both = pytest.mark.parametrize("path", BODIES)


@pytest.fixture(scope="module")
def shared_stage() -> Iterator[Stage]:
    with staged() as stage:
        yield stage


@pytest.fixture
def stage(shared_stage: Stage) -> Iterator[Stage]:
    """A server with a place for one request; afterwards it must be idle."""
    shared_stage.model.pace = 0.0
    yield shared_stage
    assert shared_stage.drained()


def last_event(text: str) -> Any:
    assert text.endswith("\n\n")
    assert "[DONE]" not in text
    return json.loads(text.removesuffix("\n\n").split("\n\n")[-1].removeprefix("data: "))


def timeouts(stage: Stage) -> float:
    page = samples(stage.live.http.get("/metrics").content)
    return page["octavo:request_success_total", frozenset({("finished_reason", "timeout")})]


@both
def test_a_timeout_is_passed_on_less_what_was_spent(live: Live, path: str) -> None:
    assert live.http.post(path, json={**BODIES[path], "max_tokens": 1, "timeout": 30}).status_code == 200
    assert 29 < live.engine.submitted[-1].order["timeout"] < 30
    assert live.http.post(path, json={**BODIES[path], "max_tokens": 1}).status_code == 200
    assert live.engine.submitted[-1].order["timeout"] is None


@both
def test_an_answer_that_takes_too_long_is_a_408(stage: Stage, path: str) -> None:
    stage.model.pace, before = 0.002, timeouts(stage)
    error = check_error(stage.live.http.post(path, json={**BODIES[path], "timeout": TIME}), 408)
    assert (error["code"], error["type"]) == ("request_timeout", "timeout_error")
    assert stage.drained()
    assert timeouts(stage) == before + 1


@both
def test_a_deadline_in_mid_stream_is_the_streams_last_event(stage: Stage, path: str) -> None:
    stage.model.pace = 0.002
    answer = stage.live.http.post(path, json={**BODIES[path], "timeout": TIME, "stream": True})
    assert answer.status_code == 200
    assert answer.text.count("A") > 1, "what was ready came"
    assert last_event(answer.text)["error"] == {
        "message": "the time limit was up",
        "type": "timeout_error",
        "param": None,
        "code": "request_timeout",
    }


@both
@pytest.mark.parametrize("stream", [False, True])
def test_a_deadline_in_the_queue_is_a_503_that_says_when_to_return(stage: Stage, path: str, stream: bool) -> None:
    with stage.held():
        first = stage.send(prompt="a0")
        late = stage.pool.submit(stage.live.http.post, path, json={**BODIES[path], "timeout": 0.02, "stream": stream})
        assert stage.filled(2)
        time.sleep(0.02)
    error = check_error(late.result(), 503)
    assert (error["code"], error["type"]) == ("queue_timeout", "service_unavailable_error")
    assert 1 <= int(late.result().headers["retry-after"]) <= 60
    assert first.result().status_code == 200


def test_a_stream_that_has_begun_with_an_echo_ends_with_the_error(stage: Stage) -> None:
    with stage.held():
        stage.send(prompt="a0")
        late = stage.send(prompt="late", echo=True, stream=True, timeout=0.02)
        time.sleep(0.02)
    answer = late.result()
    assert answer.status_code == 200
    assert "late" in answer.text
    assert last_event(answer.text)["error"]["code"] == "queue_timeout"


@pytest.mark.parametrize("stream", [False, True])
def test_one_prompt_that_is_late_takes_its_siblings_with_it(stage: Stage, stream: bool) -> None:
    stage.model.pace = 0.002
    answer = stage.post(prompt=["a0", "a1", "a2"], max_tokens=20, timeout=0.06, stream=stream)
    error = last_event(answer.text)["error"] if stream else check_error(answer, answer.status_code)
    assert error["code"] in ("request_timeout", "queue_timeout")
    assert stage.drained()


def test_no_time_at_all_is_too_little(stage: Stage) -> None:
    assert check_error(stage.post(prompt="a0", timeout=1e-300), 503)["code"] == "queue_timeout"


def test_time_enough_changes_nothing(stage: Stage) -> None:
    plain, timed = stage.post(prompt="a0", max_tokens=5), stage.post(prompt="a0", max_tokens=5, timeout=86400)
    assert plain.json()["choices"] == timed.json()["choices"]
    assert timed.json()["choices"][0]["text"] == "AAAAA"


def test_who_waits_for_longer_than_the_server_allows_gets_the_same_503() -> None:
    with staged(queue_timeout=0.02) as stage:
        with stage.held():
            stage.send(prompt="a0")
            late = stage.send(prompt="b0")
            time.sleep(0.02)
        assert check_error(late.result(), 503)["code"] == "queue_timeout"


def test_deadlines_at_every_moment_leave_nothing_behind() -> None:
    with staged(max_num_seqs=4) as stage:
        stage.model.pace = 0.001
        answers = [
            stage.pool.submit(
                stage.post,
                prompt=["a0", "b0"],
                n=1 + number % 3,
                max_tokens=20,
                stream=number % 2 == 0,
                timeout=0.01 * (1 + number),
            )
            for number in range(24)
        ]
        assert {answer.result().status_code for answer in answers} <= {200, 408, 503}
        assert stage.drained()
        assert stage.post(prompt="a0").status_code == 200


def test_the_official_client_does_not_repeat_what_was_too_slow(start: Callable[..., Live]) -> None:
    live = start(FakeEngine(fail_after=0, failure=RequestTimeoutError("the time limit was up", queued=False)))
    with pytest.raises(openai.APIStatusError, match="the time limit was up") as caught:
        live.openai.with_options(max_retries=2).completions.create(model="fake", prompt="x")
    assert caught.value.status_code == 408
    assert len(live.engine.submitted) == 1
