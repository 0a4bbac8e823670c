"""What a request changes about its logits before a token is chosen: bias, penalties, tokens forbidden for now."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from engine.sampler import SampleRow


def adjust(logits: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    """logits [R, vocab] → the same tensor if no row wants a change, else a changed float32 copy."""
    changed = [index for index, row in enumerate(rows) if _wants_change(row)]
    if not changed:
        return logits
    logits = logits.float() if logits.dtype != torch.float32 else logits.clone()
    for index in changed:
        _adjust_row(logits[index], rows[index])
    return logits


def _wants_change(row: SampleRow) -> bool:
    params = row.params
    penalized = params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0
    return bool(params.logit_bias or penalized or row.num_output_tokens < params.min_tokens)


def _adjust_row(logits: Tensor, row: SampleRow) -> None:
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
        logits[torch.tensor(sorted(row.stop_token_ids), device=logits.device)] = -torch.inf


def _counts(row: SampleRow, first: int, logits: Tensor) -> Tensor:
    """[vocab] int64: how often each token occurs among the row's from ``first`` on, of which there is one at least.

    Read where they lie: a stream may have a million, and turning those into Python integers takes longer than a step.
    """
    tokens = torch.frombuffer(row.tokens, dtype=torch.int32, offset=first * row.tokens.itemsize)
    return tokens.bincount(minlength=len(logits)).to(logits.device)
