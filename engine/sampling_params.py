"""What one request asks of the sampler, and when it wants to stop."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from engine.beam_search import BeamParams
from engine.grammar import Grammar

Pooling = Literal["mean", "last"]
"""How a prompt's hidden states become one vector: their mean, or that of its last token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Immutable and already validated for type; ranges that depend on the model are checked by the engine.

    The names are OpenAI's, and for its extensions those that vLLM made common.
    """

    n: int = 1
    """How many continuations of the prompt come out."""
    best_of: int | None = None
    """How many are made, all sharing the prompt's KV blocks; None: ``n``. Of more than ``n`` those come out whose
    log-probability per token, under the model's raw distribution, is highest: whole, at the end, best first."""
    max_tokens: int | None = None
    """Output tokens at most; None means as many as the context length leaves. 0 samples nothing: the request ends when
    its prompt is computed, each of ``n`` continuations with one empty output."""
    min_tokens: int = 0
    """Before this many output tokens neither EOS nor a stop token may be sampled, and no stop string ends the text."""

    temperature: float = 1.0
    """0 is greedy."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probability reaches p (nucleus sampling)."""
    min_p: float = 0.0
    """Keep tokens at least this fraction as likely as the most likely one."""
    seed: int | None = None
    """With the same seed, prompt and parameters the same tokens come out, whatever else is in the batch."""

    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    stop: tuple[str, ...] = ()
    """Text that ends the output; it is never part of the text."""
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    """None: no log-probabilities. k: those of the sampled token and of the k most likely ones."""
    prompt_logprobs: int | None = None
    """None: none. k: those of each prompt token but the first, and of the k most likely ones in its place. The whole
    prompt is computed then; nothing of it comes from the prefix cache."""
    pooling: Pooling | None = None
    """None: none. Else one vector for the prompt, of the states that the model's head reads. For a mean the whole
    prompt is computed, too. Not together with ``prompt_logprobs``."""

    grammar: Grammar | None = None
    """What the text must match, from its first token to its last. It ends with "stop" as soon as nothing may follow,
    also before ``min_tokens``; max_tokens and stop strings may end it earlier. Not together with ``beams``."""

    beams: BeamParams | None = None
    """Search for the ``n`` most likely outputs with ``best_of`` beams instead of sampling them: the fields from
    temperature to logit_bias and the stop strings then mean nothing, and all output comes at the end."""

    @property
    def greedy(self) -> bool:
        """Whether no token is left to chance."""
        return self.temperature == 0.0 or self.beams is not None

    @property
    def width(self) -> int:
        """How many continuations, or beams, are made."""
        return self.n if self.best_of is None else self.best_of

    @property
    def ranked(self) -> bool:
        """Whether sampled continuations compete, so that the log-probability of every token counts."""
        return self.beams is None and self.width > self.n
