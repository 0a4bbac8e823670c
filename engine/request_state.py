"""A request between the engine and its client: its text as it grows, its times, and the stream that carries both."""

import asyncio
import time
from collections.abc import Callable
from collections.abc import Sequence as Seq

import numpy as np
from torch import Tensor

from engine.beam_progress import BeamProgress
from engine.beam_search import Hypothesis
from engine.errors import OctavoError
from engine.grammar_matcher import GrammarMatcher
from engine.kv_policies.policy import KVPolicy
from engine.observer import EngineObserver, RequestRecord
from engine.outputs import Output, TokenLogprob
from engine.prompt_outputs import PromptOutput
from engine.sampler import Sample, SampleRow
from engine.sampling_params import SamplingParams
from engine.text_stream import TextStream
from engine.tokenizer import Tokenizer
from scheduler.request import FinishReason, Request, Sequence, Status

Vector = np.ndarray[tuple[int], np.dtype[np.float32]]
"""An embedding."""


class RequestStream:
    """An async iterator over a request's outputs, of all its continuations, ending when the last one has ended."""

    def __init__(self, request_id: str, prompt_tokens: int, abort: Callable[[], None]) -> None:
        self.request_id = request_id
        self.prompt_tokens = prompt_tokens
        self.cached_tokens = 0
        """Prompt tokens found in the prefix cache; known from the first output on."""
        self.queue_seconds: float | None = None
        """Seconds from its arrival to its first step; None until then."""
        self.generated_tokens = 0
        """So far, those of continuations that lost to others included."""
        self.evicted_tokens = 0
        """Tokens whose KV the request's policy took so far, again if they had to be recomputed."""
        self.prompt_logprobs: list[TokenLogprob] = []
        """Of the prompt's tokens from the second on, if they were asked for; all are there with the first output."""
        self.embedding: Vector | None = None
        """[hidden], the prompt's pooled states, if they were asked for; there with the first output."""
        self.kv_slots = 0
        """KV slots that the continuations, or the last beams, held when they ended; known with the last output."""
        self._abort = abort
        self._queue: asyncio.Queue[Output | OctavoError | None] = asyncio.Queue()
        self._ended = False

    def __aiter__(self) -> "RequestStream":
        return self

    async def __anext__(self) -> Output:
        """The next output. Raises OctavoError if the engine failed."""
        if self._ended and self._queue.empty():
            raise StopAsyncIteration
        item = await self._queue.get()
        if isinstance(item, Output):
            return item
        self._ended = True
        if item is None:
            raise StopAsyncIteration
        raise item

    def abort(self) -> None:
        """End the request now and free all that it holds; nothing happens if it has ended."""
        self._abort()

    def put(self, item: Output | OctavoError | None) -> None:
        """For the engine: an output, the end (None) or a failure."""
        self._queue.put_nowait(item)


class Continuation:
    """One of the request's answers: its text so far, how likely it is, and when its tokens came."""

    __slots__ = ("first_token", "held", "index", "last_token", "matcher", "num_tokens", "open", "text", "total_logprob")

    def __init__(self, index: int, text: TextStream, matcher: GrammarMatcher | None) -> None:
        self.index = index
        self.text = text
        self.matcher = matcher
        self.open = True
        self.held: list[Output] = []
        """What waits for the decision whether it is among the best."""
        self.total_logprob = 0.0
        self.num_tokens = 0
        self.first_token: float | None = None
        self.last_token = 0.0


