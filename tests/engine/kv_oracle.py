"""An oracle for KV policies: a transformer computed token by token in float64, with a list of kept keys per KV head.

Keys are kept unrotated, as the papers do, and are rotated anew for every query. Nothing is shared with the engine but
the weights, which come from transformers' modules.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Entry:
    """One kept token of one KV head."""

    position: int
    key: Tensor
    value: Tensor
    mass: float = 0.0
    """Attention that it got so far, summed over queries and the query heads of its group."""
    latest: float = 0.0
    """The same from the last query alone."""


Kept = list[Entry]
Evict = Callable[[Kept, int], Kept]
"""Which entries, in order of position, are there when the query of a position attends; the query's own is the last."""


@dataclass
class Oracle:
    """A Llama of transformers, and what each layer's KV heads keep."""

    model: Any
    before: Evict = lambda kept, position: kept
    """Applied before a query attends,"""
    after: Evict = lambda kept, position: kept
    """and after it did, for each head;"""
    together: Callable[[list[Kept], int], list[Kept]] | None = None
    """or, instead, for all heads of a layer at once."""
    in_all_layers: Callable[["Oracle"], None] | None = None
    """Applied when a token has been computed in all layers: may change ``kept`` and ``off``."""
    probabilities: Callable[[Tensor, Tensor, int], Tensor] = lambda query, keys, position: (
        query @ keys.T * query.shape[-1] ** -0.5
    ).softmax(-1)
    """Of rotated queries [G, D] of a position over rotated keys [n, D]."""
    weights: Callable[[Tensor], Tensor] = lambda probabilities: probabilities
    """What values are multiplied with."""
    in_cache_positions: bool = False
    """Whether keys and queries are rotated by their places in the cache (StreamingLLM) or by their true positions."""
    kept: list[list[Kept]] = field(default_factory=list)
    off: set[tuple[int, int]] = field(default_factory=set)
    """Layers and heads that give nothing any more."""
    given: dict[tuple[int, int], float] = field(default_factory=dict)
    """The sum of |output| of a layer's head so far."""
    position: int = 0

    def __post_init__(self) -> None:
        config = self.model.config
        self.model = self.model.double()
        self.kept = [[[] for _ in range(config.num_key_value_heads)] for _ in range(config.num_hidden_layers)]

    @torch.inference_mode()
    def run(self, tokens: Sequence[int]) -> Tensor:
        """Logits [len(tokens), vocab] after each of the next tokens."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # of tensors this small, waking a second costs more than it computes
        try:
            return torch.stack([self._step(token) for token in tokens])
        finally:
            torch.set_num_threads(threads)

    def _step(self, token: int) -> Tensor:
        inner = self.model.model
        x = inner.embed_tokens.weight[token]
        for index, layer in enumerate(inner.layers):
            x = x + self._attend(layer.self_attn, layer.input_layernorm(x), index)
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        if self.in_all_layers is not None:
            self.in_all_layers(self)
        self.position += 1
        logits: Tensor = self.model.lm_head(inner.norm(x))
        return logits

    def _attend(self, attention: Any, x: Tensor, layer: int) -> Tensor:
        kept = self.kept[layer]
        dim, group = attention.head_dim, attention.num_key_value_groups
        queries = attention.q_proj(x).view(-1, group, dim)
        keys, values = attention.k_proj(x).view(-1, dim), attention.v_proj(x).view(-1, dim)
        outputs = []
        for head, query in enumerate(queries):
            entries = [*kept[head], Entry(self.position, keys[head], values[head])]
            entries = self.before(entries, self.position)
            places = range(len(entries)) if self.in_cache_positions else [entry.position for entry in entries]
            rotated = self._rotate(torch.stack([entry.key for entry in entries]), torch.tensor(places))
            query = self._rotate(query, torch.tensor([places[-1]]))
            exact = (query @ rotated.T * dim**-0.5).softmax(-1)
            probabilities = self.weights(self.probabilities(query, rotated, self.position))
            outputs.append(probabilities @ torch.stack([entry.value for entry in entries]))
            kept[head] = entries
            if (layer, head) in self.off:
                outputs[-1] = torch.zeros_like(outputs[-1])
                continue
            self.given[layer, head] = self.given.get((layer, head), 0.0) + float(outputs[-1].abs().sum())
            for entry, mass in zip(entries, exact.sum(0).tolist(), strict=True):
                entry.mass += mass
                entry.latest = mass
        for head, entries in enumerate(self.choose(kept, self.position)):
            kept[head] = entries
        out: Tensor = attention.o_proj(torch.stack(outputs).flatten())
        return out

    def choose(self, kept: list[Kept], position: int) -> list[Kept]:
        """What stays of a layer's heads' entries."""
        return self.together(kept, position) if self.together else [self.after(one, position) for one in kept]

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        theta = self.model.config.rope_parameters["rope_theta"]
        angles = positions[:, None] * theta ** -(torch.arange(half, dtype=torch.float64) / half)
        first, second = x[..., :half], x[..., half:]
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def heaviest(count: int, recent: int, slacks: tuple[int, int], num_prompt: int) -> Evict:
    """H2O: once there are ``slacks`` (within the prompt, after it) too many, the lightest but the newest go."""
    return _select(lambda one: one.mass, count, recent, slacks, num_prompt)


def smallest_keys(count: int, recent: int, slacks: tuple[int, int], num_prompt: int) -> Evict:
    """The same by the norms of keys: the largest go."""
    return _select(lambda one: -float(one.key.norm()), count, recent, slacks, num_prompt)


def most_attended_now(count: int, slacks: tuple[int, int], num_prompt: int) -> Callable[[list[Kept], int], list[Kept]]:
    """TOVA: what the last query attends to least goes, the same for all heads; itself never."""

    def evict(heads: list[Kept], position: int) -> list[Kept]:
        if len(heads[0]) < count + slacks[position + 1 >= num_prompt]:
            return heads
        total = [sum(one.latest for one in entries) for entries in zip(*heads, strict=True)][:-1]
        chosen = sorted(sorted(range(len(total)), key=total.__getitem__, reverse=True)[: count - 1])
        return [[*(entries[i] for i in chosen), entries[-1]] for entries in heads]

    return evict


def _select(
    score: Callable[[Entry], float], count: int, recent: int, slacks: tuple[int, int], num_prompt: int
) -> Evict:
    def evict(kept: Kept, position: int) -> Kept:
        if len(kept) < count + recent + slacks[position + 1 >= num_prompt]:
            return kept
        older, newer = kept[: len(kept) - recent], kept[len(kept) - recent :]
        chosen = sorted(older, key=score, reverse=True)[:count]
        return sorted(chosen, key=lambda one: one.position) + newer

    return evict


def observed_at_the_end(
    keep: Callable[[int], int], observed: int, pooled: int, num_prompt: int
) -> Callable[[Oracle], None]:
    """SnapKV, and PyramidKV, where ``keep`` depends on the layer: once, by the prompt's last queries, in float64."""

    def select(oracle: Oracle) -> None:
        for layer, heads in enumerate(oracle.kept):
            for head, entries in enumerate(heads):
                if oracle.position == num_prompt - observed - 1:
                    for one in entries:
                        one.mass = 0.0
                if oracle.position == num_prompt - 1 and len(entries) > keep(0):
                    older, newer = entries[:-observed], entries[-observed:]
                    around = range(-(pooled // 2), pooled // 2 + 1)
                    votes = [
                        sum(older[i + j].mass for j in around if 0 <= i + j < len(older)) for i in range(len(older))
                    ]
                    best = sorted(range(len(older)), key=votes.__getitem__, reverse=True)[: keep(layer) - observed]
                    oracle.kept[layer][head] = [older[i] for i in sorted(best)] + newer

    return select


@dataclass
class Cascade:
    """SpAtten's cascades: which tokens each layer keeps, and which heads are on."""

    keep: Sequence[int]
    heads: Sequence[int]
    """How many, layer by layer."""
    slacks: tuple[int, int]
    """Within the prompt, after it."""
    num_prompt: int
    sinks: int
    recent: int

    def __call__(self, oracle: Oracle) -> None:
        """Prune, if the first layer, in which all new tokens are, has too many."""
        if len(oracle.kept[0][0]) < self.keep[0] + self.slacks[oracle.position + 1 >= self.num_prompt]:
            return
        importance: dict[int, float] = {}
        still = set(range(oracle.position + 1))
        head_importance = [0.0] * len(oracle.kept[0])
        heads_on = set(range(len(head_importance)))
        for layer, heads in enumerate(oracle.kept):
            for entries in heads:
                for one in entries:
                    importance[one.position] = importance.get(one.position, 0.0) + one.mass
            there = [one.position for one in heads[0] if one.position in still]
            there.sort(key=lambda position: (self._protected(position, oracle.position), importance[position]))
            still = set(there[-self.keep[layer] :])
            oracle.kept[layer] = [[one for one in entries if one.position in still] for entries in heads]
            for head in range(len(heads)):
                head_importance[head] += oracle.given[layer, head]
            heads_on -= {head for number, head in oracle.off if number == layer}
            heads_on = set(sorted(heads_on, key=lambda head: -head_importance[head])[: self.heads[layer]])
            oracle.off |= {(layer, head) for head in range(len(heads)) if head not in heads_on}

    def _protected(self, position: int, newest: int) -> bool:
        return position < self.sinks or position > newest - self.recent


def in_two_steps(high_bits: int, low_bits: int, threshold: float, num_prompt: int) -> Callable[..., Tensor]:
    """SpAtten's progressive quantization of an answer's queries and the keys that they meet."""

    def coarse(x: Tensor, left_out: int) -> Tensor:
        step = x.abs().amax(-1, keepdim=True) / (2 ** (high_bits + low_bits - 1) - 1)
        codes = torch.round(x / step)
        return step * (codes if left_out == 0 else torch.floor(codes / 2**left_out) * 2**left_out + 2**left_out / 2)

    def probabilities(query: Tensor, keys: Tensor, position: int) -> Tensor:
        if position < num_prompt:
            return (query @ keys.T * query.shape[-1] ** -0.5).softmax(-1)
        high, full = (
            (coarse(query, left_out) @ coarse(keys, left_out).T * query.shape[-1] ** -0.5).softmax(-1)
            for left_out in (low_bits, 0)
        )
        rows = [one if float(one.max()) >= threshold else other for one, other in zip(high, full, strict=True)]
        return torch.stack(rows)

    return probabilities


def without_smallest(share: float) -> Callable[[Tensor], Tensor]:
    """SpAtten's local value pruning: a row's smallest probabilities are 0."""

    def weights(probabilities: Tensor) -> Tensor:
        rows = []
        for row in probabilities:
            gone = sorted(range(len(row)), key=row.tolist().__getitem__)[: int(share * len(row))]
            rows.append(row.index_fill(0, torch.tensor(gone, dtype=torch.long), 0.0))
        return torch.stack(rows)

    return weights


def window(size: int, sinks: int = 0) -> Evict:
    """The first ``sinks`` and the newest ``size``."""
    return lambda kept, position: [one for one in kept if one.position < sinks or position - one.position < size]
