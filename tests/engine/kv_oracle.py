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
    in_cache_positions: bool = False
    """Whether keys and queries are rotated by their places in the cache (StreamingLLM) or by their true positions."""
    kept: list[list[Kept]] = field(default_factory=list)
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
        for layer, kept in zip(inner.layers, self.kept, strict=True):
            x = x + self._attend(layer.self_attn, layer.input_layernorm(x), kept)
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        self.position += 1
        logits: Tensor = self.model.lm_head(inner.norm(x))
        return logits

    def _attend(self, attention: Any, x: Tensor, kept: list[Kept]) -> Tensor:
        dim, group = attention.head_dim, attention.num_key_value_groups
        queries = attention.q_proj(x).view(-1, group, dim)
        keys, values = attention.k_proj(x).view(-1, dim), attention.v_proj(x).view(-1, dim)
        outputs = []
        for head, query in enumerate(queries):
            entries = [*kept[head], Entry(self.position, keys[head], values[head])]
            entries = self.before(entries, self.position)
            places = range(len(entries)) if self.in_cache_positions else [entry.position for entry in entries]
            rotated = self._rotate(torch.stack([entry.key for entry in entries]), torch.tensor(places))
            scores = self._rotate(query, torch.tensor([places[-1]])) @ rotated.T * dim**-0.5
            probabilities = scores.softmax(-1)
            outputs.append(probabilities @ torch.stack([entry.value for entry in entries]))
            for entry, mass in zip(entries, probabilities.sum(0).tolist(), strict=True):
                entry.mass += mass
                entry.latest = mass
            kept[head] = entries
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


def window(size: int, sinks: int = 0) -> Evict:
    """The first ``sinks`` and the newest ``size``."""
    return lambda kept, position: [one for one in kept if one.position < sinks or position - one.position < size]
