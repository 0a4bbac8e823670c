"""What every route needs at hand: the engine, the settings, and the checks that come before any work."""

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Self, TypeVar

from starlette.requests import Request

from engine.errors import InvalidRequestError
from engine.kv_policies.policy import KVPolicy
from server.body import Body, QueuedBody
from server.chat_template import ChatTemplate
from server.config import ServerConfig
from server.conversation import native_turns, plain_turns
from server.errors import ApiError
from server.kv_policy import choose_policy
from server.protocol import Message, TokenIds
from server.standing import Standing, Tenants, standing_of
from server.tool_format import ToolFormat
from server.tools import Tool

if TYPE_CHECKING:
    from engine.async_engine import AsyncEngine
    from server.metrics import Metrics

B = TypeVar("B", bound=Body)

_INLINE_CHARACTERS = 16384
"""Text up to this length is tokenized at once (about a millisecond); longer text in a thread, to hold up nobody."""
_INLINE_BYTES = 65536
"""Bodies up to this size are parsed at once."""
_MAX_CONTAINERS = 65536
"""Lists and objects in a body. Millions of them would take seconds to build, and no other thread runs meanwhile."""
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
"""A JSON string; one without an end reaches to the end, so that no input makes the search start over and over."""
_INLINE_IDS = 8192
"""Token ids that are checked or decoded at once."""
_INLINE_MESSAGES = 64
"""Messages that are put through the template at once."""


@dataclass
class Lifecycle:
    """The one thing that changes: whether the server is about to stop."""

    draining: bool = False


