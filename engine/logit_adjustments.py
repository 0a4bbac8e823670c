"""What a request changes about its logits before a token is chosen: bias, penalties, what is forbidden here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from engine.sampler import SampleRow


def adjust(logits: Tensor, rows: Sequence[SampleRow], allowed: Mapping[int, Tensor]) -> Tensor:
    """logits [R, vocab] → the same tensor if no row wants a change, else a changed float32 copy.

    ``allowed`` by row, [vocab] bool each: the tokens that a grammar leaves.
    """
    changed = [index for index, row in enumerate(rows) if index in allowed or _wants_change(row)]
    if not changed:
        return logits
    logits = logits.float() if logits.dtype != torch.float32 else logits.clone()
    for index in changed:
        _adjust_row(logits[index], rows[index], allowed.get(index))
    return logits


def _wants_change(row: SampleRow) -> bool:
    params = row.params
    penalized = params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0
    return bool(params.logit_bias or penalized or row.num_output_tokens < params.min_tokens)


def _adjust_row(logits: Tensor, row: SampleRow, allowed: Tensor | None) -> None:
    """Change logits [vocab] in place."""
    params = row.params
    if params.repetition_penalty != 1.0:
        # Keskar et al. 2019 (CTRL), §4.1, over prompt and output; negative logits are multiplied so that both fall.
        seen = _counts(row, 0, logits).nonzero().squeeze(1)
        values = logits[seen]
        scaled = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
        logits[seen] = scaled.clamp(-1e30, 1e30)  # a tiny penalty must not make infinities
    if (params.presence_penalty or params.frequency_penalty) and row.num_output_tokens:
        # OpenAI: over the output alone.
        counts = _counts(row, row.num_prompt_tokens, logits)
        logits -= params.presence_penalty * (counts > 0) + params.frequency_penalty * counts
    if params.logit_bias:
        ids = torch.tensor(list(params.logit_bias), dtype=torch.int64, device=logits.device)
        logits[ids] += torch.tensor(list(params.logit_bias.values()), device=logits.device)
    if row.num_output_tokens < params.min_tokens and row.stop_token_ids:
        logits[_early_stops(row, allowed, logits.device)] = -torch.inf
    if allowed is not None:
        logits.masked_fill_(~allowed, -torch.inf)


def _early_stops(row: SampleRow, allowed: Tensor | None, device: torch.device) -> Tensor:
    """The ids that would end the row before ``min_tokens``; none if its grammar leaves nothing else."""
    stops = torch.tensor(sorted(row.stop_token_ids), device=device)
    if allowed is not None and allowed.sum() == allowed[stops].sum():
        return stops[:0]
    return stops


def _counts(row: SampleRow, first: int, logits: Tensor) -> Tensor:
    """[vocab] int64: how often each token occurs among the row's from ``first`` on, of which there is one at least.

    Read where they lie: a stream may have a million, and turning those into Python integers takes longer than a step.
    """
    tokens = torch.frombuffer(row.tokens, dtype=torch.int32, offset=first * row.tokens.itemsize)
    return tokens.bincount(minlength=len(logits)).to(logits.device)
