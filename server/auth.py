"""What stands before every route, in plain ASGI: the API key."""

import hmac
from collections.abc import Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

from server.errors import ApiError, error_response

OPEN_PATHS = frozenset({"/health", "/ready"})
"""Paths that orchestrators probe; exact, and the only ones that need no key."""


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
