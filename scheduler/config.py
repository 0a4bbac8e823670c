"""The limits of a scheduler's steps and memory, and who goes first."""

from dataclasses import dataclass, field
from typing import Literal

from scheduler.batching import Batching
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
