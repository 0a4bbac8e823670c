"""Deadlines and the time in the queue: who is ended when, and when to look again."""

import pytest

from scheduler.config import SchedulerConfig
from scheduler.request import Request, StopRule
from scheduler.scheduler import Scheduler
from tests.scheduler.memory import step_tokens


def _scheduler(**limits: float | None) -> Scheduler:
    return Scheduler(SchedulerConfig(**{"num_blocks": 64, "max_num_seqs": 2, **limits}))  # type: ignore[arg-type]


def _add(scheduler: Scheduler, name: str, now: float = 0.0, deadline: float | None = None, n: int = 1) -> Request:
    request = Request(name, [1, 2, 3], StopRule(max_tokens=99), n=n, deadline=deadline)
    scheduler.add(request, now)
    return request


def _step(scheduler: Scheduler, now: float = 0.0) -> None:
    batch = scheduler.schedule(now)
    scheduler.update(batch, step_tokens(batch))


@pytest.mark.parametrize("steps", [0, 1, 5], ids=["queued", "forked", "decoding"])
def test_a_request_ends_at_its_deadline_wherever_it_is_and_once(steps: int) -> None:
    scheduler = _scheduler()
    late, other = _add(scheduler, "late", deadline=7.0, n=2), _add(scheduler, "other", deadline=8.0)
    for _ in range(steps):
        _step(scheduler)
    assert scheduler.expire(6.9) == []
    assert scheduler.expire(7.0) == [late]
    assert scheduler.expire(7.0) == []
    assert {sequence.finish_reason for sequence in late.sequences} == {"timeout"}
    scheduler.check()
    assert (other.finished, scheduler.next_event()) == (False, 8.0)
    assert scheduler.expire(9.0) == [other]
    assert (scheduler.has_work, scheduler.pool.num_used) == (False, 0)


def test_the_time_in_the_queue_counts_until_the_first_step_only() -> None:
    scheduler = _scheduler(queue_timeout=3.0, max_num_seqs=1)
    running, first, second = (_add(scheduler, name, now) for name, now in (("running", 0.0), ("a", 1.0), ("b", 2.0)))
    _step(scheduler)
    assert scheduler.next_event() == 4.0
    assert scheduler.expire(3.9) == []
    assert scheduler.expire(4.0) == [first]
    assert scheduler.next_event() == 5.0
    assert scheduler.expire(99.0) == [second]
    assert (scheduler.next_event(), running.finished) == (None, False)


def test_what_has_ended_by_itself_does_not_time_out() -> None:
    scheduler = _scheduler()
    scheduler.abort(request := _add(scheduler, "a", deadline=1.0))
    assert scheduler.expire(2.0) == []
    assert request.sequences[0].finish_reason == "abort"


def test_deadlines_of_what_has_ended_do_not_fill_the_memory_and_the_others_stay() -> None:
    scheduler = _scheduler()
    kept = _add(scheduler, "kept", deadline=5.0)
    for number in range(1_000):
        scheduler.abort(_add(scheduler, str(number), deadline=9.0))
    assert len(scheduler._deadlines) < 100
    assert scheduler.expire(5.0) == [kept]
