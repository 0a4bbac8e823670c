"""What a scheduler was told and what it decided, as JSON lines; and the same again, offline.

A scheduler's decisions depend on its calls alone. So a trace of a server replays without a model, in a fraction of the
time, and shows whether a changed scheduler decides otherwise, or where an invariant broke: a scheduling bug from
production becomes a test. A trace holds the prompts' and the answers' token ids: keep it like those.
"""

import json
import os
import time
from array import array
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from scheduler.batch import Appended, ScheduledBatch
from scheduler.batching import Batching
from scheduler.config import SchedulerConfig
from scheduler.kv_budget import KVBudget, Selection, Window
from scheduler.request import FinishReason, Request, Sequence, StopRule
from scheduler.scheduler import Scheduler
from scheduler.waiting_queue import Order

VERSION = 1
_WRONG = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What a call raises that is none of the recorded scheduler's, or shows its bug."""


class TraceError(ValueError):
    """A trace that cannot be read, or that tells of other decisions than the scheduler takes now."""


class TracedScheduler(Scheduler):
    """A scheduler that writes a line for each call; the file is readable by its owner only.

    A call that fails is written too, and all that was decided is in the file before the step that follows from it is
    computed: the trace of an engine that died replays to what it died of.
    """

    def __init__(self, config: SchedulerConfig, path: Path) -> None:
        super().__init__(config)
        self._file: TextIO = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w")
        self._scheduled_at = 0.0
        self._write(version=VERSION, config=asdict(config))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def add(self, request: Request, now: float = 0.0) -> None:
        """See `Scheduler.add`."""
        super().add(request, now)
        self._write(now=now, add=_described(request))

    def abort(self, request: Request, *, tainted: bool = False) -> None:
        """See `Scheduler.abort`."""
        self._write(abort=request.request_id, **({"tainted": True} if tainted else {}))
        super().abort(request, tainted=tainted)

    def discard(self, batch: ScheduledBatch) -> list[Request]:
        """See `Scheduler.discard`; the aborts are written by themselves."""
        self._write(discard=True)
        return super().discard(batch)

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """See `Scheduler.finish`."""
        self._write(finish=[sequence.request.request_id, sequence.index, reason])
        super().finish(sequence, reason)

    def expire(self, now: float) -> list[Request]:
        """See `Scheduler.expire`."""
        expired = super().expire(now)
        if expired:
            self._write(now=now, expire=[request.request_id for request in expired])
        return expired

    def schedule(self, now: float = 0.0) -> ScheduledBatch:
        """See `Scheduler.schedule`."""
        try:
            batch = super().schedule(now)
        except Exception:
            self._write(now=now, step=None)
            raise
        else:
            self._write(now=now, step=decisions(self, batch))
        finally:
            self._file.flush()
        self._scheduled_at = time.monotonic()
        return batch

    def update(self, batch: ScheduledBatch, sampled: Iterable[Seq[int]]) -> list[Appended]:
        """See `Scheduler.update`."""
        tokens = [list(own) for own in sampled]
        seconds = time.monotonic() - self._scheduled_at
        self._write(update=tokens, seconds=round(seconds, 6))
        return super().update(batch, tokens)

    def advance(self, request: Request, extensions: Seq[tuple[Sequence, int]]) -> list[Sequence]:
        """See `Scheduler.advance`."""
        self._write(advance=[request.request_id, [[parent.index, token] for parent, token in extensions]])
        return super().advance(request, extensions)

    def _write(self, **entry: Any) -> None:
        if not self._file.closed:  # what is aborted while the engine stops is of no interest
            self._file.write(json.dumps(entry, separators=(",", ":")) + "\n")


def decisions(scheduler: Scheduler, batch: ScheduledBatch) -> dict[str, Any]:
    """A step as JSON knows it: for each share who, from which token, how many, how many samples; and the memory."""
    items = [
        [item.sequence.request.request_id, item.sequence.index, item.start, len(item.tokens), item.num_samples]
        for item in batch.items
    ]
    moves = {name: [list(move) for move in moves] for name, moves in batch.transfers._asdict().items()}
    blocks = sum(item.block_table[-1] for item in batch.items)  # which blocks were given, in brief
    return {
        "items": items,
        **{name: value for name, value in moves.items() if value},
        "blocks": blocks,
        "free": scheduler.pool.num_free,
        "waiting": scheduler.num_waiting,
        "preempted": batch.num_preempted,
    }


