"""The scheduler's decisions, one at a time."""

import pytest

from scheduler.batch import ScheduledBatch
from scheduler.config import SchedulerConfig
from scheduler.request import Request, Status, StopRule
from scheduler.scheduler import Scheduler
from scheduler.waiting_queue import Order
from tests.scheduler.memory import RecordingMemory, step_tokens


def _scheduler(**limits: object) -> Scheduler:
    config = {"num_blocks": 64, "block_size": 4, "max_num_seqs": 8, "max_num_batched_tokens": 64, **limits}
    return Scheduler(SchedulerConfig(**config))  # type: ignore[arg-type]


def _request(name: str, prompt: int | list[int], max_tokens: int = 4, n: int = 1, **rule: object) -> Request:
    tokens = list(range(1, prompt + 1)) if isinstance(prompt, int) else prompt
    return Request(name, tokens, StopRule(max_tokens=max_tokens, **rule), n=n)  # type: ignore[arg-type]


def _step(scheduler: Scheduler) -> ScheduledBatch:
    batch = scheduler.schedule()
    scheduler.update(batch, step_tokens(batch))
    scheduler.check()
    return batch


def _shares(batch: ScheduledBatch) -> dict[str, int]:
    return {item.sequence.request.request_id: len(item.tokens) for item in batch.items}


def _run(scheduler: Scheduler, memory: RecordingMemory | None = None) -> int:
    steps = 0
    while scheduler.has_work:
        batch = scheduler.schedule()
        assert batch, "work is pending but nothing was scheduled"
        if memory is not None:
            memory.execute(batch)
        scheduler.update(batch, step_tokens(batch))
        scheduler.check()
        steps += 1
    return steps


def test_a_prompt_is_computed_in_one_step_and_then_one_token_a_step() -> None:
    scheduler = _scheduler()
    scheduler.add(_request("a", 10, max_tokens=3))
    assert [_shares(_step(scheduler)) for _ in range(4)] == [{"a": 10}, {"a": 1}, {"a": 1}, {}]


def test_a_long_prompt_is_computed_in_chunks_and_sampled_after_the_last() -> None:
    scheduler = _scheduler(max_num_batched_tokens=8)
    scheduler.add(_request("a", 20))
    batches = [_step(scheduler) for _ in range(3)]
    assert [_shares(b)["a"] for b in batches] == [8, 8, 4]
    assert [b.items[0].num_samples for b in batches] == [0, 0, 1]


def test_running_streams_keep_a_token_of_the_budget_while_a_long_prompt_is_computed() -> None:
    scheduler = _scheduler(max_num_batched_tokens=8)
    scheduler.add(_request("long", 30))
    _step(scheduler)
    scheduler.add(_request("b", [40, 41], n=1, max_tokens=9))
    shares = [_shares(_step(scheduler)) for _ in range(4)]
    assert shares == [{"long": 8}, {"long": 8}, {"long": 6, "b": 2}, {"long": 1, "b": 1}]


def test_streams_keep_their_token_though_the_long_prompt_goes_first() -> None:
    scheduler = _scheduler(max_num_batched_tokens=8, order=Order(policy="priority"))
    for name in "ab":
        scheduler.add(_request(name, [ord(name)], max_tokens=9))
    _step(scheduler)
    scheduler.add(Request("long", range(20), StopRule(max_tokens=1), priority=-1))
    assert [_shares(_step(scheduler)) for _ in range(4)] == [
        {"a": 1, "b": 1, "long": 6},
        {"long": 6, "a": 1, "b": 1},
        {"long": 6, "a": 1, "b": 1},
        {"long": 2, "a": 1, "b": 1},
    ]


def test_waiting_requests_are_admitted_first_come_first_served() -> None:
    scheduler = _scheduler(max_num_seqs=2)
    for name in "abc":
        scheduler.add(_request(name, [ord(name)] * 3, max_tokens=2))
    assert [list(_shares(_step(scheduler))) for _ in range(3)] == [["a", "b"], ["a", "b"], ["c"]]


def test_a_step_never_exceeds_its_token_budget() -> None:
    scheduler = _scheduler(max_num_batched_tokens=7)
    for name in "abcd":
        scheduler.add(_request(name, [ord(name)] * 5))
    while scheduler.has_work:
        assert 0 < _step(scheduler).num_tokens <= 7


def test_the_same_prompt_later_is_found_in_the_cache_but_for_its_last_token() -> None:
    scheduler, memory = _scheduler(), RecordingMemory(64, 4)
    first, second = _request("a", 12), _request("b", 12)
    scheduler.add(first)
    _run(scheduler, memory)
    scheduler.add(second)
    batch = scheduler.schedule()
    assert (first.cached_tokens, second.cached_tokens) == (0, 8)
    assert (batch.items[0].start, len(batch.items[0].tokens)) == (8, 4)


