"""The description of the API at /openapi.json.

Routes read their bodies themselves, to be strict about bytes; so the schemas of the bodies are declared here.
"""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from server.embeddings import EmbeddingRequest
from server.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from server.response_request import ResponseRequest
from server.version import version

_BODIES = (CompletionRequest, ChatRequest, ResponseRequest, EmbeddingRequest, TokenizeRequest, DetokenizeRequest)
_REF = "#/components/schemas/{model}"


def takes(body: type[BaseModel]) -> dict[str, Any]:
    """For a route's ``openapi_extra``: that it takes such a body."""
    schema = {"$ref": _REF.format(model=body.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def install(app: FastAPI) -> None:
    """Make ``app`` describe its bodies, too."""

    def describe() -> dict[str, Any]:
        if app.openapi_schema is None:
            description = get_openapi(title="Octavo", version=version(), routes=app.routes)
            _, schemas = models_json_schema([(body, "validation") for body in _BODIES], ref_template=_REF)
            description.setdefault("components", {}).setdefault("schemas", {}).update(schemas["$defs"])
            app.openapi_schema = description
        return app.openapi_schema

    app.openapi = describe  # type: ignore[method-assign]
