"""POST /v1/chat/completions."""

import json
import time
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from engine.outputs import Output
from server.answer_schemas import ChatCompletion, ChatCompletionChunk
from server.answers import Choice, answer, collect, head_of
from server.chat_job import ChatJob
from server.openapi import OF_GENERATION, errors, gives, takes
from server.protocol import ChatRequest
from server.serving import Serving, read_body
from server.sse import EventStream, Frame, quote
from server.tool_parser import ToolCallParser
from server.tool_use import ToolUse, call_delta, whole_message

router = APIRouter(tags=["chat"])

_ROLE = '"delta": {"role": "assistant", "content": ""}, "logprobs": null'


@router.post(
    "/v1/chat/completions",
    openapi_extra=takes(ChatRequest),
    responses=gives(ChatCompletion, chunk=ChatCompletionChunk) | errors(*OF_GENERATION),
)
async def chat_completions(request: Request) -> Response:
    """Answer the last message of a conversation."""
    arrival = time.monotonic()
    serving, body = Serving.of(request), await read_body(request, ChatRequest)
    kind = "chat.completion.chunk" if body.stream else "chat.completion"
    head = head_of("chatcmpl", kind, serving.model(body.model))
    job = await ChatJob.start(body, serving, serving.standing(request, body, arrival), head["id"])
    if body.stream:
        return EventStream(_chunks(job, head), job.generation, serving.config.send_timeout)
    text_of = {} if job.tools is None else {"text_of": job.tools.text}
    choices = await collect(job.generation, job.choices, request, **text_of)
    return answer(head, [_choice(job, index, one) for index, one in enumerate(choices)], job.generation)


def _choice(job: ChatJob, index: int, choice: Choice) -> dict[str, Any]:
    parser = None if job.tools is None else job.tools.parser()
    said = {"content": choice.text} if parser is None else whole_message(parser, choice.text)
    return {
        "index": index,
        "message": {"role": "assistant", **said, "refusal": None},
        "logprobs": job.logprobs(choice.logprobs),
        "finish_reason": _finish_reason(choice.finish_reason, parser),
    }


def _finish_reason(reason: str | None, parser: ToolCallParser | None) -> str | None:
    """An answer that ended by itself, and called something, ended to do so."""
    return "tool_calls" if reason == "stop" and parser is not None and parser.num_calls else reason


async def _chunks(job: ChatJob, head: dict[str, Any]) -> AsyncGenerator[bytes, None]:
    options = job.body.stream_options
    frame = Frame(
        head,
        include_usage=options is not None and options.include_usage is True,
    )
    begun = [False] * job.choices
    parsers = None if job.tools is None else [job.tools.parser() for _ in begun]
    async for index, output in job.generation.outputs():
        parser = None if parsers is None else parsers[index]
        if job.tools is None or parser is None:
            deltas = [f'"content": {quote(output.text)}' if output.text or not output.finish_reason else ""]
        else:
            deltas = _tool_deltas(job.tools, parser, output)
        reason = _finish_reason(output.finish_reason, parser)
        logprobs = json.dumps(job.logprobs(output.logprobs)) if job.body.logprobs else "null"
        chunk = b""
        for position, delta in enumerate(deltas, start=1):
            last = position == len(deltas)
            chunk += frame.choice(index, f'"delta": {{{delta}}}, "logprobs": {logprobs}', reason if last else None)
            logprobs = "null"
        if not begun[index]:
            begun[index] = True
            chunk = frame.choice(index, _ROLE, None) + chunk
        if chunk:
            yield chunk
    yield frame.last(job.generation.usage)


def _tool_deltas(tools: ToolUse, parser: ToolCallParser, output: Output) -> list[str]:
    """The deltas that tell what an output adds, each as JSON without its braces; an empty one carries other fields."""
    pieces = parser.push(tools.text(output))
    if output.finish_reason is not None:
        pieces += parser.finish()
    deltas = [
        f'"content": {quote(piece)}' if isinstance(piece, str) else f'"tool_calls": [{json.dumps(call_delta(piece))}]'
        for piece in pieces
    ]
    carries = output.finish_reason is not None or (output.logprobs and not deltas)
    return [*deltas, ""] if carries else deltas
