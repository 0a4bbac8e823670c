"""The outermost layer, in plain ASGI: each request gets its id, every failure an answer, and listeners hear the end."""

import time
from collections.abc import Callable, Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import as_api_error, error_response
from server.exchange import Exchange

Listener = Callable[[Exchange], None]
"""Called on the event loop when an answer has ended, well or not: cheap, and never raises."""


class ObservationMiddleware:
    """Puts `X-Request-Id` on every answer, errors and streams included."""

    def __init__(self, app: ASGIApp, listeners: Sequence[Listener] = ()) -> None:
        self.app = app
        self.listeners = listeners

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, and tell."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        exchange = Exchange.begin(scope)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", exchange.request_id.encode())]
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except Exception as error:  # noqa: BLE001 — nothing outside could answer with the id, or log it
            response = error_response(as_api_error(error, exchange.request_id))
            if exchange.status is None:
                await response(scope, receive, send_with_id)  # else uvicorn hangs up: the answer stays unfinished
        finally:
            exchange.latency = time.perf_counter() - exchange.arrival
            for listener in self.listeners:
                listener(exchange)
