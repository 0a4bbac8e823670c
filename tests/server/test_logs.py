"""What the log says of requests, and how its lines look."""

import io
import json
import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from server import logs
from server.config import ServerConfig
from tests.server.conftest import Live, running, wait_until
from tests.server.fakes import SENTENCE, FakeEngine
from tests.server.scripted import staged

LOGGING = ServerConfig(port=0, log_requests=True)


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with running(FakeEngine(), LOGGING) as live:
        yield live


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> Callable[[], dict[str, Any]]:
    """The fields of the one request that was logged, as soon as it is."""
    caplog.set_level(logging.INFO, "octavo.requests")

    def fields() -> dict[str, Any]:
        def found() -> list[logging.LogRecord]:
            return [record for record in caplog.records if record.name == "octavo.requests"]

        assert wait_until(lambda: len(found()) > 0)
        (record,) = found()
        return dict(record.fields)

    return fields


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_one_line(server: Live, logged: Callable[[], dict[str, Any]], stream: bool) -> None:
    body = {"prompt": "a secret of forty characters, or even more", "max_tokens": 5, "stream": stream}
    answer = server.http.post("/v1/completions", json=body, headers={"x-request-id": "mine"})
    fields = logged()
    times = [fields.pop(name) for name in ("queue_seconds", "ttft_seconds", "latency_seconds")]
    assert 0 < times[1] <= times[2] < 5
    response_id = fields.pop("response_id")
    assert response_id in answer.text
    assert fields == {
        "request_id": "mine",
        "endpoint": "POST /v1/completions",
        "model": "fake",
        "status": 200,
        "prompt_tokens": 43,
        "cached_tokens": 32,
        "generated_tokens": 5,
        "finish_reason": "length",
        "kv_policy": "full",
    }


def test_times_are_those_of_the_engine(logged: Callable[[], dict[str, Any]]) -> None:
    with staged(LOGGING) as stage:
        stage.model.pace = 0.02
        stage.post(prompt="ab", max_tokens=4)
        fields = logged()
    assert 0 < fields["queue_seconds"] < 0.02 <= fields["ttft_seconds"] < fields["ttft_seconds"] + 0.06
    assert fields["ttft_seconds"] + 0.06 <= fields["latency_seconds"]


def test_neither_prompts_nor_answers_are_logged_unasked(server: Live, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "octavo"):
        server.http.post("/v1/completions", json={"prompt": "a secret", "max_tokens": 30})
        server.http.post("/v1/completions", json={"prompt": ["a secret", "b"], "n": 2, "temperature": "x"})
        server.http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "a secret"}]})
        assert wait_until(lambda: len(caplog.records) == 3)
    everything = "\n".join(logs.JsonFormatter().format(record) for record in caplog.records)
    assert "secret" not in everything
    assert SENTENCE[:6] not in everything


@pytest.mark.parametrize("stream", [False, True])
def test_content_is_logged_on_request_and_cut(
    start: Callable[..., Live], logged: Callable[[], dict[str, Any]], stream: bool
) -> None:
    live = start(FakeEngine(), ServerConfig(port=0, log_request_content=8))
    body = {"prompt": ["abc", "defgh", "ijk"], "max_tokens": 3, "stream": stream}
    live.http.post("/v1/completions", json=body)
    fields = logged()
    assert fields["prompts"] == ["<s>abc", "<s"], "eight characters altogether"
    assert "".join(fields["answers"]) == "TheTheTh"


def test_all_ways_to_finish_are_named(server: Live, logged: Callable[[], dict[str, Any]]) -> None:
    body = {"prompt": ["a", "b"], "max_tokens": 40, "stop": "198", "temperature": 0}
    reasons = [one["finish_reason"] for one in server.http.post("/v1/completions", json=body).json()["choices"]]
    assert logged()["finish_reason"] == ",".join(dict.fromkeys(reasons))


@pytest.mark.parametrize(
    ("path", "body", "status", "error"),
    [
        ("/v1/completions", {"prompt": "x", "n": True}, 400, "invalid_request_error"),
        ("/v1/completions", {"prompt": "x" * 999}, 400, "context_length_exceeded"),
        ("/v1/completions", {"prompt": "x", "model": "?"}, 404, "model_not_found"),
        ("/no/such/" + "x" * 999, {}, 404, "unknown_url"),
    ],
)
def test_a_refusal_is_logged_with_its_code(
    server: Live, logged: Callable[[], dict[str, Any]], path: str, body: dict[str, Any], status: int, error: str
) -> None:
    server.http.post(path, json=body)
    fields = logged()
    assert (fields["status"], fields["error"]) == (status, error)
    assert fields["endpoint"] == f"POST {path}"[: len("POST ") + 200]
    assert "finish_reason" not in fields


