"""A conversation that is being answered, whichever endpoint it came by."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from engine.errors import InvalidRequestError
from engine.outputs import TokenLogprob
from engine.sampling_params import SamplingParams
from server.generation import Generation
from server.logprobs import chat_logprobs
from server.protocol import ChatRequest
from server.sampling import sampling_params
from server.standing import Standing
from server.structured_output import compiled
from server.tool_use import ToolUse

if TYPE_CHECKING:
    from server.serving import Serving


@dataclass(frozen=True)
class ChatJob:
    """One request, checked and with its engine at work."""

    body: ChatRequest
    serving: "Serving"
    params: SamplingParams
    generation: Generation
    tools: ToolUse | None

    @classmethod
    async def start(cls, body: ChatRequest, serving: "Serving", standing: Standing, response_id: str) -> Self:
        """Put the conversation into tokens and hand it to the engine.

        Raises:
            ApiError, OctavoError: it cannot be served, or not now.
        """
        policy = serving.kv_policy(body)
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
        room = serving.room([prompt], wanted, "messages", policy=policy, num_made=body.num_made)
        grammar = await compiled(serving.engine, demands)
        params = sampling_params(
            body,
            serving,
            max_tokens=room if wanted is None else wanted,
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            grammar=grammar,
        )
        generation = Generation.submit(
            serving, [prompt], params, standing, kv_policy=policy, cache_salt=body.cache_salt, request_id=response_id
        )
        return cls(body, serving, params, generation, tools)

    @property
    def choices(self) -> int:
        """How many answers are wanted."""
        return self.body.n or 1

    def logprobs(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        """The log-probabilities of some tokens, if they are asked for."""
        if not self.body.logprobs:
            return None
        return chat_logprobs(self.serving.engine.tokenizer, tokens, self.body.top_logprobs or 0)
