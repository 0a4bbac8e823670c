"""What the engine tells whoever counts and measures; the server's metrics are one such observer."""

from dataclasses import dataclass

from scheduler.request import FinishReason


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRecord:
    """One continuation's life, in seconds and tokens. TTFT = queue + prefill; latency = TTFT + decode."""

    index: int
    """Which of the request's ``n`` continuations."""
    finish_reason: FinishReason
    prompt_tokens: int
    generated_tokens: int
    e2e_seconds: float
    queue_seconds: float | None = None
    """Arrival to first step; None if it never ran."""
    prefill_seconds: float | None = None
    """First step to first token; None if there was no token."""
    decode_seconds: float | None = None
    """First token to last token."""

    @property
    def seconds_per_output_token(self) -> float | None:
        """TPOT: (last token − first token) / (tokens − 1); None below two tokens."""
        if self.decode_seconds is None or self.generated_tokens < 2:
            return None
        return self.decode_seconds / (self.generated_tokens - 1)


class EngineObserver:
    """Called on the event loop, between steps: calls are cheap and never raise. As it is, it counts nothing."""

    def on_step(self, *, scheduled_tokens: int, num_running: int, num_waiting: int, kv_usage: float) -> None:
        """A step was computed."""

    def on_preemption(self, count: int) -> None:
        """So many sequences gave their blocks back."""

    def on_swap(self, *, out: int, back: int) -> None:
        """So many blocks moved from the device to the host tier, or from there."""

    def on_eviction(self, *, policy: str, tokens: int) -> None:
        """A sequence's KV policy, by name, took the KV of so many of its tokens."""

    def on_prefix_cache(self, *, queried_tokens: int, hit_tokens: int) -> None:
        """Requests were admitted: so many of their tokens were looked up, so many found."""

    def on_tokens(self, *, prompt: int, generated: int) -> None:
        """Requests with so many prompt tokens began to run, or so many tokens were sampled."""

    def on_first_token(self, seconds_since_arrival: float) -> None:
        """TTFT of a request."""

    def on_inter_token(self, seconds: float) -> None:
        """Time between two tokens of one continuation (ITL)."""

    def on_finish(self, record: RequestRecord) -> None:
        """A continuation ended."""
