"""POST /v1/chat/completions."""

import json
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from engine.errors import InvalidRequestError
from engine.outputs import Output, TokenLogprob
from server.answer_schemas import ChatCompletion, ChatCompletionChunk
from server.answers import Choice, answer, collect, head_of
from server.generation import Generation
from server.logprobs import chat_logprobs
from server.openapi import OF_GENERATION, errors, gives, takes
from server.protocol import ChatRequest
from server.sampling import sampling_params
from server.serving import Serving, read_body
from server.sse import EventStream, Frame, quote
from server.standing import Standing
from server.structured_output import compiled
from server.tool_parser import ToolCallParser
from server.tool_use import ToolUse, call_delta, whole_message

router = APIRouter(tags=["chat"])

_ROLE = '"delta": {"role": "assistant", "content": ""}, "logprobs": null'


@dataclass(frozen=True)
class Job:
    """One request, checked and with its engine at work."""

    body: ChatRequest
    serving: Serving
    head: dict[str, Any]
    generation: Generation
    tools: ToolUse | None

    @property
    def choices(self) -> int:
        """How many answers are wanted."""
        return self.body.n or 1

    def logprobs(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        """The log-probabilities of some tokens, if they are asked for."""
        if not self.body.logprobs:
            return None
        return chat_logprobs(self.serving.engine.tokenizer, tokens, self.body.top_logprobs or 0)


@router.post(
    "/v1/chat/completions",
    openapi_extra=takes(ChatRequest),
    responses=gives(ChatCompletion, chunk=ChatCompletionChunk) | errors(*OF_GENERATION),
)
async def chat_completions(request: Request) -> Response:
    """Answer the last message of a conversation."""
    arrival = time.monotonic()
    serving, body = Serving.of(request), await read_body(request, ChatRequest)
    job = await _start(serving, body, serving.standing(request, body, arrival))
    if job.body.stream:
        return EventStream(_chunks(job), job.generation, job.serving.config.send_timeout)
    text_of = {} if job.tools is None else {"text_of": job.tools.text}
    choices = await collect(job.generation, job.choices, request, **text_of)
    return answer(job.head, [_choice(job, index, one) for index, one in enumerate(choices)], job.generation)


async def _start(serving: Serving, body: ChatRequest, standing: Standing) -> Job:
    model, policy = serving.model(body.model), serving.kv_policy(body)
    wanted = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    if None not in (body.max_tokens, body.max_completion_tokens) and body.max_tokens != wanted:
        raise InvalidRequestError("max_tokens and max_completion_tokens disagree", param="max_tokens")
    tools = ToolUse.of(body, serving)
    demands = body.demands if tools is None else tools.demands(body.demands)
    prompt = await serving.render(
        body.messages,
        add_generation_prompt=body.add_generation_prompt,
        variables=body.chat_template_kwargs,
        tools=() if tools is None else tools.tools,
    )
    room = serving.room([prompt], wanted, "messages", body=body, policy=policy)
    grammar = await compiled(serving.engine, demands)
    params = sampling_params(
        body,
        serving,
        max_tokens=room if wanted is None else wanted,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        grammar=grammar,
    )
    head = head_of("chatcmpl", "chat.completion.chunk" if body.stream else "chat.completion", model)
    generation = Generation.submit(
        serving, [prompt], params, standing, kv_policy=policy, cache_salt=body.cache_salt, request_id=head["id"]
    )
    return Job(body, serving, head, generation, tools)


def _choice(job: Job, index: int, choice: Choice) -> dict[str, Any]:
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


async def _chunks(job: Job) -> AsyncGenerator[bytes, None]:
    options = job.body.stream_options
    frame = Frame(
        job.head,
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
