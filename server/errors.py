"""Errors in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`, whatever went wrong.

Messages never hold an address, a path or a traceback: what is not meant for the client is logged instead.
"""

import json
import logging
from collections.abc import Callable, Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from engine.errors import (
    EngineDeadError,
    InvalidRequestError,
    NumericalError,
    OctavoError,
    OutOfMemoryError,
    RequestTimeoutError,
)
from server.exchange import Exchange
from server.logs import about

logger = logging.getLogger("octavo.server")

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    408: "timeout_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}

_BUSY = frozenset({"queue_full", "queue_timeout"})
"""Codes that come with the time after which a client may try again."""


class ApiError(Exception):
    """An answer other than 200: raised anywhere in a route, before the first byte goes out."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = headers

    @property
    def label(self) -> str:
        """Its code, or the type of those that have none."""
        return self.code or _kind(self.status)


def error_body(
    status: int, message: str, *, param: str | None = None, code: str | None = None
) -> dict[str, dict[str, str | None]]:
    """OpenAI's error object, with all four keys."""
    return {"error": {"message": message, "type": _kind(status), "param": param, "code": code}}


def _kind(status: int) -> str:
    return _TYPES.get(status, "invalid_request_error")


class _ErrorResponse(Response):
    media_type = "application/json"

    def __init__(self, error: ApiError) -> None:
        body = error_body(error.status, error.message, param=error.param, code=error.code)
        super().__init__(json.dumps(body), error.status, error.headers)
        self._label = error.label

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        Exchange.of(scope).error = self._label
        await super().__call__(scope, receive, send)


def error_response(error: ApiError) -> Response:
    """The HTTP answer for an error."""
    return _ErrorResponse(error)


def as_api_error(error: Exception, request_id: str) -> ApiError:
    """What the client is told of any error; the details of an unexpected one are logged here, once."""
    match error:
        case ApiError():
            return error
        case InvalidRequestError():
            return ApiError(400, str(error), param=error.param, code=error.code)
        case ValidationError():
            return _validation_error(error)
        case ClientDisconnect():
            return ApiError(499, "The client left.", code="client_left")  # nobody reads this
        case RequestValidationError():
            return ApiError(400, "The request is malformed.")
        case HTTPException():
            return _http_error(error)
        case RequestTimeoutError():
            return _timeout_error(error)
        case EngineDeadError():
            return ApiError(500, "The engine has failed; the server is about to stop.", code="engine_dead")
        case NumericalError():
            return ApiError(500, str(error), code="numerical_error")
        case OutOfMemoryError():
            return ApiError(503, str(error), code="out_of_memory")
        case OctavoError():
            logger.error("request failed: %s", error, extra=about(request_id))
            return ApiError(500, "The request failed in the engine.", code="engine_error")
        case _:
            logger.error("request failed", exc_info=error, extra=about(request_id))
            return ApiError(500, "The server failed to answer this request.", code="internal_error")


def _timeout_error(error: RequestTimeoutError) -> ApiError:
    if error.queued:
        return ApiError(503, f"{error}", code="queue_timeout")
    # OpenAI's clients repeat what ends with a 408, but this would take as long again.
    return ApiError(408, f"{error}", code="request_timeout", headers={"x-should-retry": "false"})


def _http_error(error: HTTPException) -> ApiError:
    codes = {404: "unknown_url", 405: "method_not_allowed"}
    messages = {404: "There is nothing at this URL.", 405: "This URL does not take this method."}
    message = messages.get(error.status_code, str(error.detail))
    return ApiError(error.status_code, message, code=codes.get(error.status_code), headers=error.headers)


def _validation_error(error: ValidationError) -> ApiError:
    """The first of pydantic's complaints, as `messages[0].content: …`."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "json_invalid":
        return ApiError(400, f"The body is not valid JSON: {message.removeprefix('Invalid JSON: ')}.")
    param = _param(first["loc"])
    return ApiError(400, f"{param}: {message}" if param else message, param=param)


def _param(location: tuple[int | str, ...]) -> str | None:
    """("messages", 0, "content") as `messages[0].content`; keys that a client chose freely are cut short."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part[:64]}" for part in location)
    return text.removeprefix(".") or None


def install(app: FastAPI, retry_after: Callable[[], int]) -> None:
    """Make every expected error of ``app`` answer in OpenAI's shape; the others are `ObservationMiddleware`'s.

    ``retry_after`` tells how many seconds the server will be busy.
    """

    async def handle(request: Request, error: Any) -> Response:
        response = error_response(told := as_api_error(error, Exchange.of(request.scope).request_id))
        if told.code in _BUSY:
            response.headers["retry-after"] = str(retry_after())
        return response

    for kind in (ApiError, OctavoError, HTTPException, ValidationError, RequestValidationError):
        app.add_exception_handler(kind, handle)
