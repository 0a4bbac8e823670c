"""Random histories of a scheduler, all its features at once, with oracles beside it.

Every step is executed by a memory that knows which past each slot was written for. What is sampled, when an answer
ends and how a beam search goes on are functions of the tokens so far alone, so that at the end each answer can be
worked out anew, without a scheduler. All calls are traced: the trace must replay to the same decisions.
"""

import os
import sys
import tempfile
from collections import Counter
from math import inf
from pathlib import Path
from typing import Any, ClassVar

from hypothesis import event
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from scheduler.batch import ScheduledBatch
from scheduler.batching import Batching
from scheduler.config import SchedulerConfig
from scheduler.request import FinishReason, Request, Sequence, Status, StopRule
from scheduler.trace import Replay, TracedScheduler
from scheduler.waiting_queue import Order
from tests.scheduler.answers import Past, check_answer, check_search, ends_by_text, next_beams
from tests.scheduler.memory import RecordingMemory, step_tokens

STATES = ("swapped", "preempted", "parked", "in mid-step", "prefilling", "decoding", "queued")
"""Where a request can be while it has not ended, what is rare first."""

_configs = st.fixed_dictionaries(
    {
        "block_size": st.sampled_from([1, 2, 4]),
        "num_blocks": st.integers(10, 32),  # of one token; fewer of larger ones
        "num_host_blocks": st.sampled_from([0, 4, 40, 40]),
        "max_num_seqs": st.integers(1, 6),
        "max_num_batched_tokens": st.integers(1, 24),
        "prefix_caching": st.sampled_from([True, True, False]),
        "preemption": st.sampled_from(["swap", "swap", "auto", "recompute"]),
        "batching": st.builds(
            Batching,
            mode=st.sampled_from(["none", "static", "dynamic", "continuous", "continuous", "continuous"]),
            size=st.integers(1, 3),
            delay=st.just(1.0),
        ),
        "order": st.builds(Order, policy=st.sampled_from(["fcfs", "priority", "fair"]), ageing=st.just(2.0)),
        "queue_timeout": st.sampled_from([None, None, 5.0]),
    }
)
_requests = st.fixed_dictionaries(
    {
        "prefix": st.sampled_from([[1] * 5, [1] * 3 + [2] * 5, [3], []]),
        "suffix": st.lists(st.integers(0, 3), min_size=1, max_size=4),
        "places": st.integers(1, 4),
        "beams": st.booleans(),
        "max_tokens": st.integers(0, 16),
        "observed": st.sampled_from(["nothing", "nothing", "all", "the last"]),
        "stop_token_ids": st.frozensets(st.integers(0, 49), max_size=5),
        "patience": st.sampled_from([None, None, None, 1.0, 4.0]),
        "cache_salt": st.sampled_from([None, None, "salt"]),
        "priority": st.integers(-2, 2),
        "tenant": st.sampled_from(["", "a", "b"]),
    }
)
_FILLER = {"prefix": [], "suffix": [1], "places": 1, "beams": False, "max_tokens": 1, "patience": None}


class Observed(TracedScheduler):
    """Remembers who had to go in a step."""

    def schedule(self, now: float = 0.0) -> ScheduledBatch:
        self.went: set[Sequence] = set()
        return super().schedule(now)

    def _preempt(self, sequence: Sequence) -> None:
        self.went.add(sequence)
        super()._preempt(sequence)


