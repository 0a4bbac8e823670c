"""What is scheduled: a request, and each of its continuations as a sequence of tokens with a block table."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Literal

from scheduler.kv_budget import KVBudget, Selection
from scheduler.prefix_index import block_key, root_key

FinishReason = Literal["stop", "length", "abort", "timeout", "error"]
"""OpenAI's two, and three of our own: the client is gone, the time is up, or the engine failed."""

Rank = tuple[float, int]
"""Where a request stands in the order of service; lower goes first, and no two are equal."""


class Status(Enum):
    """Where a sequence is."""

    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class StopRule:
    """When a sequence ends by its tokens alone (stop strings need text, and are the engine's to find)."""

    max_tokens: int
    """0: it ends when its prompt is computed."""
    min_tokens: int = 0
    stop_token_ids: frozenset[int] = frozenset()

    def finish_reason(self, num_output_tokens: int, last_token: int) -> FinishReason | None:
        """``"stop"``, ``"length"`` or, while the sequence goes on, None."""
        if last_token in self.stop_token_ids and num_output_tokens > self.min_tokens:
            return "stop"
        return "length" if num_output_tokens >= self.max_tokens else None


class Request:
    """A prompt and its continuations, which fork from it once it is computed: ``n`` of them, or the beams of a search.

    ``priority`` and ``tenant`` say who is served first (`Order`); at ``deadline``, in the seconds of `Scheduler.add`'s
    clock, whatever is unfinished ends. A beam search keeps ``beam_width`` sequences, and is told by
    `Scheduler.advance` which of them go on. Each of its sequences holds no more KV than ``kv_budget`` says.
    ``observed`` are the positions of the prompt for which the model's output itself is wanted; so from the first of
    them on nothing comes from the prefix cache. With no output tokens at all the request ends with its prompt.
    """

    def __init__(
        self,
        request_id: str,
        prompt: Iterable[int],
        stop: StopRule,
        *,
        n: int = 1,
        beam_width: int | None = None,
        cache_salt: str | None = None,
        priority: int = 0,
        tenant: str = "",
        deadline: float | None = None,
        kv_budget: KVBudget | None = None,
        observed: range = range(0),
    ) -> None:
        tokens = array("i", prompt)
        if not tokens:
            raise ValueError("a prompt has at least one token")
        if n < 1 or (beam_width is not None and beam_width < 1):
            raise ValueError("n and the beam width are at least 1")
        if stop.max_tokens < (0 if beam_width is None else 1):
            raise ValueError("max_tokens is at least 0, of a beam search 1")
        self.request_id = request_id
        self.stop = stop
        self.n = n
        self.beam_width = beam_width
        self.num_places = beam_width or n
        """How many sequences run at a time once the prompt is computed."""
        self.priority = priority
        self.tenant = tenant
        self.deadline = deadline
        self.kv_budget = kv_budget
        self.observed = observed
        self.arrival = 0.0
        self.rank: Rank = (0.0, 0)
        self.num_prompt_tokens = len(tokens)
        self.cached_tokens: int | None = None
        """Prompt tokens whose KV a cache held when the request was first admitted; None until then."""
        self.sequences = [Sequence(self, 0, tokens, root_key(cache_salt))]
        """The continuations so far; of a beam search, those that live."""
        self.num_forked = 1
        """Sequences made so far."""

    @property
    def forked(self) -> bool:
        """Whether the prompt is computed and all continuations exist."""
        return self.num_forked >= self.num_places

    @property
    def finished(self) -> bool:
        """Whether every continuation has ended (an abort before the fork ends them all)."""
        return all(s.status is Status.FINISHED for s in self.sequences)

    @property
    def max_num_tokens(self) -> int:
        """The longest that any of its sequences can become."""
        return self.num_prompt_tokens + self.stop.max_tokens


class Sequence:
    """One continuation: its tokens, how many of them are computed, and the blocks that hold their KV.

    Each step ``num_computed_tokens`` catches up with ``num_tokens``: prefill, chunked prefill, a prefix hit,
    recomputation after preemption and decoding differ only in how far there is to go.
    """

    __slots__ = (
        "_keys",
        "block_table",
        "finish_reason",
        "host_table",
        "index",
        "num_computed_tokens",
        "num_dropped",
        "parked",
        "request",
        "root",
        "status",
        "tokens",
    )

    def __init__(self, request: Request, index: int, tokens: array[int], root: bytes) -> None:
        self.request = request
        self.index = index
        self.tokens = tokens
        self.num_computed_tokens = 0
        self.num_dropped = 0
        """Computed tokens whose KV fell away under its budget; the others are in the slots of its block table."""
        self.block_table: array[int] = array("i")
        self.host_table: array[int] = array("i")
        """Where its KV is while it is swapped out: then it has no ``block_table``, and its computed tokens count."""
        self.status = Status.WAITING
        self.parked = False
        """Whether it is a beam that waits for the others, with nothing to compute until they are as far."""
        self.finish_reason: FinishReason | None = None
        self.root = root
        """The parent key of its first block."""
        self._keys: list[bytes] = []

    @property
    def rank(self) -> tuple[Rank, int]:
        """Where it stands among all sequences; lower runs first, and is preempted last."""
        return (self.request.rank, self.index)

    @property
    def num_tokens(self) -> int:
        """Prompt and output together."""
        return len(self.tokens)

    @property
    def num_output_tokens(self) -> int:
        """Tokens sampled so far."""
        return len(self.tokens) - self.request.num_prompt_tokens

    @property
    def num_slots(self) -> int:
        """Computed tokens whose KV it holds."""
        return self.num_computed_tokens - self.num_dropped

    @property
    def prompt_left(self) -> int:
        """Tokens of the prompt that are still to be computed; 0 just at its end, negative behind."""
        return self.request.num_prompt_tokens - self.num_computed_tokens

    @property
    def max_step(self) -> int:
        """Tokens that a step may compute at most: it oversteps no selection, nor the prompt's end before one."""
        budget = self.request.kv_budget
        if not isinstance(budget, Selection):
            return len(self.tokens)
        return budget.room(self.num_slots, self.prompt_left)

    @property
    def num_uncomputed_tokens(self) -> int:
        """How far there is to go."""
        return len(self.tokens) - self.num_computed_tokens

    def block_keys(self, count: int, block_size: int) -> list[bytes]:
        """The prefix-index keys of the first ``count`` full blocks."""
        keys = self._keys
        while len(keys) < count:
            start = len(keys) * block_size
            keys.append(block_key(keys[-1] if keys else self.root, self.tokens[start : start + block_size]))
        return keys[:count]

    def fork(self) -> Sequence:
        """A continuation with the same past, but no blocks."""
        child = Sequence(self.request, self.request.num_forked, self.tokens[:], self.root)
        child._keys = self._keys[:]
        self.request.num_forked += 1
        self.request.sequences.append(child)
        return child
