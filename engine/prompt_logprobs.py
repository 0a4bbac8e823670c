"""How likely a prompt's own tokens are: wanted by who scores texts instead of having them continued."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from engine.outputs import TokenLogprob
from scheduler.batch import ScheduledSequence

_ROWS_AT_ONCE = 256
"""Bounds the copy in float32: 256 rows of 49,152 tokens are 50 MB."""


def score_prompts(
    logits: Tensor, items: Sequence[ScheduledSequence], counts: Mapping[str, int]
) -> dict[int, list[TokenLogprob]]:
    """The log-probabilities of the prompt tokens that follow the step's, by item, for those items that are scored.

    logits [S, vocab] are the rows of all scored positions, item by item. ``counts`` by request id say how many of the
    most likely tokens are wanted besides.
    """
    scores: dict[int, list[TokenLogprob]] = {}
    row = 0
    for index, item in enumerate(items):
        if item.num_scored:
            first = item.start + 1
            following = item.sequence.tokens[first : first + item.num_scored].tolist()
            rows = logits[row : row + item.num_scored]
            scores[index] = _score(rows, following, counts[item.sequence.request.request_id])
            row += item.num_scored
    return scores


def _score(logits: Tensor, tokens: Sequence[int], count: int) -> list[TokenLogprob]:
    """One token for each row of logits [N, vocab], and the ``count`` best."""
    found: list[TokenLogprob] = []
    for first in range(0, len(tokens), _ROWS_AT_ONCE):
        part = tokens[first : first + _ROWS_AT_ONCE]
        logprobs = logits[first : first + len(part)].float().log_softmax(dim=-1)
        own = logprobs.gather(1, torch.tensor(part, device=logits.device).unsqueeze(1)).squeeze(1).tolist()
        best = logprobs.topk(min(count, logits.shape[-1]), dim=-1)
        for token, logprob, ids, values in zip(part, own, best.indices.tolist(), best.values.tolist(), strict=True):
            found.append(TokenLogprob(token, logprob, tuple(zip(ids, values, strict=True))))
    return found
