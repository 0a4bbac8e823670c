"""POST /v1/completions."""

import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from engine.grammar import Grammar
from engine.kv_policies.policy import KVPolicy
from server.admission import check_ready
from server.answer_schemas import Completion, CompletionChunk
from server.answers import Choice, answer, collect, head_of
from server.generation import Generation
from server.logprobs import LegacyLogprobs
from server.openapi import OF_GENERATION, errors, gives, takes
from server.protocol import CompletionRequest, TokenIds
from server.sampling import sampling_params
from server.serving import Serving, read_body
from server.sse import EventStream, Frame, quote
from server.standing import Standing
from server.structured_output import compiled

router = APIRouter(tags=["completions"])

DEFAULT_MAX_TOKENS = 16


@dataclass(frozen=True)
class Job:
    """One request, checked and put into tokens."""

    body: CompletionRequest
    serving: Serving
    standing: Standing
    kv_policy: KVPolicy
    head: dict[str, Any]
    prompts: Sequence[TokenIds]
    echoes: Sequence[str]
    """Per choice, what its text begins with."""
    max_tokens: int
    grammar: Grammar | None

    @property
    def scores_prompts(self) -> bool:
        """Whether the prompts' own log-probabilities are wanted too."""
        return bool(self.body.echo) and self.body.logprobs is not None

    def first_token(self, index: int) -> int:
        """Of a choice's prompt."""
        return self.prompts[index // (self.body.n or 1)][0]

    def logprobs(self) -> LegacyLogprobs | None:
        """A maker of log-probabilities for one choice, if they are asked for."""
        count = self.body.logprobs
        return None if count is None else LegacyLogprobs(self.serving.engine.tokenizer, count)


@router.post(
    "/v1/completions",
    openapi_extra=takes(CompletionRequest),
    responses=gives(Completion, chunk=CompletionChunk) | errors(*OF_GENERATION),
)
async def completions(request: Request) -> Response:
    """Continue each of the prompts."""
    arrival = time.monotonic()
    serving, body = Serving.of(request), await read_body(request, CompletionRequest)
    job = await _prepare(serving, body, serving.standing(request, body, arrival))
    generation = _start(job)
    if job.body.stream:
        return EventStream(_chunks(job, generation), generation, job.serving.config.send_timeout)
    if job.max_tokens or job.scores_prompts:
        choices = await collect(generation, len(job.echoes), request)
    else:
        choices = [Choice(finish_reason="length") for _ in job.echoes]
    return answer(job.head, [_choice(job, generation, index, one) for index, one in enumerate(choices)], generation)


async def _prepare(serving: Serving, body: CompletionRequest, standing: Standing) -> Job:
    """Everything that can refuse the request, before the engine hears of it."""
    model, policy = serving.model(body.model), serving.kv_policy(body)
    prompts = await serving.tokenize(body.prompt, add_special_tokens=body.add_special_tokens, param="prompt")
    room = serving.room(prompts, body.max_tokens, "prompt", policy=policy, num_made=body.num_made)
    echoes = [""] * len(prompts)
    if body.echo:
        echoes = [one for one in body.prompt if isinstance(one, str)] or await serving.decode(prompts)
    return Job(
        body=body,
        serving=serving,
        standing=standing,
        kv_policy=policy,
        head=head_of("cmpl", "text_completion", model),
        prompts=prompts,
        echoes=[echo for echo in echoes for _ in range(body.n or 1)],
        max_tokens=min(DEFAULT_MAX_TOKENS, room) if body.max_tokens is None else body.max_tokens,
        grammar=await compiled(serving.engine, body.demands),
    )


def _start(job: Job) -> Generation:
    body, serving = job.body, job.serving
    scores = body.logprobs if job.scores_prompts else None
    params = sampling_params(
        body, serving, max_tokens=job.max_tokens, logprobs=body.logprobs, prompt_logprobs=scores, grammar=job.grammar
    )
    if not job.max_tokens:
        if scores is None:  # only the echo is wanted: that needs no engine
            check_ready(serving)
            return Generation([], params.n, sum(map(len, job.prompts)), job.kv_policy)
        params = replace(params, best_of=None, beams=None)  # there is nothing to choose from
    return Generation.submit(
        serving,
        job.prompts,
        params,
        job.standing,
        kv_policy=job.kv_policy,
        cache_salt=body.cache_salt,
        request_id=job.head["id"],
    )


def _choice(job: Job, generation: Generation, index: int, choice: Choice) -> dict[str, Any]:
    logprobs, tokens, first = job.logprobs(), choice.logprobs, None
    if job.scores_prompts:
        tokens, first = [*generation.prompt_logprobs(index), *tokens], job.first_token(index)
    return {
        "index": index,
        "text": job.echoes[index] + choice.text,
        "logprobs": None if logprobs is None else logprobs.add(tokens, first=first),
        "finish_reason": choice.finish_reason,
    }


async def _chunks(job: Job, generation: Generation) -> AsyncGenerator[bytes, None]:
    frame = Frame(
        job.head,
        include_usage=job.body.stream_options is not None and job.body.stream_options.include_usage is True,
    )
    reason = None if job.max_tokens else "length"
    waiting = set(range(len(job.echoes))) if job.scores_prompts else set()
    for index, echo in enumerate(job.echoes):
        if (echo or reason) and index not in waiting:
            yield frame.choice(index, f'"text": {quote(echo)}, "logprobs": null', reason)
    makers = [job.logprobs() for _ in job.echoes]
    async for index, output in generation.outputs():
        maker = makers[index]
        if index in waiting and maker is not None:
            waiting.remove(index)
            scores = maker.add_json(generation.prompt_logprobs(index), first=job.first_token(index))
            yield frame.choice(index, f'"text": {quote(job.echoes[index])}, "logprobs": {scores}', reason)
        if reason:
            continue
        logprobs = "null" if maker is None else maker.add_json(output.logprobs)
        yield frame.choice(index, f'"text": {quote(output.text)}, "logprobs": {logprobs}', output.finish_reason)
    yield frame.last(generation.usage)