@dataclass(slots=True)
class Replay:
    """A trace's calls, made once more. Raises TraceError at the first line that cannot be, or that differs."""

    path: Path
    steps: int = 0
    tokens: int = 0
    requests: int = 0
    preemptions: int = 0
    seconds: float = 0.0
    """That the steps took when they were recorded."""

    def run(self) -> None:
        """Make every call, compare every decision, and check the invariants after each."""
        lines = lines_of(self.path)
        number, head = next(lines, (1, {}))
        scheduler = _scheduler(head, self.path)
        live: dict[str, Request] = {}
        batch: ScheduledBatch | None = None
        for number, entry in lines:
            try:
                batch = self._call(scheduler, entry, live, batch)
                scheduler.check()
            except _WRONG as error:
                raise TraceError(f"{self.path}, line {number}: {_reason(error)}") from error

    def _call(
        self, scheduler: Scheduler, entry: dict[str, Any], live: dict[str, Request], batch: ScheduledBatch | None
    ) -> ScheduledBatch | None:
        match entry:
            case {"add": described}:
                request = _request(described)
                live[request.request_id] = request
                scheduler.add(request, entry["now"])
                self.requests += 1
            case {"abort": name}:
                scheduler.abort(live[name], tainted=entry.get("tainted", False))
            case {"discard": _}:
                if batch is None:
                    raise TraceError("a step was given up before there was one")
                scheduler.discard(batch)
            case {"finish": [name, index, reason]}:
                scheduler.finish(_sequence(live[name], index), reason)
            case {"expire": names}:
                expired = [request.request_id for request in scheduler.expire(entry["now"])]
                _compare({"expired": names}, {"expired": expired})
            case {"step": step}:
                batch = scheduler.schedule(entry["now"])
                if step is not None:  # else it failed then, and does no longer
                    _compare(step, decisions(scheduler, batch))
                self.steps += 1
                self.tokens += batch.num_tokens
                self.preemptions += batch.num_preempted
            case {"update": tokens}:
                if batch is None:
                    raise TraceError("an update without a step")
                scheduler.update(batch, tokens)
                self.seconds += entry["seconds"]
            case {"advance": [name, extensions]}:
                request = live[name]
                scheduler.advance(request, [(_sequence(request, index), token) for index, token in extensions])
            case _:
                raise TraceError("this is no entry of a trace")
        return batch


def lines_of(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The lines of a trace, each with its number, the head first. Raises TraceError where one cannot be read."""
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                entry = json.loads(line)
                if not isinstance(entry, dict):
                    raise TraceError(f"{path}, line {number}: this is no entry of a trace")
                yield number, entry
    except OSError as error:
        raise TraceError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise TraceError(f"{path}: is no text") from error
    except json.JSONDecodeError as error:
        raise TraceError(f"{path}, line {number}: is not valid JSON: {error.msg}") from error


def _described(request: Request) -> dict[str, Any]:
    """All that a request was made of; of its salt only a digest."""
    first = request.sequences[0]
    stop = request.stop
    return {
        "id": request.request_id,
        "prompt": list(first.tokens),
        "root": first.root.hex(),
        "stop": {
            "max_tokens": stop.max_tokens,
            "min_tokens": stop.min_tokens,
            "stop_token_ids": sorted(stop.stop_token_ids),
        },
        "n": request.n,
        "beam_width": request.beam_width,
        "priority": request.priority,
        "tenant": request.tenant,
        "deadline": request.deadline,
        "observed": [request.observed.start, request.observed.stop],
        "kv_budget": None if request.kv_budget is None else asdict(request.kv_budget),  # told apart by its fields
    }


def stop_rule_of(described: dict[str, Any]) -> StopRule:
    """The rule that a request's ``stop`` describes."""
    return StopRule(
        max_tokens=described["max_tokens"],
        min_tokens=described["min_tokens"],
        stop_token_ids=frozenset(described["stop_token_ids"]),
    )


def _request(described: dict[str, Any]) -> Request:
    return Request(
        described["id"],
        array("i", described["prompt"]),
        stop_rule_of(described["stop"]),
        cache_salt=described["root"],  # equal for those requests that had equal salts
        kv_budget=_budget(described.get("kv_budget")),
        **{name: described[name] for name in ("n", "beam_width", "priority", "tenant", "deadline")},
        observed=range(*described.get("observed", (0,))),
    )


def _budget(fields: dict[str, Any] | None) -> KVBudget | None:
    if fields is None:
        return None
    return Window(**fields) if "window" in fields else Selection(**fields)


def config_of(head: dict[str, Any], path: Path) -> SchedulerConfig:
    """The configuration that a trace's first line states. Raises TraceError if it states none."""
    if head.get("version") != VERSION:
        raise TraceError(f"{path}: is no scheduler's trace of version {VERSION}")
    try:
        fields = dict(head["config"])
        fields |= {"batching": Batching(**fields["batching"]), "order": Order(**fields["order"])}
        return SchedulerConfig(**fields)
    except _WRONG as error:
        raise TraceError(f"{path}, line 1: {_reason(error)}") from error


def _scheduler(head: dict[str, Any], path: Path) -> Scheduler:
    config = config_of(head, path)
    try:
        return Scheduler(config)
    except _WRONG as error:
        raise TraceError(f"{path}, line 1: {_reason(error)}") from error


def _sequence(request: Request, index: int) -> Sequence:
    for sequence in request.sequences:
        if sequence.index == index:
            return sequence
    raise TraceError(f"request {request.request_id} has no sequence {index}")


def _compare(expected: dict[str, Any], found: dict[str, Any]) -> None:
    for name in expected.keys() | found.keys():
        if expected.get(name) != found.get(name):
            raise TraceError(f"{name} was {expected.get(name)}, and is {found.get(name)} now")


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, (TraceError, AssertionError)) else f"{type(error).__name__}: {error}"
