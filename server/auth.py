"""What stands before every route, in plain ASGI: the API key, and the request's id."""

import hmac
import re
import uuid
from collections.abc import Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import ApiError, error_response

OPEN_PATHS = frozenset({"/health", "/ready"})
"""Paths that orchestrators probe; exact, and the only ones that need no key."""

_REQUEST_ID = re.compile(rb"[\w.:-]{1,128}", re.ASCII)


def presented_key(scope: Scope) -> bytes:
    """The key in the one `Authorization: Bearer` header, unchecked; empty without it."""
    given = [value for name, value in scope["headers"] if name == b"authorization"]
    if len(given) != 1:
        return b""
    kind, _, key = given[0].partition(b" ")
    return bytes(key.strip()) if kind.lower() == b"bearer" else b""


class ApiKeyMiddleware:
    """Lets a request pass only with `Authorization: Bearer` and one of the keys.

    The check comes before routing, so an unknown URL does not tell itself apart without a key.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self.app = app
        self.keys = tuple(key.encode() for key in keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, or answer 401."""
        if scope["type"] == "lifespan" or scope["path"] in OPEN_PATHS or self._allowed(scope):
            await self.app(scope, receive, send)
            return
        error = ApiError(
            401,
            "A valid API key is needed: send it as 'Authorization: Bearer KEY'.",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
        await error_response(error)(scope, receive, send)

    def _allowed(self, scope: Scope) -> bool:
        key = presented_key(scope)
        # Every key is compared, in constant time each, so that the time tells nothing about any of them.
        matches = [hmac.compare_digest(key, known) for known in self.keys]
        return any(matches)


class RequestIdMiddleware:
    """Answers with the client's `X-Request-Id`, or with a new one where it is missing or odd."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, adding the header to the answer."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex.encode()

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id)]
            await send(message)

        await self.app(scope, receive, send_with_id)
