"""What the server is and how it does: /v1/models, /health, /ready, /version, /metrics."""

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.errors import ApiError
from server.metrics import CONTENT_TYPE
from server.serving import Serving
from server.version import version

router = APIRouter(tags=["status"])


@router.get("/v1/models")
async def models(request: Request) -> dict[str, Any]:
    """The names that requests may use; all of them mean the one model."""
    serving = Serving.of(request)
    return {"object": "list", "data": [_model(serving, name) for name in serving.model_names]}


@router.get("/v1/models/{name:path}")
async def model(request: Request, name: str) -> dict[str, Any]:
    """One of them."""
    serving = Serving.of(request)
    return _model(serving, serving.model(name))


def _model(serving: Serving, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": serving.created,
        "owned_by": "octavo",
        "max_model_len": serving.engine.max_model_len,
    }


@router.head("/health", include_in_schema=False)
@router.get("/health")
async def health(request: Request) -> dict[str, str]:
    """Alive: the engine has not failed, and moves while it has work."""
    if not Serving.of(request).engine.is_healthy():
        raise ApiError(503, "The engine has failed.", code="engine_dead")
    return {"status": "ok"}


@router.head("/ready", include_in_schema=False)
@router.get("/ready")
async def ready(request: Request) -> dict[str, str]:
    """To be sent requests: loaded, healthy, and not about to stop."""
    serving = Serving.of(request)
    engine = serving.engine
    if serving.lifecycle.draining or not (engine.is_ready() and engine.is_healthy()):
        raise ApiError(503, "The server is starting or stopping.", code="not_ready")
    return {"status": "ready"}


@router.get("/version")
async def server_version() -> dict[str, str]:
    """Which Octavo this is."""
    return {"version": version()}


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Prometheus's text format."""
    return Response(Serving.of(request).metrics.render(), media_type=CONTENT_TYPE)
