"""Design invariants after every step of random histories: all features of the scheduler at once."""

from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from scheduler.batch import ScheduledBatch
from scheduler.batching import Batching
from scheduler.request import Request, Sequence, Status, StopRule
from scheduler.scheduler import Scheduler, SchedulerConfig
from scheduler.waiting_queue import Order
from tests.scheduler.memory import RecordingMemory, sample, step_tokens

_PREFIXES = [[1] * 9, [1] * 4 + [2] * 8, [3], []]


class Histories(RuleBasedStateMachine):
    """A scheduler, an oracle of its memory, a clock, and every request it was ever given."""

    @initialize(
        num_blocks=st.integers(4, 24),
        num_host_blocks=st.sampled_from([0, 3, 20]),
        block_size=st.sampled_from([1, 2, 4]),
        max_num_seqs=st.integers(1, 6),
        max_num_batched_tokens=st.integers(1, 24),
        prefix_caching=st.booleans(),
        preemption=st.sampled_from(["auto", "recompute"]),
        batching=st.sampled_from(["none", "static", "dynamic", "continuous", "continuous"]),
        policy=st.sampled_from(["fcfs", "priority", "fair"]),
        queue_timeout=st.sampled_from([None, 30.0]),
    )
    def start(self, batching: Any, policy: Any, **limits: Any) -> None:
        size = min(2, limits["max_num_seqs"])
        self.config = SchedulerConfig(
            **limits, batching=Batching(mode=batching, size=size, delay=3.0), order=Order(policy=policy, ageing=5.0)
        )
        self.scheduler = Scheduler(self.config)
        self.memory = RecordingMemory(self.config.num_blocks, self.config.block_size, self.config.num_host_blocks)
        self.requests: list[Request] = []
        self.expired: list[Request] = []
        self.pending: ScheduledBatch | None = None
        self.now = 0.0

    @rule(
        prefix=st.sampled_from(_PREFIXES),
        suffix=st.lists(st.integers(0, 3), min_size=1, max_size=6),
        places=st.integers(1, 4),
        beams=st.booleans(),
        max_tokens=st.integers(1, 10),
        stop=st.frozensets(st.integers(0, 49), max_size=10),
        who=st.fixed_dictionaries(
            {
                "cache_salt": st.sampled_from([None, "salt"]),
                "priority": st.integers(-2, 2),
                "tenant": st.sampled_from(["", "a", "b"]),
            }
        ),
        patience=st.sampled_from([None, None, 7.0]),
    )
    def add(
        self,
        prefix: list[int],
        suffix: list[int],
        places: int,
        beams: bool,
        max_tokens: int,
        stop: frozenset[int],
        who: dict[str, Any],
        patience: float | None,
    ) -> None:
        request = Request(
            str(len(self.requests)),
            prefix + suffix,
            StopRule(max_tokens=max_tokens, stop_token_ids=frozenset() if beams else stop),
            n=1 if beams else places,
            beam_width=places if beams else None,
            deadline=None if patience is None else self.now + patience,
            **who,
        )
        if self.scheduler.refusal(request.max_num_tokens, places) is None:
            self.scheduler.add(request, self.now)
            self.requests.append(request)

    @rule(seconds=st.sampled_from([0.5, 4.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def schedule(self) -> None:
        self.finish_step()
        self.expired += self.scheduler.expire(self.now)
        self.pending = self.scheduler.schedule(self.now)
        items = self.pending.items
        if self.scheduler.num_running or self.config.batching.refills:
            assert bool(items) == self.scheduler.has_work, "work was pending but none was scheduled"
        assert sum(len(item.tokens) for item in items) <= self.config.max_num_batched_tokens
        assert all(len(item.tokens) > 0 for item in items)
        assert len({id(item.sequence) for item in items}) == len(items)
        self.memory.execute(self.pending)

    @rule()
    def finish_step(self) -> None:
        if self.pending is not None:
            self.scheduler.update(self.pending, step_tokens(self.pending))
            for request in {item.sequence.request: None for item in self.pending.items}:
                if request.beam_width is not None and all(beam.parked for beam in request.sequences):
                    _next_beams(self.scheduler, request)
            self.pending = None

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.requests))
        self.scheduler.abort(request)
        assert all(sequence.status is Status.FINISHED for sequence in request.sequences)

    @invariant()
    def every_block_is_accounted_for(self) -> None:
        if hasattr(self, "scheduler"):
            self.scheduler.check()
            assert self.scheduler.num_running <= self.config.max_num_seqs

    def teardown(self) -> None:
        """Every added request ends exactly once, with a reason and the tokens that its own past calls for."""
        if not hasattr(self, "scheduler"):
            return
        for _ in range(20_000):
            if not self.scheduler.has_work:
                break
            self.now += 1.0
            self.schedule()
            if self.config.batching.mode == "static" and self.scheduler.has_work and not self.pending:
                self.add([], [1], 1, False, 1, frozenset(), {}, None)  # until the last batch is full
        self.finish_step()
        assert not self.scheduler.has_work, "a request starves"
        assert self.scheduler.pool.num_used == 0
        assert self.scheduler.host_pool is None or self.scheduler.host_pool.num_used == 0
        for request in self.requests:
            assert request.finished
            reasons = {sequence.finish_reason for sequence in request.sequences}
            assert ("timeout" in reasons) == (request in self.expired)
            assert reasons <= {"stop", "length", "abort", "timeout"}
            for sequence in request.sequences:
                if request.beam_width is None:
                    _check_answer(request, sequence)


def _next_beams(scheduler: Scheduler, request: Request) -> None:
    """A search that knows nothing of likelihood: who goes on, how often, is a function of the beams' tokens."""
    assert request.beam_width is not None
    beams = request.sequences
    if beams[0].num_output_tokens + 1 >= request.stop.max_tokens:
        for beam in tuple(beams):
            scheduler.finish(beam, "length")
        return
    choices = [beams[sample(beam, 1)[0] % len(beams)] for beam in beams for _ in range(2)][: request.beam_width]
    choices += [beams[-1]] * (request.beam_width - len(choices))
    pasts = [(list(parent.tokens), index) for index, parent in enumerate(choices)]
    advanced = scheduler.advance(request, [(parent, index) for index, parent in enumerate(choices)])
    assert [list(beam.tokens) for beam in advanced] == [[*past, token] for past, token in pasts]


def _check_answer(request: Request, sequence: Sequence) -> None:
    expected = Request("expected", sequence.tokens[: request.num_prompt_tokens], request.stop).sequences[0]
    expected.index = 0
    for position in range(request.num_prompt_tokens, sequence.num_tokens):
        first = position == request.num_prompt_tokens
        token = sample(expected, request.n)[sequence.index] if first else sample(expected, 1)[0]
        assert sequence.tokens[position] == token
        expected.tokens.append(token)
        expected.index = sequence.index
    if sequence.finish_reason == "length":
        assert sequence.num_output_tokens == request.stop.max_tokens


Histories.TestCase.settings = settings(
    max_examples=2000, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
TestHistories = Histories.TestCase