@dataclass(frozen=True)
class Serving:
    """Hangs on ``app.state.serving``."""

    engine: "AsyncEngine"
    config: ServerConfig
    metrics: "Metrics"
    model_names: tuple[str, ...]
    template: ChatTemplate | None
    tool_format: ToolFormat
    """How the model writes calls of tools."""
    tenants: Tenants
    created: int
    """Unix time of the start."""
    lifecycle: Lifecycle = field(default_factory=Lifecycle)

    @classmethod
    def of(cls, request: Request) -> Self:
        """The instance that belongs to the request's app."""
        serving = request.app.state.serving
        assert isinstance(serving, cls)
        return serving

    def model(self, name: str | None) -> str:
        """The name to answer with.

        Raises:
            ApiError: 404, the request asks for a model that is not served.
        """
        if name is None:
            return self.model_names[0]
        if name not in self.model_names:
            raise ApiError(404, f"The model {name!r} does not exist here.", param="model", code="model_not_found")
        return name

    def standing(self, request: Request, body: QueuedBody, arrival: float) -> Standing:
        """Where a request stands that came at ``arrival``, on the monotonic clock.

        Raises:
            InvalidRequestError: it has a priority, which this server's order of service does not know.
        """
        tenant = self.tenants.name(request.scope, body.user)
        return standing_of(body, tenant, scheduling=self.engine.config.scheduling, arrival=arrival)

    def kv_policy(self, body: QueuedBody) -> KVPolicy:
        """Which tokens of a request keep their KV.

        Raises:
            InvalidRequestError: it names a policy that is not allowed here.
        """
        return choose_policy(body.kv_policy, self.engine.config.kv_policy, self.config.kv_policy_allow)

    async def tokenize(
        self, prompts: Sequence[str | TokenIds], *, add_special_tokens: bool | None, param: str
    ) -> list[TokenIds]:
        """Token ids of each prompt of a request; these are all texts, or all ids already.

        Raises:
            InvalidRequestError: an id does not exist, or a text is so long that it cannot fit.
        """
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        if texts:
            return await self.encode(texts, add_special_tokens=add_special_tokens is not False, param=param)
        ids = [prompt for prompt in prompts if not isinstance(prompt, str)]
        await self.check_prompts(ids, param)
        return ids

    async def encode(self, texts: Sequence[str], *, add_special_tokens: bool, param: str) -> list[TokenIds]:
        """Token ids of each text.

        Raises:
            InvalidRequestError: a text is so long that it cannot fit.
        """

        def work() -> list[TokenIds]:
            return [self.engine.tokenizer.encode(text, add_special_tokens=add_special_tokens) for text in texts]

        length = max(map(len, texts), default=0)
        if length > _INLINE_CHARACTERS and length > self._longest_token * self.engine.max_model_len:
            raise InvalidRequestError(
                f"the text of {length} characters has more than {self.engine.max_model_len} tokens, "
                "the model's context length",
                param=param,
                code="context_length_exceeded",
            )
        if sum(map(len, texts)) <= _INLINE_CHARACTERS:
            return work()
        return await asyncio.to_thread(work)

    async def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool | None,
        variables: dict[str, Any] | None,
        tools: Sequence[Tool] = (),
    ) -> TokenIds:
        """Token ids of a conversation. The template writes the special tokens, so none are added.

        Raises:
            ApiError, InvalidRequestError: 400, the model has no template, or it refuses the conversation.
        """
        if self.template is None:
            raise ApiError(400, "This model has no chat template; use /v1/completions.", code="no_chat_template")
        native = self.template.knows_tools
        render = partial(
            self.template.render,
            native_turns(messages) if native else plain_turns(messages, tools, self.tool_format),
            add_generation_prompt=add_generation_prompt is not False,
            variables=variables,
            tools=[tool.described() for tool in tools],
        )
        characters = sum(len(message.content or "") for message in messages)
        large = characters > _INLINE_CHARACTERS or len(messages) > _INLINE_MESSAGES
        text = await asyncio.to_thread(render) if large else render()
        return (await self.encode([text], add_special_tokens=False, param="messages"))[0]

    async def decode(self, prompts: Sequence[TokenIds], *, skip_special_tokens: bool = True) -> list[str]:
        """The text of each list of token ids, which exist."""

        def work() -> list[str]:
            decode = self.engine.tokenizer.decode
            return [decode(prompt, skip_special_tokens=skip_special_tokens) for prompt in prompts]

        return await asyncio.to_thread(work) if sum(map(len, prompts)) > _INLINE_IDS else work()

    async def check_prompts(self, prompts: Sequence[TokenIds], param: str) -> None:
        """Check that the token ids of all prompts exist.

        Raises:
            InvalidRequestError: one does not.
        """

        def work() -> None:
            for prompt in prompts:
                self.check_ids(prompt, param)

        await asyncio.to_thread(work) if sum(map(len, prompts)) > _INLINE_IDS else work()

    def check_ids(self, ids: Sequence[int], param: str) -> None:
        """Check that token ids exist.

        Raises:
            InvalidRequestError: one does not.
        """
        size = self.engine.tokenizer.vocab_size
        if ids and not (min(ids) >= 0 and max(ids) < size):
            raise InvalidRequestError(f"{param}: token ids must be from 0 to {size - 1}", param=param)

    def room(
        self, prompts: Sequence[TokenIds], max_tokens: int | None, param: str, *, policy: KVPolicy, num_made: int = 1
    ) -> int:
        """The tokens that the longest prompt leaves for each of the ``num_made`` continuations in the context length.

        Raises:
            InvalidRequestError: a prompt is empty, or does not fit with ``max_tokens`` (None: with one) more; or the
                policy lets the request go beyond, and it asks for more than anyone may.
        """
        limit = self.engine.max_model_len
        lengths = [len(prompt) for prompt in prompts]
        if not all(lengths):
            raise InvalidRequestError("a prompt must have at least one token", param=param)
        room = limit - max(lengths)
        wanted = 1 if max_tokens is None else max_tokens
        if max_tokens is not None and max_tokens > room >= 0 and self.engine.is_endless(policy):
            self._check_stream(max_tokens * len(prompts) * num_made)
        elif wanted > room:
            raise InvalidRequestError(
                f"the model's context length is {limit} tokens; the request has {max(lengths)} in its prompt "
                f"and asks for {wanted} more",
                param=param,
                code="context_length_exceeded",
            )
        return room

    def _check_stream(self, wanted: int) -> None:
        if wanted > self.config.max_stream_tokens:
            raise InvalidRequestError(
                f"max_tokens: {wanted} output tokens in all are more than the {self.config.max_stream_tokens} that a "
                "request which runs past the model's context length may have here",
                param="max_tokens",
            )

    @cached_property
    def _longest_token(self) -> int:
        vocabulary: dict[str, int] = self.engine.tokenizer.backend.get_vocab()
        return max(map(len, vocabulary), default=1)


async def read_body(request: Request, kind: type[B]) -> B:
    """Read and check a request's JSON body.

    Raises:
        ApiError: 413 too large, 415 not JSON by its own account, 400 of too many parts.
        pydantic.ValidationError, InvalidRequestError: not what ``kind`` takes.
    """
    content_type = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if content_type != "application/json" and not content_type.endswith("+json"):
        raise ApiError(415, "The body must be JSON, with the header 'Content-Type: application/json'.")
    serving = Serving.of(request)
    limit = serving.config.max_body_size
    too_large = ApiError(413, f"The body is larger than {limit} bytes.", code="body_too_large")
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length[:20]) > limit:
        raise too_large
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > limit:
            raise too_large
    parse = partial(_parse, kind, bytes(body), serving.engine.max_model_len)
    return await asyncio.to_thread(parse) if len(body) > _INLINE_BYTES else parse()


def _parse(kind: type[B], body: bytes, max_model_len: int) -> B:
    if _num_containers(body) > _MAX_CONTAINERS and _num_containers(_STRING.sub(b"", body)) > _MAX_CONTAINERS:
        raise ApiError(400, f"The body has more than {_MAX_CONTAINERS} lists and objects.")
    return kind.model_validate_json(body, context={"max_model_len": max_model_len})


def _num_containers(json: bytes) -> int:
    """Lists and objects in it, and the brackets and braces in its strings."""
    return json.count(b"[") + json.count(b"{")
