"""A request's span: where it belongs, what it says, and what happens without the packages."""

import http.server
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("opentelemetry.sdk", reason="the extra 'otel' is not installed")

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from engine.errors import ConfigError
from server import app as application
from server.config import ServerConfig
from server.exchange import Exchange
from server.tracing import exporting_to, trace_requests
from server.version import version
from tests.server.conftest import Live, running, wait_until
from tests.server.fakes import FakeEngine

CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Traced:
    """A server and the spans that it writes."""

    def __init__(self, live: Live, exporter: InMemorySpanExporter) -> None:
        self.live = live
        self.exporter = exporter

    def span(self, path: str = "/v1/completions", traceparent: str = "", **body: Any) -> ReadableSpan:
        """The one that a request leaves."""
        self.exporter.clear()
        headers = {"x-request-id": "mine", **({"traceparent": traceparent} if traceparent else {})}
        self.live.http.post(path, json=body, headers=headers)
        assert wait_until(lambda: len(self.exporter.get_finished_spans()) > 0)
        (span,) = self.exporter.get_finished_spans()
        return span


@pytest.fixture(scope="module")
def traced() -> Iterator[Traced]:
    exporter = InMemorySpanExporter()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(application, "exporting_to", lambda endpoint: SimpleSpanProcessor(exporter))
        with running(FakeEngine(), ServerConfig(port=0, otlp_endpoint="http://127.0.0.1:1")) as live:
            yield Traced(live, exporter)


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_a_span_below_its_callers(traced: Traced, stream: bool) -> None:
    span = traced.span(prompt="x" * 20, max_tokens=5, stream=stream, traceparent=CALLER)
    assert (span.name, span.kind) == ("POST /v1/completions", SpanKind.SERVER)
    assert format(span.context.trace_id, "032x") == CALLER.split("-")[1]
    assert format(span.parent.span_id, "016x") == CALLER.split("-")[2]
    assert span.status.status_code is StatusCode.UNSET
    said = dict(span.attributes)
    latency = said.pop("gen_ai.latency.e2e")
    assert said.pop("gen_ai.latency.time_in_queue") == 0.001
    assert 0 < said.pop("gen_ai.latency.time_to_first_token") <= latency
    assert (span.end_time - span.start_time) / 1e9 == pytest.approx(latency, abs=1e-5)
    assert said.pop("gen_ai.response.id").startswith("cmpl-")
    assert said == {
        "http.request.method": "POST",
        "http.route": "/v1/completions",
        "http.request.header.x-request-id": "mine",
        "http.response.status_code": 200,
        "gen_ai.request.model": "fake",
        "gen_ai.usage.input_tokens": 21,
        "gen_ai.usage.cache_read.input_tokens": 16,
        "gen_ai.usage.output_tokens": 5,
        "gen_ai.response.finish_reasons": ("length",),
        "octavo.kv_policy": "full",
    }


@pytest.mark.parametrize("traceparent", ["", "nonsense", CALLER.replace("-b7ad6b7169203331-", "-0000000000000000-")])
def test_without_a_caller_it_is_a_trace_of_its_own(traced: Traced, traceparent: str) -> None:
    span = traced.span(prompt="x", traceparent=traceparent)
    assert span.parent is None
    assert format(span.context.trace_id, "032x") != CALLER.split("-")[1]


def test_a_caller_that_does_not_sample_is_followed(traced: Traced) -> None:
    traced.exporter.clear()
    traced.live.http.get("/v1/models", headers={"traceparent": CALLER[:-2] + "00"})
    traced.live.http.get("/version")
    assert wait_until(lambda: len(traced.exporter.get_finished_spans()) > 0)
    assert [span.name for span in traced.exporter.get_finished_spans()] == ["GET /version"]


def test_a_clients_mistake_is_no_error_of_the_servers(traced: Traced) -> None:
    span = traced.span(prompt=5)
    assert span.attributes["error.type"] == "invalid_request_error"
    assert span.status.status_code is StatusCode.UNSET


@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_is_one_even_after_a_200(traced: Traced, stream: bool) -> None:
    traced.live.engine.fail_after = 2
    span = traced.span(prompt="x", stream=stream)
    traced.live.engine.fail_after = None
    assert span.attributes["http.response.status_code"] == (200 if stream else 500)
    assert (span.status.status_code, span.status.description) == (StatusCode.ERROR, "engine_error")


def test_probes_leave_no_span(traced: Traced) -> None:
    traced.exporter.clear()
    traced.live.http.get("/health")
    traced.live.http.get("/metrics")
    traced.live.http.get("/version")
    assert wait_until(lambda: len(traced.exporter.get_finished_spans()) > 0)
    assert [span.name for span in traced.exporter.get_finished_spans()] == ["GET /version"]


@pytest.mark.parametrize("suffix", ["", "/", "/v1/traces"])
def test_spans_reach_a_collector_over_http(suffix: str) -> None:
    received: list[tuple[str, bytes]] = []

    class Collector(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Collector) as collector:
        thread = threading.Thread(target=collector.serve_forever, daemon=True)
        thread.start()
        processor = exporting_to(f"http://127.0.0.1:{collector.server_port}{suffix}")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(application, "exporting_to", lambda endpoint: processor)
            with running(FakeEngine(), ServerConfig(port=0, otlp_endpoint="http://unused")) as live:
                live.http.get("/version")
        assert processor.force_flush()
        processor.shutdown()
        collector.shutdown()
        thread.join()
    ((path, body),) = received
    assert path == "/v1/traces"
    assert b"GET /version" in body


def test_the_variables_of_the_sdk_name_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    exporter = InMemorySpanExporter()
    for names in ({}, {"OTEL_SERVICE_NAME": "mine", "OTEL_RESOURCE_ATTRIBUTES": "zone=a"}):
        for name, value in names.items():
            monkeypatch.setenv(name, value)
        write = trace_requests(SimpleSpanProcessor(exporter))
        write(Exchange.begin({"method": "GET", "path": "/version", "headers": []}))
    first, second = (span.resource.attributes for span in exporter.get_finished_spans())
    assert (first["service.name"], first["service.version"]) == ("octavo", version())
    assert (second["service.name"], second["zone"]) == ("mine", "a")


def test_without_the_packages_the_flag_is_an_error_that_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace.export", None)
    with pytest.raises(ConfigError, match=r"--otlp-endpoint: .*'octavo\[otel\]'"):
        exporting_to("http://127.0.0.1:4318")
