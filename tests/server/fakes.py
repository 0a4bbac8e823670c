"""An engine without a model: the same interface, deterministic words, and a memory of what was done to it."""

import asyncio
import contextlib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from engine.config import EngineConfig
from engine.errors import EngineDeadError, OctavoError
from engine.grammar_compiler import GrammarCompiler
from engine.kv_policies.policy import KVPolicy
from engine.outputs import Output, TokenLogprob
from engine.request_state import Vector
from engine.sampling_params import SamplingParams
from engine.text_stream import TextPiece, TextStream
from engine.tokenizer import Tokenizer
from scheduler.kv_budget import Window

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'system' and not loop.first %}"
    "{{ raise_exception('The system message must come first.') }}{% endif %}"
    "<|{{ message.role }}|>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
HIDDEN_SIZE = 8
SENTENCE = "The café's 😀 answer is "


def byte_tokenizer(chat_template: str | None = TEMPLATE) -> Tokenizer:
    """One token per byte, and `<s>` and `</s>`; a text's ids begin with `<s>`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    return Tokenizer(
        backend,
        bos_token="<s>",
        eos_token="</s>",
        eos_token_ids=frozenset({257}),
        chat_template=chat_template,
    )


def embedding_of(prompt: Sequence[int], pooling: str) -> Vector:
    """A vector of its own for every prompt."""
    vector = np.cos(np.arange(HIDDEN_SIZE) * (1 + sum(prompt)), dtype=np.float64) + (pooling == "last")
    return (3 * vector).astype(np.float32)


@dataclass
class FakeStream:
    """What `submit` returns: outputs that come as fast as the loop turns, or every ``pace`` seconds."""

    engine: "FakeEngine"
    prompt: Sequence[int]
    params: SamplingParams
    request_id: str
    order: Mapping[str, Any]
    """Priority, tenant, timeout and KV policy."""
    salt: str | None = None
    aborted: bool = False
    produced: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    evicted_tokens: int = 0
    kv_slots: int = 0
    queue_seconds: float | None = None

    def __post_init__(self) -> None:
        self.prompt_tokens = len(self.prompt)
        self.prompt_logprobs = [TokenLogprob(token, -2.0, ((65, -0.5),)) for token in self.prompt[1:]]
        self.embedding = None if self.params.pooling is None else embedding_of(self.prompt, self.params.pooling)
        self._outputs = self._all()
        self._end = asyncio.Event()

    def __aiter__(self) -> "FakeStream":
        return self

    async def __anext__(self) -> Output:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.engine.pace):
                await self._end.wait()
        if self.aborted:
            raise StopAsyncIteration
        if self.engine.fail_after is not None and self.produced >= self.engine.fail_after:
            self.engine.open.discard(self)
            raise self.engine.failure
        self.cached_tokens = len(self.prompt) // 16 * 16
        self.queue_seconds = 0.001
        self.produced += 1
        try:
            output = next(self._outputs)
        except StopIteration:
            self.engine.open.discard(self)
            raise StopAsyncIteration from None
        self.generated_tokens += len(output.token_ids)
        return output

    def abort(self) -> None:
        if self in self.engine.open:
            self.engine.open.discard(self)
            self.aborted = True
            self._end.set()
            self.engine.aborted.append(self)

    def __hash__(self) -> int:
        return id(self)

    def _all(self) -> Iterator[Output]:
        """Every continuation in turn, token by token: no two of a request's texts are equal."""
        running = [self._one(index) for index in range(self.params.n)]
        for outputs in itertools.zip_longest(*running):
            yield from (output for output in outputs if output is not None)

    def _one(self, index: int) -> Iterator[Output]:
        tokenizer = self.engine.tokenizer
        words = self.engine.words or f"{SENTENCE}{sum(self.prompt)}, {self.params.seed} or {index}."
        ids = tokenizer.encode(words, add_special_tokens=False)
        limit = self.params.max_tokens
        assert limit is not None
        if limit == 0:
            yield Output(index, "", (), finish_reason="length")
            return
        if self.params.ignore_eos:
            ids = list(itertools.islice(itertools.cycle(ids), limit))
        text = TextStream(tokenizer, self.params.stop)
        for position, token in enumerate(ids[:limit], start=1):
            piece = text.push(token, may_stop=True)
            last = position == min(limit, len(ids))
            reason = "stop" if piece.stop or (last and position == len(ids) < limit) else "length" if last else None
            rest = text.finish() if reason and not piece.stop else TextPiece("")
            stop = piece.stop or rest.stop
            yield Output(
                index, piece.text + rest.text, (token,), self._logprobs(token), "stop" if stop else reason, stop
            )
            if piece.stop:
                return

    def _logprobs(self, token: int) -> tuple[TokenLogprob, ...]:
        count = self.params.logprobs
        if count is None:
            return ()
        top = ((65, -0.5), (token, -1.5), (66, -math.inf), (67, -3.0), (68, -4.0))
        return (TokenLogprob(token, -1.5, top[:count]),)


@dataclass(eq=False)
class FakeEngine:
    """See `engine.async_engine.AsyncEngine`."""

    tokenizer: Tokenizer = field(default_factory=byte_tokenizer)
    model_name: str = "fake"
    max_model_len: int = 256
    hidden_size: int = HIDDEN_SIZE
    config: EngineConfig = field(default_factory=EngineConfig)
    default_sampling: Mapping[str, Any] = field(default_factory=dict)
    words: str | None = None
    """What it says instead of its usual sentence."""
    pace: float = 0.0
    fail_after: int | None = None
    failure: Exception = field(default_factory=lambda: OctavoError("a secret at /home/user"))
    healthy: bool = True
    ready: bool = True
    waiting: int = 0
    queued_tokens: int = 0
    open: set[FakeStream] = field(default_factory=set)
    aborted: list[FakeStream] = field(default_factory=list)
    submitted: list[FakeStream] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.grammars = GrammarCompiler(self.tokenizer, self.tokenizer.vocab_size)

    async def start(self) -> None:
        pass

    async def stop(self) -> None:
        self.grammars.close()
        for stream in list(self.open):
            stream.abort()

    def submit(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        request_id: str,
        cache_salt: str | None = None,
        **order: Any,
    ) -> FakeStream:
        if not self.healthy:
            raise EngineDeadError("the loop broke at /home/user")
        stream = FakeStream(self, prompt, params, request_id, order, salt=cache_salt)
        self.submitted.append(stream)
        self.open.add(stream)
        return stream

    def is_healthy(self) -> bool:
        return self.healthy

    def is_ready(self) -> bool:
        return self.ready

    def is_endless(self, policy: KVPolicy) -> bool:
        return isinstance(policy.budget(), Window)

    def slots_by_policy(self) -> Mapping[str, int]:
        return {"window": 12}

    def stats(self) -> SimpleNamespace:
        return SimpleNamespace(
            num_running=len(self.open),
            num_waiting=self.waiting,
            num_queued=self.waiting,
            num_queued_tokens=self.queued_tokens,
            kv_usage=0.25,
            host_kv_usage=0.5,
            used_blocks=4,
            num_blocks=16,
            block_size=16,
        )
