"""From logits to tokens: each row by its own request's parameters, all rows of a step together.

Order of operations: logit bias, penalties and forbidden tokens on the logits; then temperature, top-k, top-p (over what
top-k left, renormalized) and min-p; then one draw. It is the order of transformers' generation processors.
"""

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from types import MappingProxyType

import torch
from torch import Tensor

from engine.beam_search import Candidate
from engine.grammar_matcher import GrammarMatcher
from engine.logit_adjustments import adjust
from engine.outputs import TokenLogprob
from engine.sampling_params import SamplingParams

_CANDIDATES = 1024
"""Filtering sorts this many most likely tokens first; a row that they do not decide is sorted whole."""


@dataclass(frozen=True, slots=True)
class SampleRow:
    """Whose token a row of logits decides."""

    params: SamplingParams
    seed: int
    """The continuation's own: with the position it decides the draw, so that batching and preemption do not."""
    tokens: "array[int]"
    """Prompt and output so far, of 32 bits each."""
    num_prompt_tokens: int
    stop_token_ids: frozenset[int]
    """What ends the sequence, and may not be sampled before ``min_tokens``."""
    num_candidates: int = 0
    """For a beam: how many of the most likely tokens are wanted, instead of one drawn."""
    matcher: GrammarMatcher | None = None
    """Where the continuation stands in its grammar, if it has one."""

    @property
    def num_output_tokens(self) -> int:
        """Tokens sampled so far."""
        return len(self.tokens) - self.num_prompt_tokens

    def uniform(self) -> float:
        """The draw in [0, 1) that decides this row's token: a hash of seed and position, equal on every machine."""
        digest = blake2b(self.seed.to_bytes(16, "little") + len(self.tokens).to_bytes(8, "little"), digest_size=8)
        return (int.from_bytes(digest.digest(), "little") >> 11) * 2.0**-53


@dataclass(frozen=True, slots=True)
class Sample:
    """A sampled token, with its log-probability if that was asked for or decides which continuations are best."""

    token: int
    logprob: TokenLogprob | None = None
    candidates: tuple[Candidate, ...] = ()
    """For a beam: its most likely next tokens, most likely first, under the model's raw distribution."""
    broken: bool = False
    """Whether the logits hold no number to go by: a NaN, infinity, or nothing that may be sampled."""


def sample(
    logits: Tensor, rows: Sequence[SampleRow], allowed: Mapping[int, Tensor] = MappingProxyType({})
) -> list[Sample]:
    """logits [R, vocab] of any float dtype, one row each; they are not changed.

    ``allowed`` holds, for the rows with a grammar, [vocab] bool: the only tokens that may come out.
    """
    raw = logits
    if any(not row.params.greedy for row in rows):
        logits = logits.float()
    logits = adjust(logits, rows, allowed)
    # Not argmax: on CPUs that takes 2.7 ms for 32 rows of 49,152 bfloat16 logits, max 0.5 ms.
    best = logits.max(dim=-1)  # NaN where any is
    tokens: list[int] = best.indices.tolist()
    broken = (~best.values.isfinite()).tolist()
    random = [index for index, row in enumerate(rows) if not row.params.greedy]
    # Each kind of row is drawn in its own way whatever its neighbours are, or a seed would not decide its token.
    for draw, filtered in ((_draw, False), (_draw_filtered, True)):
        chosen = [index for index in random if _is_filtered(rows[index].params) == filtered]
        if chosen:
            for index, token in zip(chosen, draw(_take(logits, chosen), [rows[i] for i in chosen]), strict=True):
                tokens[index] = token
    logprobs, candidates = _logprobs(raw, rows, tokens), _best(raw, rows)
    return [
        Sample(token, logprobs.get(index), candidates.get(index, ()), broken[index])
        for index, token in enumerate(tokens)
    ]


def _draw(logits: Tensor, rows: Sequence[SampleRow]) -> list[int]:
    """One token for each row of float32 logits [R, vocab], from all tokens."""
    tokens: list[int] = _pick(_scaled(logits, rows).softmax(dim=-1), _uniform(rows, logits)).tolist()
    return tokens


def _draw_filtered(logits: Tensor, rows: Sequence[SampleRow]) -> list[int]:
    """One token for each row of float32 logits [R, vocab], from those that its filters keep."""
    scaled, uniform, vocab = _scaled(logits, rows), _uniform(rows, logits), logits.shape[-1]
    tokens, decided = _draw_among(scaled, rows, uniform, min(_CANDIDATES, vocab))
    undecided = [index for index, ok in enumerate(decided) if not ok]
    if undecided:
        redrawn, _ = _draw_among(scaled[undecided], [rows[i] for i in undecided], uniform[undecided], vocab)
        for index, token in zip(undecided, redrawn, strict=True):
            tokens[index] = token
    return tokens


