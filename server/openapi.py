"""The description of the API at /openapi.json.

Routes read their bodies themselves, to be strict about bytes, and write their answers themselves, for speed; so the
schemas of both are declared here.
"""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from server.answer_schemas import ChatCompletionChunk, CompletionChunk, Error, ResponseEvent
from server.auth import OPEN_PATHS
from server.embeddings import EmbeddingRequest
from server.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from server.response_request import ResponseRequest
from server.version import version

_BODIES = (CompletionRequest, ChatRequest, ResponseRequest, EmbeddingRequest, TokenizeRequest, DetokenizeRequest)
_ANSWERS = (CompletionChunk, ChatCompletionChunk, ResponseEvent, Error)
"""Those of which FastAPI does not know."""
_REF = "#/components/schemas/{model}"

OF_BODIES = (400, 404, 413, 415)
"""Errors of every route that takes a body."""
OF_GENERATION = (*OF_BODIES, 408, 429, 503)
"""Errors of those that let the model work."""
_ERRORS = {
    400: "The request is invalid or too long.",
    401: "A valid API key is needed.",
    404: "There is no such model.",
    408: "The time that the request allowed was up.",
    413: "The body is too large.",
    415: "The body is not JSON by its own account.",
    429: "Too many requests are waiting.",
    500: "The engine, or the server, has failed.",
    503: "The server is starting, stopping, or did not begin the request in time.",
}
_HEADERS: dict[str, dict[str, Any]] = {
    "X-Request-Id": {
        "description": "The request's own, if it had a sound one; else new.",
        "required": True,
        "schema": {"type": "string", "pattern": "^[A-Za-z0-9_.:-]{1,128}$"},
    },
    "Retry-After": {
        "description": "Seconds after which another try makes sense.",
        "schema": {"type": "integer", "minimum": 1, "maximum": 60},
    },
    "x-should-retry": {
        "description": "That the same request would take as long again.",
        "required": True,
        "schema": {"const": "false"},
    },
    "WWW-Authenticate": {"required": True, "schema": {"const": "Bearer"}},
}
_HEADERS_OF = {401: "WWW-Authenticate", 408: "x-should-retry", 429: "Retry-After", 503: "Retry-After"}


def takes(body: type[BaseModel]) -> dict[str, Any]:
    """For a route's ``openapi_extra``: that it takes such a body."""
    schema = {"$ref": _REF.format(model=body.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def gives(answer: type[BaseModel], *, chunk: type[BaseModel] | None = None) -> dict[int | str, Any]:
    """For the ``responses`` of a route that FastAPI cannot ask: its answer, and what it streams instead, in events."""
    good: dict[str, Any] = {"model": answer}
    if chunk is not None:
        good["content"] = {"text/event-stream": {"itemSchema": _event(chunk)}}
    return {200: good}


def errors(*statuses: int) -> dict[int | str, Any]:
    """For a route's ``responses``: its errors, beside those of every route: 401 where keys are needed, and 500."""
    return {status: _error(status) for status in (*statuses, 500)}


def _event(chunk: type[BaseModel]) -> dict[str, Any]:
    """One event of a stream; the last is `[DONE]`, or an error."""
    content = {"anyOf": [{"$ref": _REF.format(model=kind.__name__)} for kind in (chunk, Error)]}
    data = {"type": "string", "contentMediaType": "application/json", "contentSchema": content}
    return {
        "type": "object",
        "properties": {"data": {"anyOf": [{"const": "[DONE]"}, data]}},
        "required": ["data"],
    }


def _error(status: int) -> dict[str, Any]:
    name = _HEADERS_OF.get(status)
    headers = {} if name is None else {name: _HEADERS[name]}
    content = {"application/json": {"schema": {"$ref": _REF.format(model=Error.__name__)}}}
    return {"description": _ERRORS[status], "headers": headers, "content": content}


def install(app: FastAPI, *, keys: bool) -> None:
    """Make ``app`` describe its bodies, too, and where keys are needed."""

    def describe() -> dict[str, Any]:
        if app.openapi_schema is None:
            description = get_openapi(title="Octavo", version=version(), routes=app.routes)
            schemas = description["components"]["schemas"]
            for unused in ("HTTPValidationError", "ValidationError"):
                schemas.pop(unused, None)
            for kinds, mode in ((_BODIES, "validation"), (_ANSWERS, "serialization")):
                _, more = models_json_schema([(kind, mode) for kind in kinds], ref_template=_REF)  # type: ignore[misc]
                schemas.update(more["$defs"])
            for path, operations in description["paths"].items():
                for operation in operations.values():
                    _complete(operation, key=keys and path not in OPEN_PATHS)
            if keys:
                description["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            app.openapi_schema = description
        return app.openapi_schema

    app.openapi = describe  # type: ignore[method-assign]


def _complete(operation: dict[str, Any], *, key: bool) -> None:
    """What all operations have in common."""
    responses = operation["responses"]
    responses.pop("422", None)  # FastAPI's own way to refuse a parameter, which here is a 400 or a 404
    if key:
        operation["security"] = [{"key": []}]
        responses["401"] = _error(401)
    for response in responses.values():
        response["headers"] = {**response.get("headers", {}), "X-Request-Id": _HEADERS["X-Request-Id"]}
