"""Design invariants after every step of random histories of add, step, abort, preempt."""

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from scheduler.batch import ScheduledBatch
from scheduler.request import Request, Status, StopRule
from scheduler.scheduler import Scheduler, SchedulerConfig
from tests.scheduler.memory import RecordingMemory, sample, step_tokens

_PREFIXES = [[1] * 9, [1] * 4 + [2] * 8, [3], []]


class Histories(RuleBasedStateMachine):
    """A scheduler, an oracle of its memory, and every request it was ever given."""

    @initialize(
        num_blocks=st.integers(4, 24),
        block_size=st.sampled_from([1, 2, 4]),
        max_num_seqs=st.integers(1, 6),
        budget=st.integers(1, 24),
        prefix_caching=st.booleans(),
    )
    def start(self, num_blocks: int, block_size: int, max_num_seqs: int, budget: int, prefix_caching: bool) -> None:
        self.config = SchedulerConfig(
            num_blocks=num_blocks,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            prefix_caching=prefix_caching,
        )
        self.scheduler = Scheduler(self.config)
        self.memory = RecordingMemory(num_blocks, block_size)
        self.requests: list[Request] = []
        self.pending: ScheduledBatch | None = None

    @rule(
        prefix=st.sampled_from(_PREFIXES),
        suffix=st.lists(st.integers(0, 3), min_size=1, max_size=6),
        n=st.integers(1, 4),
        max_tokens=st.integers(1, 10),
        stop=st.frozensets(st.integers(0, 49), max_size=10),
        salt=st.sampled_from([None, "tenant"]),
    )
    def add(
        self,
        prefix: list[int],
        suffix: list[int],
        n: int,
        max_tokens: int,
        stop: frozenset[int],
        salt: str | None,
    ) -> None:
        rule = StopRule(max_tokens=max_tokens, stop_token_ids=stop)
        request = Request(str(len(self.requests)), prefix + suffix, rule, n=n, cache_salt=salt)
        if self.scheduler.refusal(request.max_num_tokens, n) is None:
            self.scheduler.add(request)
            self.requests.append(request)

    @rule()
    def schedule(self) -> None:
        self.finish_step()
        self.pending = self.scheduler.schedule()
        assert bool(self.pending) == self.scheduler.has_work, "work was pending but none was scheduled"
        assert sum(len(item.tokens) for item in self.pending.items) <= self.config.max_num_batched_tokens
        assert all(len(item.tokens) > 0 for item in self.pending.items)
        assert len({id(item.sequence) for item in self.pending.items}) == len(self.pending.items)
        self.memory.execute(self.pending)

    @rule()
    def finish_step(self) -> None:
        if self.pending is not None:
            self.scheduler.update(self.pending, step_tokens(self.pending))
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
            self.schedule()
        self.finish_step()
        assert not self.scheduler.has_work, "a request starves"
        assert self.scheduler.pool.num_used == 0
        for request in self.requests:
            assert request.finished
            for sequence in request.sequences:
                self.check_answer(request, sequence.index)

    def check_answer(self, request: Request, index: int) -> None:
        sequence = request.sequences[index]
        assert sequence.finish_reason in {"stop", "length", "abort"}
        expected = Request("expected", sequence.tokens[: request.num_prompt_tokens], request.stop).sequences[0]
        expected.index = 0
        for position in range(request.num_prompt_tokens, sequence.num_tokens):
            first = position == request.num_prompt_tokens
            token = sample(expected, request.n)[index] if first else sample(expected, 1)[0]
            assert sequence.tokens[position] == token
            expected.tokens.append(token)
            expected.index = index
        if sequence.finish_reason == "length":
            assert sequence.num_output_tokens == request.stop.max_tokens


Histories.TestCase.settings = settings(
    max_examples=2000, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
TestHistories = Histories.TestCase
