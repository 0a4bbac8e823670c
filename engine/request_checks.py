"""From what a client asks of the engine to a request that the scheduler can serve, or a refusal in words."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from engine.engine_info import EngineInfo
from engine.errors import InvalidRequestError
from engine.kv_policies.fit import budget_refusal, fitted
from engine.kv_policies.policy import KVPolicy
from engine.prompt_outputs import observed_positions
from engine.sampling_params import SamplingParams
from engine.tokenizer import Tokenizer
from scheduler.kv_budget import KVBudget, Window
from scheduler.request import Request, StopRule
from scheduler.scheduler import Scheduler

_LONGEST = 2**31 - 1
"""Tokens of a sequence whose KV is limited, at most."""


def is_endless(policy: KVPolicy) -> bool:
    """Whether a request under the policy may go on past the context length.

    It may where no query is farther from a key that it sees than a window reaches.
    """
    return isinstance(policy.budget(), Window)


@dataclass(frozen=True, slots=True)
class RequestChecks:
    """Knows what the model, its tokenizer and the memory can do."""

    _info: EngineInfo
    _tokenizer: Tokenizer
    _scheduler: Scheduler

    def request(
        self, prompt: Sequence[int], params: SamplingParams, policy: KVPolicy, request_id: str, **options: Any
    ) -> Request:
        """What the scheduler is to serve; ``options`` are further ones of `Request`.

        Raises InvalidRequestError if it can never be served.
        """
        self._check_prompt(prompt)
        budget = self.budget(policy)
        if params.n < 1:
            raise InvalidRequestError("n must be at least 1", param="n")
        if params.width < params.n:
            raise InvalidRequestError(f"best_of must be at least n ({params.n})", param="best_of")
        if params.logprobs is not None and not 0 <= params.logprobs <= self._info.vocab_size:
            raise InvalidRequestError(f"logprobs must be from 0 to {self._info.vocab_size}", param="logprobs")
        max_tokens = self._max_tokens(len(prompt), params.max_tokens, endless=is_endless(policy))
        least = 1 if params.ranked or params.beams is not None else 0
        if max_tokens < least:
            raise InvalidRequestError(f"max_tokens must be at least {least}", param="max_tokens")
        if params.pooling is not None and params.prompt_logprobs is not None:
            raise InvalidRequestError("a prompt is either scored or pooled", param="pooling")
        if params.min_tokens > max_tokens:
            raise InvalidRequestError(f"min_tokens is more than max_tokens ({max_tokens})", param="min_tokens")
        if params.grammar is not None and params.beams is not None:
            raise InvalidRequestError("a beam search cannot follow a grammar", param="use_beam_search")
        self._check_ids(params.logit_bias, "logit_bias")
        self._check_ids(params.stop_token_ids, "stop_token_ids")
        for places, param in ((1, "max_tokens"), (params.width, "n" if params.best_of is None else "best_of")):
            refusal = self._scheduler.config.refusal(len(prompt) + max_tokens, places, budget)
            if refusal is not None:
                raise InvalidRequestError(refusal, param=param)
        eos = () if params.ignore_eos else self._tokenizer.eos_token_ids
        # A file may name ids that its model does not have: those cannot be sampled, nor forbidden.
        stops = {token for token in eos if token < self._info.vocab_size}.union(params.stop_token_ids)
        rule = StopRule(max_tokens=max_tokens, min_tokens=params.min_tokens, stop_token_ids=frozenset(stops))
        beam_width = None if params.beams is None else params.width
        return Request(
            request_id,
            prompt,
            rule,
            n=params.width,
            beam_width=beam_width,
            kv_budget=budget,
            observed=observed_positions(params, len(prompt)),
            **options,
        )

    def budget(self, policy: KVPolicy) -> KVBudget | None:
        """What a request under the policy may hold; None: all. Raises InvalidRequestError if this model cannot."""
        try:
            budget = policy.budget()
        except ValueError as error:
            raise InvalidRequestError(str(error), param="kv_policy") from None
        refusal = None if budget is None else budget_refusal(budget, self._info)
        if refusal is not None:
            raise InvalidRequestError(refusal, param="kv_policy")
        return fitted(budget, self._info.windows)

    def _max_tokens(self, num_prompt: int, wanted: int | None, *, endless: bool) -> int:
        """Output tokens at most. What holds no more KV than its budget may go on past the context length."""
        room = self._info.max_model_len - num_prompt
        if endless:
            return max(room, 1) if wanted is None else min(wanted, _LONGEST - num_prompt)
        if room < (1 if wanted is None else wanted):
            asked = "" if wanted is None else f" and {wanted} output tokens were asked for"
            raise InvalidRequestError(
                f"the model's context length is {self._info.max_model_len} tokens; the prompt has {num_prompt}{asked}",
                param="prompt",
                code="context_length_exceeded",
            )
        return room if wanted is None else wanted

    def _check_prompt(self, prompt: Sequence[int]) -> None:
        if not prompt:
            raise InvalidRequestError("the prompt is empty", param="prompt")
        self._check_ids((min(prompt), max(prompt)), "prompt")

    def _check_ids(self, ids: Iterable[int], param: str) -> None:
        for token in ids:
            if not 0 <= token < self._info.vocab_size:
                raise InvalidRequestError(
                    f"token id {token} is outside the vocabulary of {self._info.vocab_size}", param=param
                )
