"""What the server is and how it does: /v1/models, /health, /ready, /version, /metrics."""

from fastapi import APIRouter, Request
from starlette.responses import PlainTextResponse, Response

from server.answer_schemas import Model, ModelList, Status, Version
from server.errors import ApiError
from server.metrics import CONTENT_TYPE
from server.openapi import errors
from server.serving import Serving
from server.version import version

router = APIRouter(tags=["status"])


@router.get("/v1/models", responses=errors())
async def models(request: Request) -> ModelList:
    """The names that requests may use; all of them mean the one model."""
    serving = Serving.of(request)
    return ModelList(object="list", data=[_model(serving, name) for name in serving.model_names])


@router.get("/v1/models/{name:path}", responses=errors(404))
async def model(request: Request, name: str) -> Model:
    """One of them."""
    serving = Serving.of(request)
    return _model(serving, serving.model(name))


def _model(serving: Serving, name: str) -> Model:
    return Model(
        id=name,
        object="model",
        created=serving.created,
        owned_by="octavo",
        max_model_len=serving.engine.max_model_len,
    )


@router.head("/health", include_in_schema=False)
@router.get("/health", responses=errors(503))
async def health(request: Request) -> Status:
    """Alive: the engine has not failed, and moves while it has work."""
    if not Serving.of(request).engine.is_healthy():
        raise ApiError(503, "The engine has failed.", code="engine_dead")
    return Status(status="ok")


@router.head("/ready", include_in_schema=False)
@router.get("/ready", responses=errors(503))
async def ready(request: Request) -> Status:
    """To be sent requests: loaded, healthy, and not about to stop."""
    serving = Serving.of(request)
    engine = serving.engine
    if serving.lifecycle.draining or not (engine.is_ready() and engine.is_healthy()):
        raise ApiError(503, "The server is starting or stopping.", code="not_ready")
    return Status(status="ready")


@router.get("/version", responses=errors())
async def server_version() -> Version:
    """Which Octavo this is."""
    return Version(version=version())


@router.get("/metrics", response_class=PlainTextResponse, responses=errors())
async def metrics(request: Request) -> Response:
    """Prometheus's text format."""
    return Response(Serving.of(request).metrics.render(), media_type=CONTENT_TYPE)
