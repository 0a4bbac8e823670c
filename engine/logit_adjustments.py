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
        seen = torch.tensor(row.tokens, dtype=torch.int64, device=logits.device).unique()
        values = logits[seen]
        scaled = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
        logits[seen] = scaled.clamp(-1e30, 1e30)  # a tiny penalty must not make infinities
    if (params.presence_penalty or params.frequency_penalty) and row.num_output_tokens:
        # OpenAI: over the output alone.
        output = torch.tensor(row.tokens[row.num_prompt_tokens :], dtype=torch.int64, device=logits.device)
        seen, counts = output.unique(return_counts=True)
        logits[seen] -= params.presence_penalty + params.frequency_penalty * counts
    if params.logit_bias:
        ids = torch.tensor(list(params.logit_bias), dtype=torch.int64, device=logits.device)
        logits[ids] += torch.tensor(list(params.logit_bias.values()), device=logits.device)
    if row.num_output_tokens < params.min_tokens and row.stop_token_ids:
        logits[torch.tensor(sorted(row.stop_token_ids), device=logits.device)] = -torch.inf
