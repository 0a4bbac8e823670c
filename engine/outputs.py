"""What the engine sends back for a request, piece by piece."""

from dataclasses import dataclass

from scheduler.request import FinishReason


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A sampled token's log-probability (natural log, of the model's raw distribution), and the best alternatives'."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    """(token id, log-probability), most likely first."""


@dataclass(frozen=True, slots=True)
class Output:
    """What one step added to one of a request's ``n`` continuations.

    ``text`` never holds part of a UTF-8 character nor of a stop string, so it can lag behind ``token_ids``; the
    concatenation of all ``text`` is the whole answer. ``finish_reason`` is set on a continuation's last output only.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    """The stop token id or stop string that ended it; None for EOS and length."""
