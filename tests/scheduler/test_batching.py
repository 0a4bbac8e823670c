"""The four batching modes: who is in each step."""

import pytest

from scheduler.batching import Batching, Mode
from scheduler.config import SchedulerConfig
from scheduler.request import Request, StopRule
from scheduler.scheduler import Scheduler
from scheduler.waiting_queue import Order
from tests.scheduler.memory import step_tokens


def _scheduler(mode: Mode, **batching: float) -> Scheduler:
    rule = Batching(mode=mode, **{"size": 3, "delay": 5.0, **batching})  # type: ignore[arg-type]
    return Scheduler(SchedulerConfig(num_blocks=64, block_size=4, max_num_seqs=8, batching=rule))


def _add(scheduler: Scheduler, names: str, now: float = 0.0) -> None:
    """Request `a` produces one token, `b` two, and so on."""
    for name in names:
        scheduler.add(Request(name, [ord(name)] * 3, StopRule(max_tokens=ord(name) - ord("a") + 1)), now)


def _step(scheduler: Scheduler, now: float = 0.0) -> str:
    batch = scheduler.schedule(now)
    scheduler.update(batch, step_tokens(batch))
    return "".join(item.sequence.request.request_id for item in batch.items)


def _steps(scheduler: Scheduler, count: int) -> list[str]:
    return [_step(scheduler) for _ in range(count)]


def test_continuous_a_request_joins_the_next_step_and_leaves_after_its_last() -> None:
    scheduler = _scheduler("continuous")
    _add(scheduler, "cab")
    assert _step(scheduler) == "cab"
    _add(scheduler, "b")
    assert _steps(scheduler, 3) == ["cbb", "cb", ""]


def test_none_one_request_runs_at_a_time() -> None:
    scheduler = _scheduler("none")
    _add(scheduler, "bac")
    assert _steps(scheduler, 7) == ["b", "b", "a", "c", "c", "c", ""]


def test_static_a_batch_waits_until_it_is_full_and_runs_to_its_longest() -> None:
    scheduler = _scheduler("static")
    _add(scheduler, "ac")
    assert _step(scheduler, now=1e6) == ""
    assert scheduler.next_event() is None
    _add(scheduler, "bb")
    assert _steps(scheduler, 4) == ["acb", "cb", "c", ""], "the last request waits for a batch of its own"
    assert scheduler.num_waiting == 1


def test_dynamic_a_batch_begins_when_it_is_full_or_its_first_request_has_waited_long_enough() -> None:
    scheduler = _scheduler("dynamic")
    _add(scheduler, "a", now=1.0)
    _add(scheduler, "b", now=3.0)
    assert (_step(scheduler, now=5.9), scheduler.next_event()) == ("", 6.0)
    assert _step(scheduler, now=6.0) == "ab"
    _add(scheduler, "aaaa", now=6.0)
    assert [_step(scheduler, now=6.1) for _ in range(3)] == ["b", "aaa", ""]


def test_a_batch_larger_than_the_step_is_admitted_over_several_steps() -> None:
    rule = Batching(mode="static", size=3)
    scheduler = Scheduler(SchedulerConfig(num_blocks=64, block_size=4, max_num_batched_tokens=4, batching=rule))
    _add(scheduler, "ccc")
    assert _steps(scheduler, 3) == ["cc", "ccc", "ccc"]


def test_a_member_that_ends_before_the_others_are_admitted_does_not_end_the_batch() -> None:
    rule = Batching(mode="static", size=2)
    scheduler = Scheduler(SchedulerConfig(num_blocks=64, max_num_batched_tokens=3, batching=rule))
    _add(scheduler, "aa")
    assert _steps(scheduler, 3) == ["a", "a", ""]


def test_an_aborted_member_of_a_batch_leaves_its_place_to_nobody() -> None:
    rule = Batching(mode="static", size=2)
    scheduler = Scheduler(SchedulerConfig(num_blocks=64, max_num_batched_tokens=3, batching=rule))
    _add(scheduler, "b")
    gone = Request("gone", [1, 2, 3], StopRule(max_tokens=1))
    scheduler.add(gone)
    assert _step(scheduler) == "b"
    scheduler.abort(gone)
    assert _step(scheduler) == "b"
    _add(scheduler, "a")
    assert _steps(scheduler, 2) == ["", ""]


def test_nobody_joins_a_batch_in_the_place_of_one_that_was_aborted() -> None:
    rule = Batching(mode="static", size=2)
    scheduler = Scheduler(SchedulerConfig(num_blocks=64, max_num_batched_tokens=3, batching=rule))
    _add(scheduler, "c")
    scheduler.add(gone := Request("gone", [1, 2, 3], StopRule(max_tokens=1)))
    assert _step(scheduler) == "c"
    scheduler.abort(gone)
    _add(scheduler, "ab")
    assert _steps(scheduler, 4) == ["c", "c", "a", "b"]


def test_a_request_of_higher_rank_waits_for_the_next_batch_too() -> None:
    rule, order = Batching(mode="static", size=2), Order(policy="priority")
    scheduler = Scheduler(SchedulerConfig(num_blocks=64, max_num_batched_tokens=3, batching=rule, order=order))
    _add(scheduler, "bb")
    assert _step(scheduler) == "b"
    scheduler.add(Request("urgent", [1, 2, 3], StopRule(max_tokens=1), priority=-9))
    assert _steps(scheduler, 3) == ["bb", "b", "b"]
    assert scheduler.num_waiting == 1


def test_a_delay_is_over_at_the_moment_that_was_named_for_it_however_it_rounds() -> None:
    scheduler = _scheduler("dynamic", delay=0.05)
    for number in range(200):
        scheduler.add(Request(str(number), [1], StopRule(max_tokens=1)), number / 10)
        due = scheduler.next_event()
        assert due is not None
        assert _step(scheduler, now=due) == str(number)


def test_a_batch_that_has_to_make_room_takes_its_own_back_before_the_next_begins() -> None:
    rule = Batching(mode="static", size=2)
    scheduler = Scheduler(SchedulerConfig(num_blocks=3, block_size=4, batching=rule, prefix_caching=False))
    for name in "abcd":
        scheduler.add(Request(name, [ord(name)] * 4, StopRule(max_tokens=6)))
    order: list[str] = []
    while scheduler.has_work:
        order.append(_step(scheduler))
    assert scheduler.counters.preemptions > 0
    assert "c" not in "".join(order[: max(index for index, step in enumerate(order) if "a" in step or "b" in step)])


def test_more_than_there_are_places_for_cannot_be_a_batch() -> None:
    with pytest.raises(ValueError, match="batches of 9 need as many places, not 8"):
        SchedulerConfig(num_blocks=4, max_num_seqs=8, batching=Batching(mode="dynamic", size=9))
