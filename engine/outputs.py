"""What the engine sends back for a request, piece by piece."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Self

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
    """What one step added to one of a request's ``n`` continuations, or the whole of one that was chosen at the end.

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

    @classmethod
    def joined(cls, index: int, pieces: Sequence[Self]) -> Self:
        """All of a continuation's outputs as one, under a new index."""
        return cls(
            index,
            "".join(piece.text for piece in pieces),
            tuple(chain.from_iterable(piece.token_ids for piece in pieces)),
            tuple(chain.from_iterable(piece.logprobs for piece in pieces)),
            pieces[-1].finish_reason,
            pieces[-1].stop_reason,
        )
