"""From a request's fields to the engine's sampling parameters."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from engine.beam_search import BeamParams
from engine.errors import InvalidRequestError
from engine.grammar import Grammar
from engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from server.protocol import SamplingBody
    from server.serving import Serving

_DEFAULTED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_OPTIONAL = ("seed", "presence_penalty", "frequency_penalty", "min_tokens", "ignore_eos")


def with_defaults(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """What was given (None counts as not), and for the rest of what a checkpoint may recommend, the ``defaults``."""
    fields = {name: defaults[name] for name in _DEFAULTED if defaults.get(name) is not None}
    fields |= {name: value for name, value in given.items() if value is not None}
    if "top_k" in fields:
        fields["top_k"] = max(fields["top_k"], 0)  # -1 is another way to keep all
    return fields


def sampling_params(
    body: "SamplingBody",
    serving: "Serving",
    *,
    max_tokens: int,
    logprobs: int | None,
    prompt_logprobs: int | None = None,
    grammar: Grammar | None = None,
) -> SamplingParams:
    """The parameters that a request asks for; what it leaves open comes from the checkpoint, then from OpenAI.

    Raises:
        InvalidRequestError: a token id does not exist, or more tokens are demanded than allowed.
    """
    bias = body.logit_bias or {}
    stop_ids = body.stop_token_ids or []
    serving.check_ids(list(bias), "logit_bias")
    serving.check_ids(stop_ids, "stop_token_ids")
    if (body.min_tokens or 0) > max_tokens:
        raise InvalidRequestError(f"min_tokens must be at most {max_tokens} here", param="min_tokens")
    beams = _beams(body) if body.use_beam_search else None
    given = {name: getattr(body, name) for name in (*_DEFAULTED, *_OPTIONAL)}
    return SamplingParams(
        n=body.n or 1,
        best_of=body.best_of,
        beams=beams,
        grammar=grammar,
        max_tokens=max_tokens,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        logit_bias=bias,
        stop=tuple(body.stop),
        stop_token_ids=tuple(stop_ids),
        **with_defaults(given, serving.engine.default_sampling if beams is None else {}),
    )


def _beams(body: "SamplingBody") -> BeamParams:
    given = {name: getattr(body, name) for name in ("length_penalty", "early_stopping")}
    return BeamParams(**{name: value for name, value in given.items() if value is not None})
