"""No request starves, though others that go before it keep coming."""

from itertools import count

import pytest

from scheduler.config import SchedulerConfig
from scheduler.request import Request, StopRule
from scheduler.scheduler import Scheduler
from scheduler.waiting_queue import TOKENS_PER_AGEING, Order
from tests.scheduler.memory import step_tokens


def _step(scheduler: Scheduler, now: float) -> None:
    batch = scheduler.schedule(now)
    scheduler.update(batch, step_tokens(batch))


def _begins_after(scheduler: Scheduler, patient: Request, *, priority: int = 0, seconds: int = 1_000) -> int:
    """Seconds until ``patient`` begins, while each second a new tenant's request comes and one request is served."""
    scheduler.add(patient, 0.0)
    for second in range(seconds):
        scheduler.add(Request(str(second), [1], StopRule(max_tokens=1), priority=priority, tenant=str(second)), second)
        _step(scheduler, second)
        if patient.cached_tokens is not None:
            return second
    raise AssertionError("it starves")


def _one_place(order: Order) -> Scheduler:
    return Scheduler(SchedulerConfig(num_blocks=64, max_num_seqs=1, order=order))


def test_the_lowest_priority_waits_so_many_levels_times_the_ageing() -> None:
    scheduler = _one_place(Order(policy="priority", ageing=4.0))
    assert _begins_after(scheduler, Request("patient", [1], StopRule(max_tokens=1), priority=5), priority=-5) == 40


def test_a_tenant_that_was_given_much_waits_until_its_share_is_made_up_for() -> None:
    scheduler = _one_place(Order(policy="fair", ageing=10.0))
    scheduler.add(Request("much", [1] * 900, StopRule(max_tokens=101), tenant="greedy"), 0.0)
    while scheduler.has_work:
        _step(scheduler, 0.0)
    assert scheduler.num_waiting == 0
    begins = _begins_after(scheduler, Request("patient", [1], StopRule(max_tokens=1), tenant="greedy"))
    assert begins == pytest.approx(1_000 * 10.0 / TOKENS_PER_AGEING, abs=1)


def test_whoever_came_first_is_first_served_whatever_comes_later() -> None:
    assert _begins_after(_one_place(Order()), Request("patient", [1], StopRule(max_tokens=1), priority=9)) == 0


@pytest.mark.parametrize("policy", ["fcfs", "priority", "fair"])
@pytest.mark.parametrize("num_host_blocks", [0, 16])
def test_who_had_to_make_room_comes_back_though_newcomers_keep_coming(policy: str, num_host_blocks: int) -> None:
    config = SchedulerConfig(
        num_blocks=6,
        num_host_blocks=num_host_blocks,
        block_size=4,
        prefix_caching=False,
        order=Order(policy=policy, ageing=1.0),  # type: ignore[arg-type]
    )
    scheduler, first = Scheduler(config), [Request(name, [1] * 8, StopRule(max_tokens=16)) for name in "ab"]
    for request in first:
        scheduler.add(request, 0.0)
    for step in count():
        scheduler.add(Request(str(step), [2] * 4, StopRule(max_tokens=4), priority=-5, tenant=str(step)), step)
        _step(scheduler, step)
        if all(request.finished for request in first):
            break
        assert step < 60, "it starves"
    assert scheduler.counters.preemptions > 0