def _draw_among(scaled: Tensor, rows: Sequence[SampleRow], uniform: Tensor, count: int) -> tuple[list[int], list[bool]]:
    """Draw from the ``count`` most likely tokens; also, for each row, whether the filters keep none beyond them."""
    values, candidates = scaled.topk(count, dim=-1)
    probs = (values - scaled.logsumexp(dim=-1, keepdim=True)).exp()
    vocab = scaled.shape[-1]
    rank = torch.arange(count, device=scaled.device)
    top_k = _column([row.params.top_k or vocab for row in rows], scaled, torch.int64)
    probs = probs * (rank < top_k)
    mass = probs.cumsum(dim=-1)
    # Renormalizing by what top-k left; where there is no top-k, all tokens count, also those beyond the candidates.
    total = torch.where(top_k <= count, mass[:, -1:], torch.ones_like(mass[:, -1:]))
    top_p = _column([row.params.top_p for row in rows], scaled)
    min_p = _column([row.params.min_p for row in rows], scaled)
    kept = (mass - probs < top_p * total) & (probs >= min_p * probs[:, :1])
    kept[:, 0] = True  # the most likely token stays, also where top-p is too small for a float32
    decided = (top_k <= count) | (mass[:, -1:] >= top_p * total) | (probs[:, -1:] < min_p * probs[:, :1])
    chosen = _pick(probs * kept, uniform)
    tokens: list[int] = candidates.gather(1, chosen.unsqueeze(1)).squeeze(1).tolist()
    complete: list[bool] = (decided.squeeze(1) | (count == vocab)).tolist()
    return tokens, complete


def _pick(weights: Tensor, uniform: Tensor) -> Tensor:
    """The index [R] at which the running sum of weights [R, N] passes uniform [R, 1] of the row's total."""
    cumulative = weights.double().cumsum(dim=-1)
    index = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True).squeeze(1)
    # Rounding can put the draw at the very end, behind the last token that has any weight.
    last = weights.shape[-1] - 1 - (weights.flip(-1) > 0).to(torch.int8).argmax(dim=-1)
    return torch.minimum(index, last)


def _logprobs(logits: Tensor, rows: Sequence[SampleRow], tokens: Sequence[int]) -> dict[int, TokenLogprob]:
    """Log-probabilities under the model's raw distribution, for the rows that ask for them or are ranked by them."""
    asked = [index for index, row in enumerate(rows) if row.params.logprobs is not None or row.params.ranked]
    if not asked:
        return {}
    logprobs, top = _most_likely(logits, asked, [rows[index].params.logprobs or 0 for index in asked])
    own = logprobs.gather(1, torch.tensor([[tokens[index]] for index in asked], device=logits.device)).tolist()
    return {index: TokenLogprob(token_id=tokens[index], logprob=own[i][0], top=top[i]) for i, index in enumerate(asked)}


def _best(logits: Tensor, rows: Sequence[SampleRow]) -> dict[int, tuple[Candidate, ...]]:
    """The most likely tokens and their log-probabilities, for the rows that are beams."""
    beams = [index for index, row in enumerate(rows) if row.num_candidates]
    if not beams:
        return {}
    _, top = _most_likely(logits, beams, [rows[index].num_candidates for index in beams])
    return dict(zip(beams, top, strict=True))


def _most_likely(
    logits: Tensor, chosen: Sequence[int], counts: Sequence[int]
) -> tuple[Tensor, list[tuple[Candidate, ...]]]:
    """Log-probabilities [len(chosen), vocab], float32, of the chosen rows, and each row's ``counts`` best tokens."""
    logprobs = _take(logits, chosen).float().log_softmax(dim=-1)
    top: list[tuple[Candidate, ...]] = [()] * len(counts)
    wanted = [index for index, count in enumerate(counts) if count]
    if wanted:  # else the search for the best, which takes longer than all before, is left out
        best = _take(logprobs, wanted).topk(min(max(counts), logits.shape[-1]), dim=-1)
        for index, values, ids in zip(wanted, best.values.tolist(), best.indices.tolist(), strict=True):
            top[index] = tuple(zip(ids, values, strict=True))[: counts[index]]
    return logprobs, top


def _take(x: Tensor, rows: Sequence[int]) -> Tensor:
    """x [R, …] → those of its rows, ascending; itself if they are all."""
    return x if len(rows) == len(x) else x[rows]


def _is_filtered(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0


def _scaled(logits: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    return logits / _column([max(row.params.temperature, 1e-5) for row in rows], logits)


def _uniform(rows: Sequence[SampleRow], like: Tensor) -> Tensor:
    return _column([row.uniform() for row in rows], like, torch.float64)


def _column(values: Sequence[float], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.tensor(values, dtype=dtype or like.dtype, device=like.device).unsqueeze(1)
