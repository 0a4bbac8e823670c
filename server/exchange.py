"""One HTTP request and its answer: the id that both carry, and what is known when the answer has ended."""

import re
import time
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from starlette.types import Scope

if TYPE_CHECKING:
    from server.generation import Generation

_KEY = "octavo.exchange"
_REQUEST_ID = re.compile(rb"[\w.:-]{1,128}", re.ASCII)
_PROBES = frozenset({"/health", "/ready", "/metrics"})
_MAX_PATH = 200
"""Characters of a URL that belongs to no route."""


def new_request_id() -> str:
    """An id for a request that brings none."""
    return uuid.uuid4().hex


@dataclass(slots=True, eq=False)
class Exchange:
    """Lives in the request's scope; whoever answers fills it in."""

    scope: Scope
    request_id: str
    """The client's `X-Request-Id`, or a new one where that is missing or odd."""
    arrival: float = field(default_factory=time.perf_counter)
    """Seconds on the clock of `time.perf_counter`, when the headers were complete."""
    arrival_ns: int = field(default_factory=time.time_ns)
    """The same in nanoseconds since 1970."""
    latency: float = 0.0
    """Seconds from the arrival to the answer's last byte; known at the end."""
    status: int | None = None
    """HTTP status of the answer; None until it begins, and for good if it never did."""
    error: str | None = None
    """The code, or else the type, of the error that the answer is, or that a stream ended with."""
    generation: "Generation | None" = None

    @classmethod
    def begin(cls, scope: Scope) -> Self:
        """The exchange of a request that has just come in."""
        given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
        request_id = given.decode() if _REQUEST_ID.fullmatch(given) else new_request_id()
        scope[_KEY] = exchange = cls(scope, request_id)
        return exchange

    @classmethod
    def of(cls, scope: Scope) -> Self:
        """The one that a request belongs to."""
        exchange = scope[_KEY]
        assert isinstance(exchange, cls)
        return exchange

    @property
    def endpoint(self) -> str:
        """Method and route, such as `POST /v1/completions`; the path itself where there is no such route."""
        route = self.scope.get("route")
        path = getattr(route, "path", None) or self.scope["path"][:_MAX_PATH]
        return f"{self.scope['method']} {path}"

    @property
    def is_good_probe(self) -> bool:
        """Whether it is one of those that come every few seconds, and went well: nobody wants to read about it."""
        return self.status == 200 and self.scope["path"] in _PROBES

    @property
    def headers(self) -> dict[str, str]:
        """The request's, by their names in lower case."""
        return {name.decode("latin-1"): value.decode("latin-1") for name, value in self.scope["headers"]}

    @property
    def ttft(self) -> float | None:
        """Seconds from the arrival to the first output; None where there was none."""
        first = None if self.generation is None else self.generation.first_output
        return None if first is None else first - self.arrival

    def fields(self) -> dict[str, Any]:
        """What can be told of it, without what it was about; what is not known is left out."""
        known: dict[str, Any] = {
            "request_id": self.request_id,
            "endpoint": self.endpoint,
            "status": self.status,
            "error": self.error,
        }
        if self.generation is not None:
            known |= self.generation.fields()
        known |= {"ttft_seconds": _rounded(self.ttft), "latency_seconds": _rounded(self.latency)}
        return {name: value for name, value in known.items() if value is not None}


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)
