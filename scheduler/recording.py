"""A trace as a load that was measured: what came, what became of it, and how long each step took.

The same terms as the simulator's, so that the two can be laid side by side. A step lasts from its beginning to the next
one's where that follows at once: what the server does between two steps is time that every answer waits for. Where the
server goes idle it lasts until its tokens are there. Nothing is replayed: what the trace says is what happened.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scheduler.config import SchedulerConfig
from scheduler.cost_model import Observation, Share, Work
from scheduler.request import StopRule
from scheduler.simulator import Arrival, Served
from scheduler.trace import TraceError, config_of, lines_of, stop_rule_of


@dataclass(frozen=True, slots=True)
class Recording:
    """A load, and how it went. A request of several continuations counts as one request for each."""

    config: SchedulerConfig
    arrivals: list[Arrival]
    """In order of time, the first at 0; each answer as long as it became, whatever ended it."""
    served: list[Served]
    """What became of each, in the same order."""
    steps: list[Observation]
    left_out: int
    """Requests that got no token: they wanted none, were aborted or timed out while they waited, or still wait."""


@dataclass(slots=True)
class _Continuation:
    """One answer to come."""

    tokens: array[int] = field(default_factory=lambda: array("i"))
    first: float | None = None
    last: float = 0.0


@dataclass(slots=True)
class _Live:
    """A request that the trace told of."""

    now: float
    prompt: array[int]
    described: dict[str, Any]
    rule: StopRule
    continuations: dict[int, _Continuation] = field(default_factory=dict)
    cached: int | None = None
    ended: set[int] = field(default_factory=set)
    """The continuations that have."""


@dataclass(slots=True)
class _Step:
    """A step that is under way, or whose end is not known yet."""

    began: float
    shares: list[tuple[str, int, Share]]
    """(request, continuation, share) of each."""
    moved: int
    sampled: list[_Continuation] = field(default_factory=list)
    seconds: float | None = None
    """From its beginning to its tokens."""


def read_recording(path: Path) -> Recording:
    """Read what `TracedScheduler` wrote. Raises TraceError, naming the line that it cannot be made of."""
    entries = lines_of(path)
    number, head = next(entries, (1, {}))
    reader = _Reader(config_of(head, path))
    for number, entry in entries:
        try:
            reader.take(entry)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            reason = str(error) if isinstance(error, TraceError) else f"{type(error).__name__}: {error}"
            raise TraceError(f"{path}, line {number}: {reason}") from error
    recording = reader.recording()
    if not recording.steps:
        raise TraceError(f"{path}: no step in it has ended")
    return recording


class _Reader:
    def __init__(self, config: SchedulerConfig) -> None:
        self._config = config
        self._requests: list[_Live] = []
        self._open: dict[str, _Live] = {}
        self._step: _Step | None = None
        self._steps: list[Observation] = []

    def take(self, entry: dict[str, Any]) -> None:
        """Read the next line."""
        match entry:
            case {"add": described, "now": now}:
                self._add(described, float(now))
            case {"step": step, "now": now}:
                self._close(float(now))
                self._step = self._begun(step, float(now))
            case {"update": tokens, "seconds": seconds}:
                self._update(tokens, float(seconds))
            case {"abort": name}:
                self._leave([name])
            case {"discard": _}:
                self._step = None  # the aborts of those that it took with it follow
            case {"expire": names}:
                self._leave(names)
            case {"finish": [name, index, _]}:
                self._end(name, index)
            case _:
                raise TraceError("this is no entry of a trace")
        if self._step is not None and self._step.seconds is not None and not self._open:
            self._close(self._step.began + self._step.seconds)  # nothing follows at once: the server goes idle

    def recording(self) -> Recording:
        """All that was read."""
        if self._step is not None and self._step.seconds is not None:
            self._close(self._step.began + self._step.seconds)
        arrivals: list[Arrival] = []
        served: list[Served] = []
        start = self._requests[0].now if self._requests else 0.0
        for live in self._requests:
            for answer in live.continuations.values():
                arrivals.append(_arrival(live, answer, start))
                served.append(_served(len(served), live, answer, start))
        left_out = sum(not live.continuations for live in self._requests)
        return Recording(self._config, arrivals, served, self._steps, left_out)

    def _add(self, described: dict[str, Any], now: float) -> None:
        if described["beam_width"] is not None:
            raise TraceError("a beam search, which the simulator does not know")
        live = _Live(now, array("i", described["prompt"]), described, stop_rule_of(described["stop"]))
        self._requests.append(live)
        self._open[described["id"]] = live

    def _begun(self, step: dict[str, Any], now: float) -> _Step | None:
        moved = self._config.block_size * (len(step.get("out", ())) + len(step.get("back", ())))
        shares: list[tuple[str, int, Share]] = []
        for name, index, start, count, samples in step["items"]:
            live = self._open[name]
            live.cached = start if live.cached is None else live.cached
            shares.append((name, index, (start, count, samples)))
        return _Step(now, shares, moved) if shares or moved else None

    def _update(self, tokens: list[list[int]], seconds: float) -> None:
        step = self._step
        if step is None:
            raise TraceError("an update without a step")
        step.seconds = seconds
        for (name, index, (start, count, _)), sampled in zip(step.shares, tokens, strict=True):
            live = self._open.get(name)
            if live is None:  # it was aborted while the step ran
                continue
            if live.rule.max_tokens == 0 and start + count == len(live.prompt):
                self._leave([name])
            for number, token in enumerate(sampled):
                answer = live.continuations.setdefault(index + number, _Continuation())
                answer.tokens.append(token)
                step.sampled.append(answer)
                if live.rule.finish_reason(len(answer.tokens), token) is not None:
                    self._end(name, index + number)

    def _end(self, name: str, index: int) -> None:
        """One of a request's continuations has ended, or is told so once more."""
        live = self._open.get(name)
        if live is not None:
            live.ended.add(index)
            if len(live.ended) == live.described["n"]:
                del self._open[name]

    def _leave(self, names: Iterable[str]) -> None:
        """Requests have ended as a whole."""
        for name in names:
            self._open.pop(name, None)

    def _close(self, end: float) -> None:
        """The step is over at ``end``, and so it is then that its tokens are there."""
        step, self._step = self._step, None
        if step is None or step.seconds is None:
            return
        for answer in step.sampled:
            answer.first = end if answer.first is None else answer.first
            answer.last = end
        self._steps.append(Observation(Work.of([share for _, _, share in step.shares], step.moved), end - step.began))


def _arrival(live: _Live, answer: _Continuation, start: float) -> Arrival:
    described = live.described
    return Arrival(
        time=live.now - start,
        prompt=live.prompt,
        output=answer.tokens,
        cache_salt=described["root"],
        priority=described["priority"],
        tenant=described["tenant"],
    )


def _served(serial: int, live: _Live, answer: _Continuation, start: float) -> Served:
    assert answer.first is not None
    return Served(
        serial,
        live.now - start,
        len(live.prompt),
        first=answer.first - start,
        last=answer.last - start,
        output_tokens=len(answer.tokens),
        cached_tokens=live.cached or 0,
    )