def test_the_same_prompt_in_the_same_step_is_computed_once() -> None:
    scheduler, memory = _scheduler(), RecordingMemory(64, 4)
    scheduler.add(_request("a", 9))
    scheduler.add(_request("b", 9))
    batch = scheduler.schedule()
    memory.execute(batch)
    assert _shares(batch) == {"a": 9, "b": 1}


def test_a_second_turn_finds_the_answer_of_the_first() -> None:
    scheduler = _scheduler()
    first = _request("a", 8, max_tokens=9)
    scheduler.add(first)
    _run(scheduler)
    second = _request("b", [*first.sequences[0].tokens, 7, 7])
    scheduler.add(second)
    _step(scheduler)
    assert second.cached_tokens == 16


def test_another_salt_shares_nothing() -> None:
    scheduler = _scheduler()
    for salt in ("x", "y"):
        request = Request(salt, range(12), StopRule(max_tokens=1), cache_salt=salt)
        scheduler.add(request)
        _step(scheduler)
        assert request.cached_tokens == 0


def test_without_prefix_caching_nothing_is_shared() -> None:
    scheduler = _scheduler(prefix_caching=False)
    scheduler.add(_request("a", 12))
    scheduler.add(_request("b", 12))
    assert _shares(_step(scheduler)) == {"a": 12, "b": 12}
    assert len(scheduler.pool.index) == 0


def test_continuations_share_the_prompt_and_copy_only_its_last_block() -> None:
    scheduler, memory = _scheduler(prefix_caching=False), RecordingMemory(64, 4)
    scheduler.add(_request("a", 10, n=4, max_tokens=3))
    batch = scheduler.schedule()
    memory.execute(batch)
    assert batch.items[0].num_samples == 4
    scheduler.update(batch, step_tokens(batch))
    assert (scheduler.num_running, scheduler.pool.num_used) == (4, 3)
    second = scheduler.schedule()
    memory.execute(second)
    assert len(second.transfers.copies) == 3, "the last holder writes in place"
    assert scheduler.pool.num_used == 2 + 4
    scheduler.update(second, step_tokens(second))
    assert scheduler.schedule().transfers.copies == ()


def test_continuations_of_whole_blocks_copy_nothing() -> None:
    scheduler, memory = _scheduler(), RecordingMemory(64, 4)
    scheduler.add(_request("a", 8, n=3, max_tokens=6))
    copies = 0
    while scheduler.has_work:
        batch = scheduler.schedule()
        memory.execute(batch)
        copies += len(batch.transfers.copies)
        scheduler.update(batch, step_tokens(batch))
    assert copies == 0


def test_the_sequence_admitted_last_is_preempted_and_its_tokens_are_kept() -> None:
    scheduler, memory = _scheduler(num_blocks=5, prefix_caching=False), RecordingMemory(5, 4)
    old, young = _request("old", [9] * 8, max_tokens=8), _request("young", [8] * 7, max_tokens=8)
    scheduler.add(old)
    scheduler.add(young)
    while not scheduler.counters.preemptions:
        batch = scheduler.schedule()
        memory.execute(batch)
        scheduler.update(batch, step_tokens(batch))
    assert (old.sequences[0].status, young.sequences[0].status) == (Status.RUNNING, Status.WAITING)
    assert young.sequences[0].num_output_tokens > 0
    scheduler.add(newcomer := _request("new", [7]))
    assert newcomer.sequences[0].status is Status.WAITING
    _run(scheduler, memory)
    assert (old.sequences[0].num_output_tokens, young.sequences[0].num_output_tokens) == (8, 8)


@pytest.mark.parametrize(("policy", "goes"), [("fcfs", "late"), ("fair", "late"), ("priority", "early")])
def test_a_priority_makes_room_at_others_cost_only_where_it_is_the_order(policy: str, goes: str) -> None:
    scheduler = _scheduler(num_blocks=4, order=Order(policy=policy), prefix_caching=False)  # type: ignore[arg-type]
    for name, priority in (("early", 0), ("late", -9)):
        request = Request(name, [1] * 8, StopRule(max_tokens=8), priority=priority, tenant=name)
        scheduler.add(request)
    while not _step(scheduler).num_preempted:
        pass
    assert [sequence.request.request_id for sequence in scheduler._returning] == [goes]


def test_preemption_does_not_change_what_is_generated() -> None:
    outputs = []
    for num_blocks in (9, 64):
        scheduler, memory = _scheduler(num_blocks=num_blocks), RecordingMemory(num_blocks, 4)
        requests = [_request(str(i), [i] * (5 + i), max_tokens=12, n=1 + i % 3) for i in range(6)]
        for request in requests:
            scheduler.add(request)
        _run(scheduler, memory)
        outputs.append(
            {(r.request_id, s.index): list(s.tokens[r.num_prompt_tokens :]) for r in requests for s in r.sequences}
        )
        assert (scheduler.counters.preemptions > 0) == (num_blocks == 9)
    assert outputs[0] == outputs[1]


