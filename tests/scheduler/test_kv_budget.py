"""KV budgets: what they promise in integers, and random histories in which requests with all kinds of them mix."""

from array import array
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from scheduler.batch import Compaction, ScheduledBatch
from scheduler.config import SchedulerConfig
from scheduler.kv_budget import KVBudget, Selection, Window
from scheduler.request import Request, Status, StopRule
from scheduler.scheduler import Scheduler
from tests.scheduler.memory import Content, RecordingMemory, step_tokens

windows = st.builds(Window, window=st.integers(1, 12), sinks=st.integers(0, 6))
own_windows = st.builds(Window, window=st.integers(1, 12), own=st.just(True))
selections = st.builds(
    Selection,
    slots=st.integers(1, 10),
    slack=st.none() | st.integers(1, 5),
    prompt_slack=st.none() | st.integers(1, 8),
    counted=st.sampled_from(["none", "all", 2]),
)


@given(
    budget=windows | own_windows,
    block_size=st.sampled_from([1, 2, 4, 16]),
    chunks=st.lists(st.integers(1, 20), max_size=12),
)
def test_a_window_drops_just_the_blocks_that_no_token_to_come_sees(
    budget: Window, block_size: int, chunks: list[int]
) -> None:
    blocks: list[int] = []  # of the table, by the position at which each begins
    computed = dropped = 0
    for chunk in chunks:
        first, count = budget.droppable(computed, dropped, block_size)
        gone = blocks[first : first + count]
        del blocks[first : first + count]
        dropped += count * block_size
        seen = {p for p in range(computed) if p < budget.sinks or computed - p < budget.window}
        assert not any(begin <= p < begin + block_size for begin in gone for p in seen)
        later = [begin for begin in blocks if begin >= budget.num_sink_blocks(block_size) * block_size]
        assert all(
            any(begin <= p < begin + block_size for p in seen) for begin in later if begin + block_size <= computed
        )
        while dropped + len(blocks) * block_size < computed + chunk:
            blocks.append(dropped + len(blocks) * block_size)
        assert len(blocks) <= budget.max_blocks(chunk, block_size)
        computed += chunk


@given(budget=selections, num_prompt=st.integers(1, 30), steps=st.lists(st.integers(1, 9), max_size=30))
def test_when_a_selection_is_due_does_not_depend_on_the_chunks(
    budget: Selection, num_prompt: int, steps: list[int]
) -> None:
    def selections_at(wanted: list[int]) -> list[int]:
        """The numbers of computed tokens at which the policy selects."""
        sequence = Request("r", [0] * num_prompt, StopRule(max_tokens=1), kv_budget=budget).sequences[0]
        found = []
        for number in wanted:
            left = number
            while left:
                if budget.is_due(sequence.num_slots, sequence.prompt_left):
                    found.append(sequence.num_computed_tokens)
                    now = min(left, sequence.max_step)
                    sequence.num_dropped += sequence.num_slots - budget.slots
                else:
                    now = min(left, sequence.max_step)
                sequence.num_computed_tokens += now
                left -= now
                if budget.slack is not None and budget.prompt_slack is not None:
                    assert sequence.num_slots <= budget.slots + max(budget.slack, budget.prompt_slack)
        return found

    assert selections_at(steps) == selections_at([1] * sum(steps))


def test_a_selection_at_the_prompts_end_only_is_made_once() -> None:
    """9 prompt tokens of which 4 stay, and 20 more: nothing falls away before the 9th is computed, nor ever after."""
    scheduler = Scheduler(SchedulerConfig(num_blocks=20, block_size=2, max_num_batched_tokens=4))
    budget = Selection(slots=4, slack=None, prompt_slack=None, counted=3)
    scheduler.add(Request("r", range(9), StopRule(max_tokens=20), kv_budget=budget))
    selected = []
    while scheduler.has_work:
        batch = scheduler.schedule()
        selected += [(batch.items[0].start, one.num_slots, one.num_kept) for one in batch.compactions]
        scheduler.update(batch, step_tokens(batch))
    assert selected == [(9, 9, 4)]


@pytest.mark.parametrize("fields", [{"window": 0}, {"window": 1, "sinks": -1}])
def test_a_window_that_sees_nothing_is_refused(fields: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="a window has at least 1 token"):
        Window(**fields)


def test_a_models_own_window_has_no_sinks() -> None:
    with pytest.raises(ValueError, match="own window has no sinks"):
        Window(window=4, sinks=1, own=True)


@pytest.mark.parametrize(
    "fields", [{"slots": 0}, {"slots": 1, "slack": 0}, {"slots": 1, "prompt_slack": 0}, {"slots": 1, "slack": -1}]
)
def test_a_selection_of_nothing_is_refused(fields: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="a selection has at least 1 slot"):
        Selection(**fields)