def test_a_stream_that_fails_has_an_error_beside_its_200(
    start: Callable[..., Live], logged: Callable[[], dict[str, Any]]
) -> None:
    live = start(FakeEngine(fail_after=3), LOGGING)
    live.http.post("/v1/completions", json={"prompt": "x", "stream": True})
    fields = logged()
    assert (fields["status"], fields["error"], fields["generated_tokens"]) == (200, "engine_error", 3)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_is_an_error_of_its_own(
    start: Callable[..., Live], logged: Callable[[], dict[str, Any]], stream: bool
) -> None:
    live = start(FakeEngine(pace=0.01), LOGGING)
    body = {"prompt": "x", "stream": stream, "max_tokens": 200, "ignore_eos": True}
    if stream:
        with live.http.stream("POST", "/v1/completions", json=body) as answer:
            next(answer.iter_raw())
    else:
        with pytest.raises(httpx.ReadTimeout):
            live.http.post("/v1/completions", json=body, timeout=0.1)
    fields = logged()
    assert fields["error"] == "client_left"
    assert 0 < fields["generated_tokens"] < 200


def test_probes_are_logged_only_when_they_fail(start: Callable[..., Live], caplog: pytest.LogCaptureFixture) -> None:
    live = start(FakeEngine(), LOGGING)
    with caplog.at_level(logging.INFO, "octavo.requests"):
        for path in ("/health", "/ready", "/metrics"):
            assert live.http.get(path).status_code == 200
        live.engine.ready = False
        live.http.get("/ready")
        assert wait_until(lambda: len(caplog.records) > 0)
    assert [(one.fields["endpoint"], one.fields["status"]) for one in caplog.records] == [("GET /ready", 503)]


def test_without_the_flag_nothing_is_logged(live: Live, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        live.http.post("/v1/completions", json={"prompt": "x"})
        live.http.get("/version")
    assert [record for record in caplog.records if record.name.startswith("octavo")] == []


# How lines look


def record(message: str, level: int = logging.INFO, **fields: Any) -> logging.LogRecord:
    made = logging.LogRecord("octavo.server", level, __file__, 1, message, (), None)
    made.created, made.msecs, made.fields = 1_800_000_000.25, 250.0, fields
    return made


def test_a_line_of_json_is_one_object() -> None:
    line = logs.JsonFormatter().format(record("two\nlines", status=200, request_id="a"))
    assert json.loads(line) == {
        "time": "2027-01-15T08:00:00.250Z",
        "level": "info",
        "logger": "octavo.server",
        "message": "two\nlines",
        "status": 200,
        "request_id": "a",
    }
    assert "\n" not in line


def test_a_traceback_stays_on_its_line_of_json() -> None:
    failed = record("failed", logging.ERROR)
    try:
        raise ValueError("deep")
    except ValueError:
        failed.exc_info = sys.exc_info()
    line = logs.JsonFormatter().format(failed)
    assert "\n" not in line
    assert json.loads(line)["traceback"].endswith("ValueError: deep")


def test_a_line_of_text_cannot_be_forged_by_a_value() -> None:
    fields = {"endpoint": "GET /x\n12:00:00 INFO request", "status": 404, "odd": "a=b", "plain": "chatcmpl-1"}
    line = logs.TextFormatter().format(record("request", **fields))
    assert line.endswith(r'INFO request endpoint="GET /x\n12:00:00 INFO request" status=404 odd="a=b" plain=chatcmpl-1')


@pytest.fixture
def logging_as_before() -> Iterator[None]:
    root, names = logging.getLogger(), ("octavo", "octavo.requests")
    before = root.handlers[:], root.level, [logging.getLogger(name).level for name in names]
    # pytest's handlers are not ours to close
    root.handlers = []
    yield
    logging.captureWarnings(False)
    root.handlers, root.level = before[:2]
    for name, level in zip(names, before[2], strict=True):
        logging.getLogger(name).setLevel(level)


@pytest.mark.parametrize("level", ["debug", "info", "warning", "error"])
def test_the_level_says_what_is_written_but_requests_are_asked_for_apart(level: str, logging_as_before: None) -> None:
    stream = io.StringIO()
    logs.install(ServerConfig(log_level=level, log_format="json"), stream)
    for method in ("debug", "info", "warning", "error"):
        getattr(logging.getLogger("octavo.engine"), method)(method)
        getattr(logging.getLogger("somebody.else"), method)(f"their {method}")
    logs.requests.info("request")
    written = [json.loads(line)["message"] for line in stream.getvalue().splitlines()]
    order = ["debug", "info", "warning", "error"]
    assert [one for one in written if one in order] == order[order.index(level) :]
    assert [one for one in written if one not in order] == ["their warning", "their error", "request"]
