"""OpenTelemetry traces: one span per request, below the caller's own where a `traceparent` header names it.

The SDK is not among Octavo's dependencies: the extra `otel` brings it. The batching of its exporter runs in a thread.
"""

from typing import TYPE_CHECKING

from engine.errors import ConfigError
from server.observation import Listener
from server.version import version

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanProcessor

    from server.exchange import Exchange

_ATTRIBUTES = {
    "request_id": "http.request.header.x-request-id",
    "status": "http.response.status_code",
    "error": "error.type",
    "response_id": "gen_ai.response.id",
    "model": "gen_ai.request.model",
    "prompt_tokens": "gen_ai.usage.input_tokens",
    "cached_tokens": "gen_ai.usage.cache_read.input_tokens",
    "generated_tokens": "gen_ai.usage.output_tokens",
    "queue_seconds": "gen_ai.latency.time_in_queue",
    "ttft_seconds": "gen_ai.latency.time_to_first_token",
    "latency_seconds": "gen_ai.latency.e2e",
    "kv_policy": "octavo.kv_policy",
}
"""The log's fields by the names that OpenTelemetry, and in its absence vLLM, gave them."""


def exporting_to(endpoint: str) -> "SpanProcessor":
    """Sends spans to a collector, by OTLP over HTTP; ``endpoint`` is the URL that OTEL_EXPORTER_OTLP_ENDPOINT takes.

    Raises:
        ConfigError: the extra is not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise ConfigError("--otlp-endpoint: traces need the extra 'otel': pip install 'octavo[otel]'") from None
    path = "/v1/traces"
    return BatchSpanProcessor(OTLPSpanExporter(endpoint.rstrip("/").removesuffix(path) + path))


def trace_requests(processor: "SpanProcessor") -> Listener:
    """A listener that makes each exchange a span; probes and metrics, which come every few seconds, only if they fail.

    What is left unsent is flushed when the process ends.
    """
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import SpanKind, StatusCode
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    ours = Resource.create({"service.name": "octavo", "service.version": version()})
    provider = TracerProvider(resource=ours.merge(OTELResourceDetector().detect()))  # what OTEL_… says goes first
    provider.add_span_processor(processor)
    tracer = provider.get_tracer("octavo", version())
    propagator = TraceContextTextMapPropagator()

    def write(exchange: "Exchange") -> None:
        if exchange.is_good_probe:
            return
        fields = exchange.fields()
        span = tracer.start_span(
            exchange.endpoint,
            context=propagator.extract(exchange.headers),
            kind=SpanKind.SERVER,
            start_time=exchange.arrival_ns,
            attributes={name: fields[field] for field, name in _ATTRIBUTES.items() if field in fields},
        )
        method, _, route = exchange.endpoint.partition(" ")
        span.set_attributes({"http.request.method": method, "http.route": route})
        if "finish_reason" in fields:
            span.set_attribute("gen_ai.response.finish_reasons", fields["finish_reason"].split(","))
        if exchange.error is not None and (exchange.status is None or not 400 <= exchange.status < 500):
            span.set_status(StatusCode.ERROR, exchange.error)
        span.end(exchange.arrival_ns + int(exchange.latency * 1e9))

    return write
