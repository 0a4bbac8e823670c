"""The ASGI application: routes, errors, and what stands before them."""

import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from engine.errors import ConfigError
from server import errors, openapi
from server.admission import retry_after
from server.auth import ApiKeyMiddleware
from server.chat_template import ChatTemplate, load_template
from server.config import ServerConfig
from server.logs import log_request
from server.metrics import Metrics
from server.observation import Listener, ObservationMiddleware
from server.routes import chat, completions, embeddings, responses, status, tokens
from server.serving import Serving
from server.standing import Tenants
from server.tool_format import choose_format
from server.tracing import exporting_to, trace_requests
from server.version import version

if TYPE_CHECKING:
    from engine.async_engine import AsyncEngine

logger = logging.getLogger("octavo.server")


def create_app(
    engine: "AsyncEngine",
    config: ServerConfig,
    metrics: Metrics | None = None,
    listeners: Sequence[Listener] | None = None,
) -> FastAPI:
    """The application around an engine, which whoever listens starts and stops.

    ``metrics`` is the engine's observer; without it /metrics knows only what the engine's ``stats`` say. ``listeners``
    hear of each request that has been answered: those of `listeners_of` unless they are given.

    Raises:
        ConfigError: the chat template cannot be read or is not valid, or no batch can ever fill.
    """
    batch_size = engine.config.batch_size
    if engine.config.batching == "static" and config.max_queue < batch_size:
        raise ConfigError(
            f"--max-queue {config.max_queue}: a static batch waits until --batch-size, {batch_size}, are queued"
        )
    metrics = metrics or Metrics()
    names = config.served_model_name or (engine.model_name,)
    metrics.attach(engine, names[0], vllm_names=config.metrics_compat)

    template = _template(engine, config)
    app = FastAPI(title="Octavo", version=version(), redoc_url=None)
    app.state.serving = serving = Serving(
        engine=engine,
        config=config,
        metrics=metrics,
        model_names=names,
        template=template,
        tool_format=choose_format(config.tool_parser, None if template is None else template.source),
        tenants=Tenants(config),
        created=int(time.time()),
    )
    for room in (completions, chat, responses, embeddings, tokens, status):
        app.include_router(room.router)
    openapi.install(app, keys=bool(config.api_key))
    errors.install(app, lambda: retry_after(serving))
    if config.api_key:
        app.add_middleware(ApiKeyMiddleware, keys=config.api_key)
    if config.cors_origins:  # outside the check of keys: a browser asks first whether it may, without one
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.cors_origins,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),
            expose_headers=("Retry-After", "X-Request-Id"),
        )
    app.add_middleware(ObservationMiddleware, listeners=listeners_of(config) if listeners is None else listeners)
    return app


def listeners_of(config: ServerConfig) -> list[Listener]:
    """The log of requests and their traces, where they are wanted.

    Raises:
        ConfigError: the packages that send traces are not installed.
    """
    logged = config.log_requests or config.log_request_content is not None
    listeners: list[Listener] = [log_request] if logged else []
    if config.otlp_endpoint is not None:
        listeners.append(trace_requests(exporting_to(config.otlp_endpoint)))
    return listeners


def _template(engine: "AsyncEngine", config: ServerConfig) -> ChatTemplate | None:
    try:
        return load_template(config.chat_template, engine.tokenizer)
    except ConfigError as error:
        if config.chat_template is not None:
            raise
        logger.warning("chat is not served: %s", error)  # the model can still complete text
        return None
