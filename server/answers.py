"""What both endpoints' answers are made of."""

import json
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from engine.outputs import Output, TokenLogprob
from server.exchange import Exchange
from server.generation import Generation


@dataclass
class Choice:
    """One choice of an answer that is given whole, while it grows."""

    texts: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(self.texts)


async def collect(
    generation: Generation, count: int, request: Request, text_of: Callable[[Output], str] = lambda output: output.text
) -> list[Choice]:
    """All ``count`` choices, complete; ``text_of`` says what an output adds to its choice's text.

    Raises:
        ApiError: the client left (499) or the server stopped (503) before the end.
        OctavoError: the engine failed, or the request's time was up.
    """
    Exchange.of(request.scope).generation = generation
    choices = [Choice() for _ in range(count)]
    async with generation.watched(request.receive):
        async for index, output in generation.outputs():
            choice = choices[index]
            choice.texts.append(text_of(output))
            choice.logprobs.extend(output.logprobs)
            choice.finish_reason = output.finish_reason
    return choices


def head_of(prefix: str, kind: str, model: str) -> dict[str, Any]:
    """The fields that stay the same through an answer."""
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": model,
    }


def answer(head: dict[str, Any], choices: list[dict[str, Any]], generation: Generation) -> Response:
    """The whole answer."""
    content = {**head, "choices": choices, "usage": generation.usage}
    return Response(json.dumps(content), media_type="application/json")
