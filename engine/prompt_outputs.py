"""What a prompt's own positions give: how likely its tokens are, or its hidden states pooled into one vector.

Wanted by who scores or compares texts instead of having them continued.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import islice

import torch
from torch import Tensor

from engine.outputs import TokenLogprob
from engine.sampling_params import SamplingParams
from scheduler.batch import ScheduledSequence

_ROWS_AT_ONCE = 256
"""Bounds the logits in float32: 256 rows of 49,152 tokens are 50 MB."""

PromptOutput = list[TokenLogprob] | Tensor
"""Of the positions that a step observed: how likely the tokens behind them are, or the sum of their hidden states."""


def observed_positions(params: SamplingParams, num_prompt_tokens: int) -> range:
    """The prompt's positions whose outputs a request needs."""
    if params.prompt_logprobs is not None:
        return range(num_prompt_tokens - 1)
    match params.pooling:
        case "mean":
            return range(num_prompt_tokens)
        case "last":
            return range(num_prompt_tokens - 1, num_prompt_tokens)
        case None:
            return range(0)


def read_prompts(
    states: Tensor,
    head: Callable[[Tensor], Tensor],
    items: Sequence[ScheduledSequence],
    params: Mapping[str, SamplingParams],
) -> dict[int, PromptOutput]:
    """What the observed positions of a step give, by item; sums [hidden] are float64, on the CPU.

    states [S, hidden] are those of all observed positions, item by item; ``head`` makes logits [N, vocab] of some.
    ``params`` are those of their requests, by id.
    """
    pooled: dict[int, Tensor] = {}
    scored: dict[int, int] = {}
    parts: list[Tensor] = []
    tokens: list[int] = []
    counts: list[int] = []
    row = 0
    for index, item in enumerate(items):
        if not item.observed:
            continue
        own = states[row : row + len(item.observed)]
        row += len(own)
        wanted = params[item.sequence.request.request_id]
        if wanted.prompt_logprobs is None:
            pooled[index] = own.sum(dim=0, dtype=torch.float64)
            continue
        scored[index] = len(own)
        parts.append(own)
        tokens += item.sequence.tokens[item.observed.start + 1 : item.observed.stop + 1]
        counts += [wanted.prompt_logprobs] * len(own)
    outputs: dict[int, PromptOutput] = {}
    if pooled:
        outputs.update(zip(pooled, torch.stack([*pooled.values()]).cpu(), strict=True))
    if scored:
        scores = iter(_score(states if not pooled else torch.cat(parts), head, tokens, counts))
        outputs.update({index: list(islice(scores, count)) for index, count in scored.items()})
    return outputs


def is_broken(output: PromptOutput) -> bool:
    """Whether the model gave no numbers."""
    if isinstance(output, Tensor):
        return not bool(output.isfinite().all())
    return any(math.isnan(one.logprob) for one in output)


def _score(
    states: Tensor, head: Callable[[Tensor], Tensor], tokens: Sequence[int], counts: Sequence[int]
) -> list[TokenLogprob]:
    """For each row of states [N, hidden] how likely its one of ``tokens`` is, and its one of ``counts`` best."""
    found: list[TokenLogprob] = []
    for first in range(0, len(tokens), _ROWS_AT_ONCE):
        part = tokens[first : first + _ROWS_AT_ONCE]
        wanted = counts[first : first + _ROWS_AT_ONCE]
        logprobs = head(states[first : first + _ROWS_AT_ONCE]).float().log_softmax(dim=-1)
        own = logprobs.gather(1, torch.tensor(part, device=logprobs.device).unsqueeze(1)).squeeze(1).tolist()
        best = logprobs.topk(min(max(wanted), logprobs.shape[-1]), dim=-1)
        ids, values = best.indices.tolist(), best.values.tolist()
        for row, (token, logprob, count) in enumerate(zip(part, own, wanted, strict=True)):
            top = tuple(zip(ids[row][:count], values[row][:count], strict=True))
            found.append(TokenLogprob(token, logprob, top))
    return found
