"""The limits of a scheduler's steps and memory, and who goes first."""

from dataclasses import dataclass, field
from typing import Literal

from scheduler.batching import Batching
from scheduler.kv_budget import KVBudget
from scheduler.waiting_queue import Order


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """The limits of a step and of the memory, and who goes first."""

    num_blocks: int
    num_host_blocks: int = 0
    block_size: int = 16
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    prefix_caching: bool = True
    preemption: Literal["auto", "recompute", "swap"] = "auto"
    """What becomes of a preempted sequence's KV; `auto` and `swap` recompute what the host has no room for."""
    batching: Batching = field(default_factory=Batching)
    order: Order = field(default_factory=Order)
    queue_timeout: float | None = None
    """Seconds that a request waits for its first step, at most."""

    def __post_init__(self) -> None:
        if self.preemption == "swap" and not self.num_host_blocks:
            raise ValueError("preemption by swapping needs host blocks")
        if self.batching.mode in ("static", "dynamic") and self.batching.size > self.max_num_seqs:
            raise ValueError(f"batches of {self.batching.size} need as many places, not {self.max_num_seqs}")

    @property
    def num_slots(self) -> int:
        """Tokens that the whole pool holds."""
        return self.num_blocks * self.block_size

    def refusal(self, num_tokens: int, num_places: int, budget: KVBudget | None = None) -> str | None:
        """Why a request that may grow to ``num_tokens`` in ``num_places`` sequences can never run; None if it can."""
        if budget is not None:
            step_tokens = min(num_tokens, self.max_num_batched_tokens)
            block_size = self.block_size
            num_tokens = min(num_tokens, budget.max_blocks(step_tokens, block_size) * block_size)
        if num_tokens > (slots := self.num_slots):
            return f"the request may need {num_tokens} tokens of KV cache, but the cache holds {slots} in all"
        if num_places > self.max_num_seqs:
            return f"{num_places} sequences are more than the {self.max_num_seqs} that run at a time"
        return None