def test_a_continuation_that_finds_its_place_taken_waits_for_one() -> None:
    scheduler = _scheduler(max_num_seqs=4, max_num_batched_tokens=4)
    beams = Request("beams", [1], StopRule(max_tokens=9), beam_width=2)
    scheduler.add(beams)
    for extensions in ((0, 0), (0,)):  # a search may have fewer beams for a time
        _step(scheduler)
        scheduler.advance(beams, [(beams.sequences[index], 5) for index in extensions])
    forking = _request("n", 4, n=3, max_tokens=3)
    scheduler.add(forking)
    _step(scheduler)
    scheduler.advance(beams, [(beams.sequences[0], 5)] * 2)
    for _ in range(6):
        _step(scheduler)
        assert scheduler.num_running <= 4
    assert [sequence.finish_reason for sequence in forking.sequences] == ["length"] * 3


def test_a_stop_token_ends_a_sequence_but_not_before_min_tokens() -> None:
    rule = StopRule(max_tokens=5, min_tokens=2, stop_token_ids=frozenset({3}))
    assert [rule.finish_reason(i, 3) for i in (1, 2, 3)] == [None, None, "stop"]
    assert rule.finish_reason(5, 4) == "length"


@pytest.mark.parametrize("moment", ["queued", "prefilling", "forked"])
def test_an_abort_frees_everything_at_once(moment: str) -> None:
    scheduler = _scheduler(max_num_batched_tokens=8)
    request = _request("a", 12, n=3)
    scheduler.add(request)
    for _ in range(["queued", "prefilling", "forked"].index(moment) * 2 - (moment == "prefilling")):
        _step(scheduler)
    scheduler.abort(request)
    scheduler.abort(request)
    assert request.finished
    assert {s.finish_reason for s in request.sequences} == {"abort"}
    assert (scheduler.has_work, scheduler.pool.num_used) == (False, 0)


def test_a_request_that_wants_no_token_ends_with_its_prompt_and_leaves_it_in_the_cache() -> None:
    scheduler = _scheduler(max_num_batched_tokens=6)
    request = _request("a", 9, max_tokens=0, n=2)
    scheduler.add(request)
    assert [item.num_samples for item in (*_step(scheduler).items, *_step(scheduler).items)] == [0, 0]
    assert [sequence.finish_reason for sequence in request.sequences] == ["length"]
    assert not scheduler.has_work
    scheduler.add(later := _request("b", 9, max_tokens=0))
    assert (_run(scheduler), later.cached_tokens) == (1, 8)


@pytest.mark.parametrize(("first", "cached"), [(0, 0), (5, 4), (8, 8), (9, 8)])
def test_what_is_observed_is_computed_and_only_what_is_before_it_comes_from_the_cache(first: int, cached: int) -> None:
    scheduler = _scheduler(max_num_batched_tokens=3)
    scheduler.add(_request("a", 9))
    _run(scheduler)
    request = Request("b", range(1, 10), StopRule(max_tokens=2), observed=range(first, 9))
    scheduler.add(request)
    positions: list[int] = []
    while scheduler.has_work:
        positions += [position for item in _step(scheduler).items for position in item.observed]
    assert request.cached_tokens == cached
    assert positions == list(request.observed)


def test_an_abort_while_the_step_runs_leaves_no_token_behind() -> None:
    scheduler = _scheduler()
    kept, gone = _request("kept", 5), _request("gone", [9] * 5, n=2)
    scheduler.add(kept)
    scheduler.add(gone)
    batch = scheduler.schedule()
    scheduler.abort(gone)
    appended = scheduler.update(batch, step_tokens(batch))
    assert [a.sequence.request for a in appended] == [kept]
    scheduler.check()


def test_a_request_that_can_never_fit_is_refused_with_its_size_in_tokens() -> None:
    scheduler = _scheduler(num_blocks=4)
    with pytest.raises(ValueError, match="need 17 tokens of KV cache, but the cache holds 16"):
        scheduler.add(_request("a", 13, max_tokens=4))
    with pytest.raises(ValueError, match="9 sequences are more than the 8 that run"):
        scheduler.add(_request("b", 2, n=9))
    scheduler.add(_request("c", 12, max_tokens=4))
    _run(scheduler)


def test_more_samples_than_were_scheduled_are_an_error() -> None:
    scheduler = _scheduler()
    scheduler.add(_request("a", 3))
    with pytest.raises(ValueError, match="1 tokens were to be sampled, 2 came"):
        scheduler.update(scheduler.schedule(), [[1, 2]])