def test_only_what_a_budget_leaves_as_it_is_comes_from_the_prefix_cache() -> None:
    """Of a prompt of 12 tokens in blocks of 2, cached whole, a window of 5 with 2 sinks finds the first 6, as does a
    selection of 4 with a slack of 4; one that counts attention finds none."""
    found = {}
    for budget in (
        None,
        Window(window=5, sinks=2),
        Selection(slots=4, slack=4, prompt_slack=4),
        Selection(slots=4, counted="all"),
    ):
        scheduler = Scheduler(SchedulerConfig(num_blocks=40, block_size=2))
        for number, kv_budget in enumerate((None, budget)):
            scheduler.add(Request(str(number), range(13), StopRule(max_tokens=1), kv_budget=kv_budget))
            while scheduler.has_work:
                batch = scheduler.schedule()
                last = batch.items[0].sequence.request
                scheduler.update(batch, step_tokens(batch))
        found[budget] = last.cached_tokens
    assert list(found.values()) == [12, 6, 6, 0]


class Own:
    """The scheduler of a model whose every layer has a window of 4 tokens, in blocks of 2, fed one prompt at a time."""

    def __init__(self, num_blocks: int, **limits: Any) -> None:
        self.scheduler = Scheduler(SchedulerConfig(num_blocks=num_blocks, block_size=2, **limits))
        self.memory = BudgetedMemory(num_blocks, 2, limits.get("num_host_blocks", 0))
        self.most = 0
        self.evicted = 0

    def cached(self, prompt: list[int], budget: KVBudget | None = Window(window=4, own=True)) -> int:  # noqa: B008
        """Serve a prompt, of which one token comes; how much of it the prefix cache had."""
        request = Request("r", prompt, StopRule(max_tokens=1), kv_budget=budget)
        self.scheduler.add(request)
        while self.scheduler.has_work:
            batch = self.scheduler.schedule()
            self.memory.execute(batch)
            self.most = max(self.most, self.scheduler.pool.num_used)
            self.evicted += sum(count for _, count in batch.evicted)
            self.scheduler.update(batch, step_tokens(batch))
        self.scheduler.check()
        assert request.cached_tokens is not None
        return request.cached_tokens


PROMPT = [*range(100, 121)]


def test_a_models_own_window_is_held_and_nothing_before_it() -> None:
    served = Own(num_blocks=40, max_num_batched_tokens=3)
    served.cached(PROMPT)
    assert served.most == Window(window=4, own=True).max_blocks(3, 2) == 4


def test_what_the_models_own_window_has_left_was_evicted_by_nobody() -> None:
    own, policys = Own(num_blocks=40, max_num_batched_tokens=3), Own(num_blocks=40, max_num_batched_tokens=3)
    own.cached(PROMPT)
    policys.cached(PROMPT, Window(window=4))
    assert (own.evicted, policys.evicted) == (0, 14)


def test_behind_the_models_own_window_prefixes_are_found_as_well() -> None:
    """All of 21 tokens but the last, in blocks of 2; of a narrower window's, those whose KV that left as it is."""
    served = Own(num_blocks=40, max_num_batched_tokens=3)
    assert served.cached(PROMPT) == 0
    assert served.cached(PROMPT) == 20
    assert served.cached([*PROMPT, *range(10)]) == 20
    assert served.cached([*PROMPT[:9], *range(10)]) == 8
    assert served.cached([*PROMPT[:9], *range(10)], Window(window=3)) == 2
    assert served.cached([7, *PROMPT[1:]]) == 0


def test_a_prefix_is_found_by_its_last_window_alone() -> None:
    """In 6 blocks those of the prompt's beginning were used again by the time that it ended."""
    served = Own(num_blocks=6, max_num_batched_tokens=3)
    served.cached(PROMPT)
    assert served.cached(PROMPT[:9]) == 0
    served = Own(num_blocks=6, max_num_batched_tokens=3)
    served.cached(PROMPT)
    assert served.cached(PROMPT) == 20


def test_a_window_of_which_one_block_is_missing_is_computed_anew() -> None:
    served = Own(num_blocks=40, max_num_batched_tokens=64)
    served.cached(PROMPT)
    index = served.scheduler.pool.index
    blocks = [index.find(key) for key in Request("r", PROMPT, StopRule(max_tokens=1)).sequences[0].block_keys(10, 2)]
    assert None not in blocks
    index.forget(blocks[8] or 0)
    assert served.cached(PROMPT) == 16
    index.forget(blocks[7] or 0)
    assert served.cached(PROMPT) == 20  # the eighth was computed anew, and the seventh is not needed
    assert served.cached(PROMPT[:18]) == 14


def test_what_the_device_has_forgotten_of_a_window_the_host_still_has() -> None:
    served = Own(num_blocks=6, num_host_blocks=40, max_num_batched_tokens=3)
    served.cached(PROMPT)
    served.cached([*range(30)])
    assert served.cached(PROMPT) == 20
    assert served.cached(PROMPT[:9]) == 8


