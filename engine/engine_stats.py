"""How much an engine has to do at a moment."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot."""

    num_running: int
    num_waiting: int
    """Requests that have not begun, and sequences that were preempted."""
    num_queued: int
    """Requests that have not begun."""
    num_queued_tokens: int
    """Their prompt tokens."""
    used_blocks: int
    num_blocks: int
    block_size: int
    used_host_blocks: int = 0
    num_host_blocks: int = 0

    @property
    def kv_usage(self) -> float:
        """The share of the KV blocks that sequences hold, 0 to 1."""
        return self.used_blocks / self.num_blocks

    @property
    def host_kv_usage(self) -> float:
        """The same of the host tier's blocks; 0 where there is none."""
        return self.used_host_blocks / self.num_host_blocks if self.num_host_blocks else 0.0