class Histories(RuleBasedStateMachine):
    """A scheduler, an oracle of its memory, a clock, and every request it was ever given."""

    reached: ClassVar[Counter[str]] = Counter()
    """In how many histories each event happened, and the steps of all histories."""

    @initialize(
        config=_configs,
        load=st.lists(_requests, min_size=1, max_size=6),
        prey=st.lists(st.tuples(st.sampled_from(STATES[:4]), st.integers(0, 2)), min_size=2, max_size=2),
    )
    def start(self, config: dict[str, Any], load: list[dict[str, Any]], prey: list[tuple[str, int]]) -> None:
        config["num_blocks"] = -(-config["num_blocks"] // config["block_size"])
        config["max_num_seqs"] = max(config["max_num_seqs"], config["batching"].size)
        if config["preemption"] == "swap" and not config["num_host_blocks"]:
            config["preemption"] = "auto"
        self.config = SchedulerConfig(**config)
        file, path = tempfile.mkstemp()
        os.close(file)
        self.trace = Path(path)
        self.scheduler = Observed(self.config, self.trace)
        self.memory = RecordingMemory(self.config.num_blocks, self.config.block_size, self.config.num_host_blocks)
        self.requests: list[Request] = []
        self.expired: list[Request] = []
        self.searches: dict[Request, list[Sequence]] = {}
        self.found: dict[Request, list[Past]] = {}
        self.batch: list[Request] = []  # of a mode that batches requests
        self.horizon = 0  # requests that had come when it began
        self.ended: dict[Sequence, FinishReason] = {}
        self.observed: dict[Request, set[int]] = {}
        self.prey = dict(prey)  # states in which a request will be aborted, after so many sightings
        self.pending: ScheduledBatch | None = None
        self.now = 0.0
        self.steps = 0
        self.events = {f"batching {self.config.batching.mode}", f"order {self.config.order.policy}"}
        for described in load:
            self.add(described)

    # what clients do

    @rule(described=_requests, copies=st.integers(1, 3))
    def come(self, described: dict[str, Any], copies: int) -> None:
        for _ in range(copies):
            self.add(described)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        in_state = {state: request for request in self.requests for state in self.states(request)}
        state = data.draw(st.sampled_from(sorted(in_state)))
        self.drop(in_state[state], state)

    @rule(seconds=st.sampled_from([0.5, 3.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    def add(self, described: dict[str, Any]) -> None:
        options = {"stop_token_ids": frozenset(), **described}
        beams, places = options.pop("beams"), min(options.pop("places"), self.config.max_num_seqs)
        prompt = (options.pop("prefix") + options.pop("suffix"))[: self.config.num_slots - 1]
        patience, max_tokens = options.pop("patience"), max(options.pop("max_tokens"), int(beams))
        first = {"nothing": len(prompt), "all": 0, "the last": len(prompt) - 1}[options.pop("observed", "all")]
        request = Request(
            str(len(self.requests)),
            prompt,
            StopRule(
                max_tokens=min(max_tokens, self.config.num_slots - len(prompt)),
                stop_token_ids=options.pop("stop_token_ids"),
            ),
            n=1 if beams else places,
            observed=range(first, len(prompt)),
            beam_width=places if beams else None,
            deadline=None if patience is None else self.now + patience,
            **options,
        )
        self.scheduler.add(request, self.now)
        self.requests.append(request)
        if beams:
            self.searches[request] = request.sequences[:]

    def drop(self, request: Request, state: str) -> None:
        self.events.add(f"abort {state}")
        self.scheduler.abort(request)
        assert all(sequence.status is Status.FINISHED for sequence in request.sequences)

    # what the engine does

    @rule()
    def begin_step(self) -> None:
        self.finish_step()
        self.expire()
        unbegun = [request for request in self.requests if request.cached_tokens is None]
        swapped = [sequence for sequence in self.live() if sequence.host_table]
        waited = {sequence for sequence in self.live() if sequence.status is Status.WAITING}
        self.pending = self.scheduler.schedule(self.now)
        came = waited.union(self.scheduler.went)
        if self.pending.num_preempted and not all(item.sequence in came for item in self.pending.items):
            assert not any(item.sequence in waited for item in self.pending.items), "one came while another had to go"
        self.check_step(self.pending)
        self.check_who_began([request for request in unbegun if request.cached_tokens is not None])
        self.memory.execute(self.pending)
        self.steps += 1
        self.note_step(self.pending, swapped, unbegun)
        self.hunt()

    @rule()
    def finish_step(self) -> None:
        if self.pending is None:
            return
        pending, self.pending = self.pending, None
        for new in self.scheduler.update(pending, step_tokens(pending)):
            if new.sequence.finish_reason is None and ends_by_text(new.sequence):
                self.scheduler.finish(new.sequence, "stop")
        for request in {item.sequence.request: None for item in pending.items}:
            if request in self.searches and not request.finished:
                self.advance(request)
        self.hunt()

    @rule(count=st.integers(1, 8), seconds=st.sampled_from([0.0, 0.25]))
    def run(self, count: int, seconds: float) -> None:
        for _ in range(count):
            self.begin_step()
            self.now += seconds
        self.finish_step()

    def hunt(self) -> None:
        """Abort a request in each state that was chosen for it."""
        for state, sightings in [*self.prey.items()]:
            found = [request for request in self.requests if state in self.states(request)]
            if found and sightings:
                self.prey[state] -= 1
            elif found:
                del self.prey[state]
                self.drop(found[-1], state)

    def expire(self) -> None:
        states = {request: self.states(request) for request in self.requests if not request.finished}
        for request in self.scheduler.expire(self.now):
            self.expired.append(request)
            late = request.deadline is not None and request.deadline <= self.now
            self.events.update(f"{'deadline' if late else 'queue timeout'} {state}" for state in states[request])
        assert all(limit > self.now for limit in self.limits())

    def advance(self, request: Request) -> None:
        beams, width = self.searches[request], request.beam_width
        assert width is not None
        if not all(beam.parked for beam in beams):
            return
        pasts = [tuple(beam.tokens) for beam in beams]
        choices = next_beams(pasts, width) if beams[0].num_output_tokens + 1 < request.stop.max_tokens else []
        if not choices:
            self.found[request] = pasts
            for beam in beams:
                self.scheduler.finish(beam, "stop")
            return
        self.searches[request] = self.scheduler.advance(request, [(beams[parent], token) for parent, token in choices])
        assert [tuple(beam.tokens) for beam in self.searches[request]] == [(*pasts[p], token) for p, token in choices]
        parents = {parent for parent, _ in choices}
        forks = [beam for beam in self.searches[request] if beam not in beams]
        happened = {
            "a beam forked": bool(forks),
            "a beam ended": len(parents) < len(beams),
            "a fork found no place": any(fork.status is Status.WAITING for fork in forks),
        }
        self.events.update(name for name, did in happened.items() if did)

    # what must hold

    def live(self) -> list[Sequence]:
        return [s for request in self.requests for s in request.sequences if s.status is not Status.FINISHED]

    def limits(self) -> list[float]:
        """When the time of a request is up."""
        live = [request for request in self.requests if not request.finished]
        queued = [request for request in live if request.cached_tokens is None]
        limits = [request.deadline for request in live if request.deadline is not None]
        return limits + [request.arrival + (self.config.queue_timeout or inf) for request in queued]

    def check_step(self, batch: ScheduledBatch) -> None:
        items, batching = batch.items, self.config.batching
        assert batch.num_tokens == sum(len(item.tokens) for item in items) <= self.config.max_num_batched_tokens
        assert all(len(item.tokens) > 0 for item in items)
        assert len({id(item.sequence) for item in items}) == len(items)
        assert all(item.sequence.status is Status.RUNNING for item in items)
        for item in items:
            assert all(item.start <= position < item.start + len(item.tokens) for position in item.observed)
            self.observed.setdefault(item.sequence.request, set()).update(item.observed)
        live = [request for request in self.requests if not request.finished]
        queued = [request for request in live if request.cached_tokens is None]
        assert self.scheduler.has_work == bool(live)
        assert self.scheduler.num_queued_tokens == sum(request.num_prompt_tokens for request in queued)
        if live and not items:
            assert len(queued) == len(live), "what has begun stands still"
            assert batching.mode in ("static", "dynamic"), "work was pending but none was scheduled"
            assert len(queued) < batching.size
            due = min(batching.delay + request.arrival for request in queued) if batching.mode == "dynamic" else inf
            first = min([due, *self.limits()])
            assert first > self.now, "something was due and was not done"
            event = self.scheduler.next_event()
            assert (inf if event is None else event) <= first, "something is due and nobody would wake"

    def check_who_began(self, began: list[Request]) -> None:
        if not began:
            return
        for sequence in self.live():
            if sequence.status is Status.WAITING and sequence.request.cached_tokens is not None:
                assert sequence.parked, "a newcomer went before one that had to make room"
        if self.config.batching.refills:
            return
        if all(request.finished for request in self.batch):
            self.batch, self.horizon = [], len(self.requests)
        self.batch += began
        assert len(self.batch) <= (1 if self.config.batching.mode == "none" else self.config.batching.size)
        assert all(int(request.request_id) < self.horizon for request in began), "a batch was joined while it ran"

    @invariant()
    def every_block_is_accounted_for_and_what_has_ended_stays_as_it_is(self) -> None:
        if hasattr(self, "scheduler"):
            self.scheduler.check()
            assert self.scheduler.num_running <= self.config.max_num_seqs
            for request in self.requests:
                for sequence in request.sequences:
                    assert (sequence.finish_reason is None) == (sequence.status is not Status.FINISHED)
                    if sequence.finish_reason is not None:
                        assert self.ended.setdefault(sequence, sequence.finish_reason) == sequence.finish_reason

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        try:
            if sys.exc_info()[0] is None:  # else there is a failure to report already
                self.run_to_the_end()
                self.check_the_end()
        finally:
            self.scheduler.close()
            self.trace.unlink()

    def run_to_the_end(self) -> None:
        for _ in range(10_000):
            self.begin_step()
            if not self.scheduler.has_work:
                break
            if self.pending:
                self.now += 0.25
            elif (due := self.scheduler.next_event()) is not None:
                self.now = max(self.now, due)
            else:
                self.add(_FILLER)  # until the last static batch is full
        self.finish_step()
        assert not self.scheduler.has_work, "a request starves"

    def check_the_end(self) -> None:
        """Every added request ends exactly once, with a reason and the tokens that its own past calls for."""
        scheduler = self.scheduler
        assert (scheduler.num_running, scheduler.num_waiting, scheduler.pool.num_used) == (0, 0, 0)
        assert scheduler.host_pool is None or scheduler.host_pool.num_used == 0
        assert len(self.expired) == len(set(self.expired))
        for request in self.requests:
            reasons = {sequence.finish_reason for sequence in request.sequences}
            assert ("timeout" in reasons) == (request in self.expired)
            assert reasons <= {"stop", "length", "abort", "timeout"}
            self.events.update(f"ended by {reason}" for reason in reasons)
            if reasons & {"stop", "length"}:
                assert self.observed[request] == set(request.observed)
            if request in self.found:
                check_search(request, self.found[request])
            elif request not in self.searches:
                count = request.n if request.stop.max_tokens else 1
                assert len(request.sequences) == count or reasons <= {"abort", "timeout"}
                for sequence in request.sequences:
                    check_answer(sequence)
        self.scheduler.close()
        replay = Replay(self.trace)
        replay.run()
        assert (replay.steps, replay.requests) == (self.steps, len(self.requests))
        for name in self.events:
            event(name)
        self.reached.update([*self.events, "histories"])
        self.reached["steps"] += self.steps

    # what happened

    def states(self, request: Request) -> list[str]:
        """Where its sequences are: of `STATES`, or ended."""
        if request.finished:
            return ["ended"]
        if request.cached_tokens is None:
            return ["queued"]
        states = []
        for sequence in request.sequences:
            if sequence.status is Status.FINISHED:
                continue
            prompt = sequence.num_computed_tokens < request.num_prompt_tokens
            where = "swapped" if sequence.host_table else "preempted"
            if sequence.status is Status.RUNNING:
                where = "prefilling" if prompt else "decoding"
            states.append("parked" if sequence.parked else where)
            if self.pending is not None and any(item.sequence is sequence for item in self.pending.items):
                states.append("in mid-step")
        return states

    def note_step(self, batch: ScheduledBatch, swapped: list[Sequence], unbegun: list[Request]) -> None:
        transfers, live = batch.transfers, self.live()
        waiting = [s for s in live if s.status is Status.WAITING and s.request.cached_tokens is not None]
        out = [s for s in waiting if s.host_table and s not in swapped]
        back = [s for s in swapped if s.block_table]
        hits = [request for request in unbegun if request.cached_tokens]
        happened = {
            "preempted": batch.num_preempted > 0,
            "preempted while parked": batch.num_preempted > 0 and any(s.parked for s in waiting),
            "to be recomputed": batch.num_preempted > 0 and any(not s.host_table for s in waiting),
            "swapped out": bool(out),
            "swapped out while parked": any(s.parked for s in out),
            "swapped in": bool(back),
            "cached block moved to the host": bool(transfers.out) and not out,
            "prefix found on the device": bool(hits) and not transfers.back,
            "prefix found on the host": bool(hits) and bool(transfers.back) and not back,
            "copied on write": bool(transfers.copies),
            "prompt in chunks": any(item.num_samples == 0 for item in batch.items),
            "continuations forked": any(item.num_samples > 1 for item in batch.items),
            "several sequences": len(batch.items) > 1,
            "nothing to do yet": not batch and bool(live),
            "observed in chunks": any(
                item.observed and len(item.observed) < len(item.sequence.request.observed) for item in batch.items
            ),
            "ends with its prompt": any(item.sequence.request.stop.max_tokens == 0 for item in batch.items),
        }
        self.events.update(name for name, did in happened.items() if did)