class BudgetedMemory(RecordingMemory):
    """Knows what a table of slots holds after blocks fell away, and selects: by contents alone."""

    def execute(self, batch: ScheduledBatch) -> None:
        """Write what the batch computes; every slot of a sequence then holds a token of its own past, each once."""
        self.transfer(batch.transfers)
        self._compact(batch.compactions)
        for item in batch.items:
            past = tuple(item.sequence.tokens)
            for position in range(item.start, item.start + len(item.tokens)):
                block, offset = self._place(item.block_table, position - item.num_dropped)
                self._slots[block][offset] = past[: position + 1]
        for item in batch.items:
            past, end = tuple(item.sequence.tokens), item.start + len(item.tokens)
            held = [self._read(item.block_table, slot) for slot in range(end - item.num_dropped)]
            assert all(content == past[: len(content)] for content in held), "a sequence holds KV that is not its own"
            positions = [len(content) - 1 for content in held]
            assert positions == sorted(set(positions)), "out of order, or twice"
            if isinstance(item.kv_budget, Window):
                first = max(item.start - item.kv_budget.window + 1, 0)
                assert {*range(min(item.kv_budget.sinks, end)), *range(first, end)} <= set(positions)
            elif item.kv_budget is None:
                assert positions == list(range(end))

    def _compact(self, compactions: tuple[Compaction, ...]) -> None:
        selected = []
        for one in compactions:
            held = [self._read(one.source, slot) for slot in range(one.num_slots)]
            selected.append(
                sorted(sorted(held, key=lambda past: hash((sum(past), len(past))))[: one.num_kept], key=len)
            )
        written: set[tuple[int, int]] = set()
        for one, kept in zip(compactions, selected, strict=True):
            for slot, content in enumerate(kept):
                block, offset = self._place(one.target, slot)
                assert (block, offset) not in written, "two selections go to one place"
                written.add((block, offset))
                self._slots[block][offset] = content

    def _place(self, table: "array[int]", slot: int) -> tuple[int, int]:
        return table[slot // self.block_size], slot % self.block_size

    def _read(self, table: "array[int]", slot: int) -> Content:
        block, offset = self._place(table, slot)
        content = self._slots[block][offset]
        assert content is not None, "a slot was read before it was written"
        return content


class Budgets(RuleBasedStateMachine):
    """Requests with and without budgets in one pool that is too small for them."""

    @initialize(
        num_slots=st.sampled_from([20, 48]),
        block_size=st.sampled_from([1, 2, 4]),
        max_num_batched_tokens=st.integers(1, 24),
        num_host_blocks=st.sampled_from([0, 40]),
        prefix_caching=st.booleans(),
    )
    def start(self, num_slots: int, block_size: int, **limits: Any) -> None:
        self.config = SchedulerConfig(
            num_blocks=num_slots // block_size, block_size=block_size, max_num_seqs=6, **limits
        )
        self.scheduler = Scheduler(self.config)
        self.memory = BudgetedMemory(self.config.num_blocks, block_size, self.config.num_host_blocks)
        self.requests: list[Request] = []

    @rule(
        budget=st.one_of(st.none(), windows, own_windows, selections),
        prompt=st.sampled_from([[1] * 3, [1] * 14, [1] * 9 + [2] * 9, [3]]),
        n=st.integers(1, 3),
        max_tokens=st.integers(1, 20),
    )
    def add(self, budget: KVBudget | None, prompt: list[int], n: int, max_tokens: int) -> None:
        stop = StopRule(max_tokens=max_tokens)
        request = Request(str(len(self.requests)), prompt, stop, n=n, kv_budget=budget)
        if self.config.refusal(request.max_num_tokens, n, budget) is None:
            self.scheduler.add(request)
            self.requests.append(request)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.scheduler.abort(data.draw(st.sampled_from(self.requests)))

    @rule(count=st.integers(1, 10))
    def steps(self, count: int) -> None:
        for _ in range(count):
            batch = self.scheduler.schedule()
            self.memory.execute(batch)
            for item in batch.items:
                if item.kv_budget is not None:
                    most = item.kv_budget.max_blocks(len(item.tokens), self.config.block_size)
                    assert len(item.block_table) <= most, "more blocks than the budget says"
            self.scheduler.check()
            self.scheduler.update(batch, step_tokens(batch))

    @rule(executed=st.booleans(), tainted=st.booleans())
    def lose_a_step(self, executed: bool, tainted: bool) -> None:
        """The step fails before anything is done, or is computed with a request that turns out to be broken."""
        batch = self.scheduler.schedule()
        if executed and batch.items:
            self.memory.execute(batch)
            self.scheduler.abort(batch.items[0].sequence.request, tainted=tainted)
            self.scheduler.update(batch, step_tokens(batch))
        else:
            self.scheduler.discard(batch)

    @invariant()
    def every_reference_is_owned(self) -> None:
        if hasattr(self, "scheduler"):
            self.scheduler.check()

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        for _ in range(3000):
            if not self.scheduler.has_work:
                break
            self.steps(1)
        assert not self.scheduler.has_work, "a request does not end"
        assert self.scheduler.pool.num_used == 0
        assert all(s.status is Status.FINISHED for request in self.requests for s in request.sequences)


TestBudgets = Budgets.TestCase
TestBudgets.settings = settings(
    max_examples=120, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
)
