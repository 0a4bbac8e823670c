"""Who is let into the engine's queue, and what the others are told."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from engine.errors import InvalidRequestError
from server.errors import ApiError
from server.protocol import TokenIds

if TYPE_CHECKING:
    from server.serving import Serving

_LONGEST_WAIT = 60
"""Seconds that a client is told to stay away, at most: no estimate is good for longer."""


def admit(serving: "Serving", prompts: Sequence[TokenIds], param: str) -> None:
    """Let a request's prompts in; whoever calls this submits them before anything else can run, that is without await.

    Raises:
        ApiError: 503 while starting or stopping, 429 if they do not fit into the queue.
        InvalidRequestError: they are more than ever fit.
    """
    check_ready(serving)
    config = serving.config
    if len(prompts) > config.max_queue:
        raise InvalidRequestError(
            f"{len(prompts)} prompts are more than the {config.max_queue} that may wait here at a time", param=param
        )
    stats = serving.engine.stats()
    if stats.num_queued + len(prompts) > config.max_queue:
        raise _queue_full(serving, "queue")
    if config.max_queue_tokens is None or not stats.num_queued_tokens:
        return  # what finds an empty queue gets in, or a long prompt never might
    if stats.num_queued_tokens + sum(map(len, prompts)) > config.max_queue_tokens:
        raise _queue_full(serving, "queue_tokens")


def check_ready(serving: "Serving") -> None:
    """Raise ApiError 503 while the server is starting or stopping; that the engine is dead is for the engine to say."""
    engine = serving.engine
    if engine.is_healthy() and (serving.lifecycle.draining or not engine.is_ready()):
        serving.metrics.on_rejection("not_ready")
        raise ApiError(503, "The server is starting or stopping.", headers={"Retry-After": "5"})


def retry_after(serving: "Serving") -> int:
    """Whole seconds until all that waits now has probably begun, at the pace of the last seconds: 1 to 60."""
    seconds = serving.metrics.seconds_to_begin(serving.engine.stats().num_queued_tokens)
    return math.ceil(min(max(seconds, 1), _LONGEST_WAIT))


def _queue_full(serving: "Serving", reason: str) -> ApiError:
    serving.metrics.on_rejection(reason)
    return ApiError(429, "Too many requests are waiting; try again shortly.", code="queue_full")
