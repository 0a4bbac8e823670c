"""One HTTP request's generation: its prompts in the engine, their outputs merged, aborted when the client leaves."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any, Self

from starlette.types import Receive

from engine.kv_policies.full import Full
from engine.kv_policies.policy import KVPolicy
from engine.kv_policies.registry import describe
from engine.outputs import Output, TokenLogprob
from engine.sampling_params import SamplingParams
from server.admission import admit
from server.errors import ApiError
from server.protocol import TokenIds
from server.standing import Standing
from server.transcript import Transcript

if TYPE_CHECKING:
    from engine.request_state import RequestStream, Vector
    from server.serving import Serving

Outputs = AsyncGenerator[tuple[int, Output], None]


class Generation:
    """The streams of a request's prompts, ``n`` choices each; choice index = prompt · n + continuation."""

    first_output: float | None = None
    """When the first output came, on the clock of `time.perf_counter`."""
    response_id: str | None = None
    """The answer's ``id``."""
    model: str | None = None
    """The model's name, that of the metrics: a request may have used another of its names."""
    transcript: Transcript | None = None
    """The text of prompts and answers, where that is to be logged."""

    def __init__(
        self,
        streams: Sequence["RequestStream"],
        n: int,
        prompt_tokens: int,
        kv_policy: KVPolicy,
    ) -> None:
        self._streams = streams
        self._n = n
        self._prompt_tokens = prompt_tokens
        self._kv_policy = kv_policy
        self._client_left = False
        self._finish_reasons: list[str] = []

    @classmethod
    def submit(
        cls,
        serving: "Serving",
        prompts: Sequence[TokenIds],
        params: SamplingParams,
        standing: Standing,
        *,
        kv_policy: KVPolicy,
        cache_salt: str | None,
        request_id: str,
        param: str = "prompt",
    ) -> Self:
        """Hand every prompt to the engine, or none. Nothing else runs meanwhile, so the queue's limit is kept.

        ``param`` is the field that the prompts come from.

        Raises:
            ApiError, InvalidRequestError: the queue does not take them.
            InvalidRequestError, EngineDeadError: the engine does not.
        """
        admit(serving, prompts, param)
        timeout = standing.timeout
        streams: list[RequestStream] = []
        try:
            for index, prompt in enumerate(prompts):
                stream = serving.engine.submit(
                    prompt,
                    params,
                    request_id=f"{request_id}-{index}",
                    cache_salt=cache_salt,
                    priority=standing.priority,
                    tenant=standing.tenant,
                    timeout=timeout,
                    kv_policy=kv_policy,
                )
                streams.append(stream)
        except BaseException:
            for stream in streams:
                stream.abort()
            raise
        generation = cls(streams, params.n, sum(map(len, prompts)), kv_policy)
        generation.response_id = request_id
        generation.model = serving.model_names[0]
        if serving.config.log_request_content is not None:
            generation.transcript = Transcript(serving.config.log_request_content, prompts, serving.engine.tokenizer)
        return generation

    def prompt_logprobs(self, index: int) -> Sequence[TokenLogprob]:
        """Of the prompt of a choice, from the prompt's second token on; known with the choice's first output."""
        return self._streams[index // self._n].prompt_logprobs

    def embedding(self, index: int) -> "Vector":
        """Of one of the prompts, if it was asked for; known with its output."""
        vector = self._streams[index].embedding
        assert vector is not None
        return vector

    def abort(self) -> None:
        """Free everything at once; ``outputs`` ends. Harmless when all is done."""
        for stream in self._streams:
            stream.abort()

    @property
    def usage(self) -> dict[str, object]:
        """OpenAI's usage object, of what has been generated so far; with ``kv`` where a policy kept the cache small."""
        prompt = self._prompt_tokens
        generated = sum(one.generated_tokens for one in self._streams)
        usage: dict[str, object] = {
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "total_tokens": prompt + generated,
            "prompt_tokens_details": {"cached_tokens": sum(one.cached_tokens for one in self._streams)},
        }
        if not isinstance(self._kv_policy, Full):
            usage["kv"] = {
                "policy": describe(self._kv_policy),
                "evicted_tokens": sum(one.evicted_tokens for one in self._streams),
                "slots": sum(one.kv_slots for one in self._streams),
            }
        return usage

    def fields(self) -> dict[str, Any]:
        """What a log or a trace tells of it; times in seconds, None for what is not known."""
        usage = self.usage
        waited = [one.queue_seconds for one in self._streams if one.queue_seconds is not None]
        fields: dict[str, Any] = {
            "response_id": self.response_id,
            "model": self.model,
            "prompt_tokens": usage["prompt_tokens"],
            "cached_tokens": sum(one.cached_tokens for one in self._streams),
            "generated_tokens": usage["completion_tokens"],
            "finish_reason": ",".join(dict.fromkeys(self._finish_reasons)) or None,
            "kv_policy": self._kv_policy.name,
            "queue_seconds": round(min(waited), 6) if waited else None,
        }
        return fields if self.transcript is None else {**fields, **self.transcript.fields()}

    async def outputs(self) -> Outputs:
        """(choice index, output) of all prompts, as they come.

        Raises:
            OctavoError: the engine failed, or the request's time was up.
            ApiError: it was stopped, or the client left, before every choice was complete.
        """
        unfinished = len(self._streams) * self._n
        pairs = _alone(self._streams[0]) if len(self._streams) == 1 else self._merge()
        async with contextlib.aclosing(pairs):
            async for index, output in pairs:
                if self.first_output is None:
                    self.first_output = time.perf_counter()
                if output.finish_reason is not None:
                    unfinished -= 1
                    self._finish_reasons.append(output.finish_reason)
                if self.transcript is not None:
                    self.transcript.add(index, output.text)
                yield index, output
        if unfinished:  # the engine ends an aborted stream without a word
            raise self._abort_error()

    def _abort_error(self) -> ApiError:
        if self._client_left:
            return ApiError(499, "The client left.", code="client_left")
        return ApiError(503, "The server stopped before the answer was complete.", code="aborted")

    async def _merge(self) -> Outputs:
        """All streams fairly: each waits its turn to put the next output into a queue with room for one per stream."""
        queue: asyncio.Queue[tuple[int, Output] | Exception | None] = asyncio.Queue(len(self._streams))

        async def pump(base: int, stream: "RequestStream") -> None:
            try:
                async for output in stream:
                    await queue.put((base + output.index, output))
            except Exception as error:  # noqa: BLE001 — raised again by the reader
                await queue.put(error)
            else:
                await queue.put(None)

        tasks = [asyncio.create_task(pump(index * self._n, stream)) for index, stream in enumerate(self._streams)]
        try:
            running = len(tasks)
            while running:
                item = await queue.get()
                if isinstance(item, Exception):
                    raise item
                if item is None:
                    running -= 1
                else:
                    yield item
        finally:
            for task in tasks:
                task.cancel()

    @contextlib.asynccontextmanager
    async def watched(self, receive: Receive) -> AsyncIterator[None]:
        """Abort as soon as the client disconnects, and in any case on leaving the block.

        The request's body must have been read: what ``receive`` brings then can only be the end.
        """

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            self._client_left = True
            self.abort()

        watcher = asyncio.create_task(watch())
        try:
            yield
        finally:
            watcher.cancel()
            self.abort()


async def _alone(stream: "RequestStream") -> Outputs:
    async for output in stream:
        yield output.index, output