class RequestState:
    """What the engine keeps of a request from `submit` until its last continuation has ended."""

    def __init__(
        self,
        request: Request,
        params: SamplingParams,
        policy: KVPolicy,
        seed: int,
        tokenizer: Tokenizer,
        stream: RequestStream,
        matchers: Seq[GrammarMatcher] = (),
    ) -> None:
        self.request = request
        self.policy = policy
        self.stream = stream
        self.first_step: float | None = None
        self.params = params
        self._seed = seed
        self._pooled: Tensor | float = 0.0
        self._arrival = time.perf_counter()
        count = params.n if params.beams else params.width
        texts = [TextStream(tokenizer, params.stop) for _ in range(count)]
        self._continuations = [
            Continuation(index, text, matchers[index] if matchers else None) for index, text in enumerate(texts)
        ]
        self.beams: BeamProgress | None = None
        if params.beams is not None:
            self.beams = BeamProgress(request, params.beams, num_top=params.logprobs or 0)

    @property
    def ended(self) -> bool:
        """Whether every continuation's end has been told to the client."""
        return not any(continuation.open for continuation in self._continuations)

    @property
    def num_slots(self) -> int:
        """KV slots that its running sequences hold."""
        return sum(one.num_slots for one in self.request.sequences if one.status is Status.RUNNING)

    def begin(self, now: float) -> None:
        """Note that its first step is about to be computed."""
        self.first_step = now
        self.stream.queue_seconds = now - self._arrival
        self.stream.cached_tokens = self.request.cached_tokens or 0

    def evict(self, tokens: int, observer: EngineObserver) -> None:
        """Note that a sequence of the request lost the KV of so many tokens to the policy."""
        self.stream.evicted_tokens += tokens
        observer.on_eviction(policy=self.policy.name, tokens=tokens)

    def observe(self, positions: range, output: PromptOutput) -> None:
        """Note what the next positions of the prompt gave, or those from the first one on once more."""
        if not isinstance(output, Tensor):
            self.stream.prompt_logprobs[positions.start :] = output
            return
        observed = self.request.observed
        self._pooled = output if positions.start == observed.start else self._pooled + output
        if positions.stop == observed.stop:
            self.stream.embedding = (self._pooled / len(observed)).float().numpy()

    def finish_prompt(self, now: float, observer: EngineObserver) -> None:
        """End every continuation of a prompt that none is wanted of."""
        for continuation in self._continuations:
            self._send(continuation, Output(continuation.index, "", (), (), "length"), now, observer)

    def rows(self, sequence: Sequence, num_samples: int) -> list[SampleRow]:
        """What the sampler needs to know to draw the next ``num_samples`` tokens after ``sequence``."""
        return [
            SampleRow(
                params=self.params,
                seed=(self._seed & (2**64 - 1)) << 32 | index,
                tokens=sequence.tokens,
                num_prompt_tokens=self.request.num_prompt_tokens,
                stop_token_ids=self.request.stop.stop_token_ids,
                num_candidates=0 if self.beams is None else self.beams.num_candidates,
                matcher=None if self.beams is not None else self._continuations[index].matcher,
            )
            for index in range(sequence.index, sequence.index + num_samples)
        ]

    def grammar_failure(self, sequence: Sequence) -> str | None:
        """Why a sequence's grammar cannot be followed any further, if so."""
        matcher = self._continuations[sequence.index].matcher
        return None if matcher is None else matcher.failure

    def deliver(self, sequence: Sequence, sample: Sample, now: float, observer: EngineObserver) -> bool:
        """Send a token's output on. True if its text is complete by a stop string or its grammar: it must end."""
        continuation = self._continuations[sequence.index]
        self._observe_token(continuation, now, observer)
        self.stream.generated_tokens += 1
        may_stop = continuation.num_tokens > self.params.min_tokens
        piece = continuation.text.push(sample.token, may_stop=may_stop)
        complete = continuation.matcher is not None and continuation.matcher.complete
        text, reason = piece.text, "stop" if complete else sequence.finish_reason
        stop_reason: int | str | None = piece.stop
        if piece.stop is not None:
            reason = "stop"
        elif reason is not None:
            rest = continuation.text.finish()
            text += rest.text
            if rest.stop is not None:
                reason, stop_reason = "stop", rest.stop
            elif reason == "stop" and sample.token in self.params.stop_token_ids:
                stop_reason = sample.token
        logprobs: tuple[TokenLogprob, ...] = ()
        if sample.logprob is not None:
            continuation.total_logprob += sample.logprob.logprob
            logprobs = self._asked((sample.logprob,))
        output = Output(continuation.index, text, (sample.token,), logprobs, reason, stop_reason)
        self._send(continuation, output, now, observer)
        return complete or piece.stop is not None

    def observe_beams(self, now: float, observer: EngineObserver) -> None:
        """Note that every beam got a token."""
        for continuation in self._continuations:
            self._observe_token(continuation, now, observer)

    def deliver_beams(self, now: float, observer: EngineObserver) -> int:
        """Send the best that a beam search found, each whole; returns the tokens of all that it found."""
        assert self.beams is not None
        found = self.beams.found
        generated = sum(len(one.tokens) for one in found)
        found += [Hypothesis((), 0.0, "stop")] * (self.params.n - len(found))  # a vocabulary may hold no more
        for continuation, one in zip(self._continuations, found, strict=False):
            tokens = one.tokens
            texts = [continuation.text.push(token, may_stop=False).text for token in tokens]
            text = "".join(texts) + continuation.text.finish().text
            continuation.num_tokens = len(tokens)
            last = tokens[-1] if tokens else None
            stop_reason = last if one.finish_reason == "stop" and last in self.params.stop_token_ids else None
            logprobs = self._asked(one.logprobs)
            output = Output(continuation.index, text, tokens, logprobs, one.finish_reason, stop_reason)
            self._send(continuation, output, now, observer)
        self.stream.generated_tokens = generated
        return generated

    def end(self, reason: FinishReason, observer: EngineObserver, error: OctavoError | None = None) -> None:
        """End what is still open, from outside: an abort, or the engine's failure."""
        if self.ended:
            return
        for continuation in self._continuations:
            if continuation.open:
                self._close(continuation, reason, time.perf_counter(), observer)
        self.stream.put(error)

    def _asked(self, logprobs: tuple[TokenLogprob, ...]) -> tuple[TokenLogprob, ...]:
        """What the client sees of log-probabilities, which may have been computed to rank continuations only."""
        return () if self.params.logprobs is None else logprobs

    def _send(self, continuation: Continuation, output: Output, now: float, observer: EngineObserver) -> None:
        if self.params.ranked:
            continuation.held.append(output)
        else:
            self.stream.put(output)
        if output.finish_reason is not None:
            self._close(continuation, output.finish_reason, now, observer)
            if self.ended:
                self.stream.kv_slots = sum(one.num_slots for one in self.request.sequences)
                if self.params.ranked:
                    self._put_best()
                self.stream.put(None)

    def _put_best(self) -> None:
        """Send the likeliest continuations by token, each whole; of equals those begun first."""
        ranked = sorted(self._continuations, key=lambda one: one.total_logprob / one.num_tokens, reverse=True)
        for index, continuation in enumerate(ranked[: self.params.n]):
            self.stream.put(Output.joined(index, continuation.held))

    def _observe_token(self, continuation: Continuation, now: float, observer: EngineObserver) -> None:
        continuation.num_tokens += 1
        if continuation.first_token is None:
            continuation.first_token = now
            if continuation.index == 0:
                observer.on_first_token(now - self._arrival)
        else:
            observer.on_inter_token(now - continuation.last_token)
        continuation.last_token = now

    def _close(self, continuation: Continuation, reason: FinishReason, now: float, observer: EngineObserver) -> None:
        continuation.open = False
        first_step, first_token = self.first_step, continuation.first_token
        observer.on_finish(
            RequestRecord(
                index=continuation.index,
                finish_reason=reason,
                prompt_tokens=self.request.num_prompt_tokens,
                generated_tokens=continuation.num_tokens,
                e2e_seconds=now - self._arrival,
                queue_seconds=None if first_step is None else first_step - self._arrival,
                prefill_seconds=None if first_step is None or first_token is None else first_token - first_step,
                decode_seconds=None if first_token is None else continuation.last_token - first_token,
            )
        )
