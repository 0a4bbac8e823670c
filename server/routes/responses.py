"""POST /v1/responses: the chat endpoint's answers, in the form of OpenAI's Responses API."""

import contextlib
import json
import time
import uuid
from collections.abc import AsyncGenerator, Iterator

from fastapi import APIRouter, Request
from starlette.responses import Response

from engine.errors import InvalidRequestError
from server.answer_schemas import ResponseAnswer, ResponseEvent
from server.chat_job import ChatJob
from server.errors import ApiError
from server.exchange import Exchange
from server.openapi import OF_GENERATION, errors, gives, takes
from server.response_object import EventWriter, ResponseObject
from server.response_output import Event, ResponseOutput
from server.response_request import ResponseRequest
from server.serving import Serving, read_body
from server.sse import EventStream

router = APIRouter(tags=["responses"])

_NAMES = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
}
"""What the chat endpoint's fields are called here."""


@router.post(
    "/v1/responses",
    openapi_extra=takes(ResponseRequest),
    responses=gives(ResponseAnswer, chunk=ResponseEvent) | errors(*OF_GENERATION),
)
async def responses(request: Request) -> Response:
    """Answer a conversation."""
    arrival = time.monotonic()
    serving, body = Serving.of(request), await read_body(request, ResponseRequest)
    model, response_id = serving.model(body.model), f"resp_{uuid.uuid4().hex}"
    with _named_as_here():
        job = await ChatJob.start(body.as_chat(), serving, serving.standing(request, body, arrival), response_id)
    response = ResponseObject(body, job, response_id, model)
    output = ResponseOutput(None if job.tools is None else job.tools.parser())
    if body.stream:
        writer = EventWriter()

        def failed(error: ApiError) -> bytes:
            return writer.write([("response.failed", {"response": response.failed(output, error)})])

        events = _events(job, response, output, writer)
        return EventStream(events, job.generation, serving.config.send_timeout, failed)
    Exchange.of(request.scope).generation = job.generation
    async with job.generation.watched(request.receive):
        async for _ in _grown(job, output):
            pass
    return Response(json.dumps(response.finished(output)), media_type="application/json")


async def _grown(job: ChatJob, output: ResponseOutput) -> AsyncGenerator[list[Event], None]:
    """Let the output grow to its end, step by step."""
    async for _, piece in job.generation.outputs():
        text = piece.text if job.tools is None else job.tools.text(piece)
        logprobs = job.logprobs(piece.logprobs)
        events = output.push(text, () if logprobs is None else logprobs["content"])
        if piece.finish_reason is not None:
            events += output.finish(complete=piece.finish_reason != "length")
        yield events


async def _events(
    job: ChatJob, response: ResponseObject, output: ResponseOutput, writer: EventWriter
) -> AsyncGenerator[bytes, None]:
    begun = {"response": response.begun()}
    written = writer.write([("response.created", begun), ("response.in_progress", begun)])
    async with contextlib.aclosing(_grown(job, output)) as steps:
        async for events in steps:
            written += writer.write(events)
            if written:
                yield written
            written = b""
    finished = response.finished(output)
    yield writer.write([(f"response.{finished['status']}", {"response": finished})])


@contextlib.contextmanager
def _named_as_here() -> Iterator[None]:
    """What the conversation is refused for has another name at the chat endpoint."""
    try:
        yield
    except InvalidRequestError as error:
        if error.param not in _NAMES:
            raise
        name = _NAMES[error.param]
        message = str(error)
        if message.startswith(f"{error.param}:"):
            message = name + message.removeprefix(error.param)
        raise InvalidRequestError(message, param=name, code=error.code) from None
