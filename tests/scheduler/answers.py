"""Answers that are functions of their prompts alone: what a history must bring out, however it is scheduled."""

from scheduler.request import FinishReason, Request, Sequence
from tests.scheduler.memory import sample

Past = tuple[int, ...]
"""A beam's tokens, its prompt's included."""


def ends_by_text(sequence: Sequence) -> bool:
    """Whether its text, which only an engine would know, now ends with a stop string."""
    output = sequence.tokens[sequence.request.num_prompt_tokens :]
    return len(output) > 1 and (output[-1] + 3 * output[-2]) % 17 == 0


def next_beams(beams: list[Past], width: int) -> list[tuple[int, int]]:
    """A search that knows nothing of likelihood: (parent, token) of the beams that go on, none if it is over."""
    chance = sum((number + 2) * token for number, past in enumerate(beams) for token in past[-3:]) + len(beams[0])
    if chance % 13 == 0:
        return []
    count = width if chance % 3 else 1 + chance % width
    return [((chance + number) // 2 % len(beams), number) for number in range(count)]


def check_answer(sequence: Sequence) -> None:
    """Raise AssertionError unless it says, as far as it goes, what its prompt calls for, and ends where it must."""
    request = sequence.request
    own = Request("own", sequence.tokens[: request.num_prompt_tokens], request.stop).sequences[0]
    reason: FinishReason | None = "length" if request.stop.max_tokens == 0 else None
    while reason is None:
        first = own.num_output_tokens == 0  # all continuations' first tokens are drawn at once, after the prompt
        own.tokens.append(sample(own, request.n)[sequence.index] if first else sample(own, 1)[0])
        own.index = sequence.index
        reason = request.stop.finish_reason(own.num_output_tokens, own.tokens[-1])
        reason = "stop" if reason is None and ends_by_text(own) else reason
    if sequence.finish_reason in ("stop", "length"):
        assert (sequence.tokens, sequence.finish_reason) == (own.tokens, reason)
    else:
        assert sequence.num_tokens < own.num_tokens or request.stop.max_tokens == 0
        assert sequence.tokens == own.tokens[: sequence.num_tokens]


def check_search(request: Request, found: list[Past]) -> None:
    """Raise AssertionError unless a beam search that came to its end has found what its prompt calls for."""
    assert request.beam_width is not None
    beams = [found[0][: request.num_prompt_tokens]]
    for _ in range(request.stop.max_tokens - 1):
        choices = next_beams(beams, request.beam_width)
        if not choices:
            break
        beams = [(*beams[parent], token) for parent, token in choices]
    assert found == beams
