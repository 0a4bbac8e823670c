"""Who is let into the queue, and what the others are told."""

from collections.abc import Callable
from typing import Any

import pytest

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.memory import MemoryPlan
from server.app import create_app
from server.config import ServerConfig
from tests.server.conftest import Live, wait_until
from tests.server.fakes import FakeEngine
from tests.server.refusals import check_error
from tests.server.scripted import staged
from tests.server.test_metrics import samples

PATHS = {
    "/v1/completions": "prompt",
    "/v1/chat/completions": "messages",
    "/v1/responses": "input",
    "/v1/embeddings": "input",
}
"""Each with the field that says what is asked."""
MESSAGES = [{"role": "user", "content": "Hi"}]


def ask(live: Live, prompt: object = "x", path: str = "/v1/completions", **body: Any) -> Any:
    question = {PATHS[path]: MESSAGES if PATHS[path] == "messages" else prompt}
    return live.http.post(path, json={**question, "max_tokens": 1, **body})


def rejected(live: Live, reason: str) -> float:
    page = samples(live.http.get("/metrics").content)
    return page["octavo:requests_rejected_total", frozenset({("reason", reason)})]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [False, True])
def test_a_full_queue_is_a_429_that_says_when_to_return(live: Live, path: str, stream: bool) -> None:
    live.engine.waiting, before = 1024, rejected(live, "queue")
    answer = ask(live, path=path, stream=stream)
    error = check_error(answer, 429)
    assert (error["code"], error["type"]) == ("queue_full", "rate_limit_error")
    assert answer.headers["retry-after"] == "1"
    assert rejected(live, "queue") == before + 1


def test_the_limit_counts_the_request_itself_by_its_prompts(start: Callable[..., Live]) -> None:
    live = start(FakeEngine(waiting=7), ServerConfig(port=0, max_queue=10))
    assert ask(live, ["a"] * 3).status_code == 200
    assert ask(live, "a", n=4).status_code == 200, "one prompt, whatever becomes of it"
    check_error(ask(live, ["a"] * 4), 429)
    live.engine.waiting = 10
    check_error(ask(live), 429)
    assert len(live.engine.submitted) == 4


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/embeddings"])
def test_more_prompts_than_ever_fit_are_a_400(start: Callable[..., Live], path: str) -> None:
    live = start(FakeEngine(), ServerConfig(port=0, max_queue=2))
    error = check_error(ask(live, ["a"] * 3, path), 400)
    assert error["param"] == PATHS[path]
    assert "more than the 2" in error["message"]
    assert not live.engine.submitted


@pytest.mark.parametrize(
    ("queued", "prompt", "status"),
    [
        (10, [1] * 10, 200),
        (10, [1] * 11, 429),
        (10, [[1] * 5] * 2, 200),
        (10, [[1] * 5] * 3, 429),
        (20, [1], 429),
        (0, [1] * 100, 200),
        (0, [[1] * 50] * 4, 200),
    ],
)
def test_the_queue_has_room_for_so_many_tokens_but_an_empty_one_takes_any_prompt(
    start: Callable[..., Live], queued: int, prompt: object, status: int
) -> None:
    live = start(FakeEngine(queued_tokens=queued), ServerConfig(port=0, max_queue_tokens=20))
    answer = ask(live, prompt)
    assert answer.status_code == status
    assert rejected(live, "queue_tokens") == (status == 429)
    assert ("retry-after" in answer.headers) == (status == 429)


@pytest.mark.parametrize(
    ("prompt", "generated", "least", "most"),
    [(100, 0, 5, 10), (10_000, 0, 1, 1), (1, 0, 60, 60), (0, 50, 60, 60)],
    ids=["a few seconds", "at once", "long", "nothing begins"],
)
def test_retry_after_is_the_time_that_the_queue_takes_at_the_present_pace(
    start: Callable[..., Live], prompt: int, generated: int, least: int, most: int
) -> None:
    live = start(FakeEngine(waiting=1024, queued_tokens=500))
    live.metrics.on_tokens(prompt=prompt, generated=generated)
    assert least <= int(ask(live).headers["retry-after"]) <= most


def test_an_echo_needs_no_place_in_the_queue(live: Live) -> None:
    live.engine.waiting = 1024
    assert ask(live, echo=True, max_tokens=0).json()["choices"][0]["text"] == "x"


def test_a_server_that_is_not_ready_counts_whom_it_sends_away(start: Callable[..., Live]) -> None:
    live = start(FakeEngine(ready=False))
    assert check_error(ask(live), 503)
    assert check_error(ask(live, echo=True, max_tokens=0), 503)
    assert rejected(live, "not_ready") == 2


def test_of_many_that_come_at_once_as_many_wait_as_may() -> None:
    with staged(ServerConfig(port=0, max_queue=3)) as stage:
        with stage.held():
            first = stage.send(prompt="a0")
            others = [stage.pool.submit(stage.post, prompt="b0") for _ in range(20)]
            assert wait_until(lambda: sum(answer.done() for answer in others) == 17)
            assert stage.size == 4
        assert first.result().status_code == 200
        assert sorted(answer.result().status_code for answer in others) == [200] * 3 + [429] * 17


def test_a_queue_too_short_to_fill_a_static_batch_is_refused_at_the_start() -> None:
    engine = FakeEngine(config=EngineConfig(batching="static", batch_size=4))
    create_app(engine, ServerConfig(max_queue=4))
    with pytest.raises(ConfigError, match="--max-queue 3: a static batch waits until --batch-size, 4, are queued"):
        create_app(engine, ServerConfig(max_queue=3))


def test_who_was_preempted_takes_no_place_in_the_queue() -> None:
    plan = MemoryPlan(num_blocks=8, num_host_blocks=0, max_model_len=128)
    with staged(ServerConfig(port=0, max_queue=1), plan=plan, max_num_seqs=4) as stage:
        stage.model.pace = 0.002
        first = stage.pool.submit(stage.post, prompt="a0", n=4, max_tokens=100)
        assert wait_until(lambda: stage.live.engine.stats().num_waiting > 1)
        assert stage.post(prompt="b0", timeout=0.001).json()["error"]["code"] == "queue_timeout", "it waits"
        assert first.result().status_code == 200


def test_a_flood_of_tokens_is_stopped_and_passes_when_there_is_room() -> None:
    with staged(ServerConfig(port=0, max_queue_tokens=100)) as stage:
        with stage.held():
            answers = [stage.send(prompt="a0"), stage.send(prompt="b" * 200), stage.send(prompt="c0")]
        assert [answer.result().status_code for answer in answers] == [200, 200, 429]
        assert stage.post(prompt="c0").status_code == 200
