"""Who is next: first come, by priority, or by fair shares; and nobody waits for ever."""

from collections import Counter

import pytest

from scheduler import waiting_queue
from scheduler.config import SchedulerConfig
from scheduler.request import Request, StopRule
from scheduler.scheduler import Scheduler
from scheduler.waiting_queue import TOKENS_PER_AGEING, Order, WaitingQueue
from tests.scheduler.memory import step_tokens


class _Queue:
    """A queue, and requests by name."""

    def __init__(self, order: Order) -> None:
        self.order, self.queue, self.serial = order, WaitingQueue(order), 0

    def add(self, name: str, *, tokens: int = 1, priority: int = 0, tenant: str = "", arrival: float = 0.0) -> Request:
        request = Request(name, [1] * tokens, StopRule(max_tokens=1), priority=priority, tenant=tenant)
        self.serial += 1
        request.arrival = arrival
        request.rank = self.order.rank(request, self.serial)
        self.queue.add(request)
        return request

    def drain(self, *, charge: int = 0) -> list[str]:
        names = []
        while (head := self.queue.head()) is not None:
            self.queue.admit(head)
            if charge:
                self.queue.charge(head, charge)
            names.append(head.request_id)
        return names


def test_first_come_first_served_whatever_the_priority() -> None:
    queue = _Queue(Order())
    for name, priority in (("a", 5), ("b", -5), ("c", 0)):
        queue.add(name, priority=priority)
    assert queue.drain() == ["a", "b", "c"]


def test_the_lowest_priority_number_goes_first_and_equals_in_order_of_arrival() -> None:
    queue = _Queue(Order(policy="priority"))
    for name, priority in (("a", 1), ("b", 0), ("c", 1), ("d", -1)):
        queue.add(name, priority=priority)
    assert queue.drain() == ["d", "b", "a", "c"]


def test_waiting_makes_up_for_priority() -> None:
    queue = _Queue(Order(policy="priority", ageing=10.0))
    queue.add("patient", priority=3, arrival=0.0)
    queue.add("soon", priority=0, arrival=29.0)
    queue.add("late", priority=0, arrival=31.0)
    assert queue.drain() == ["soon", "patient", "late"]


def test_tenants_take_turns_by_the_tokens_they_were_given() -> None:
    queue = _Queue(Order(policy="fair"))
    for number in range(6):
        queue.add(f"flood{number}", tenant="flood")
    for number in range(2):
        queue.add(f"other{number}", tenant="other")
    assert queue.drain(charge=10) == ["flood0", "other0", "flood1", "other1", "flood2", "flood3", "flood4", "flood5"]


def test_a_tenant_that_was_away_has_saved_nothing_up() -> None:
    queue = _Queue(Order(policy="fair"))
    for number in range(50):
        queue.add(f"a{number}", tenant="a")
    queue.drain(charge=100)
    for number in range(3):
        queue.add(f"a{number}", tenant="a")
        queue.add(f"new{number}", tenant="new")
    assert Counter(name[0] for name in queue.drain(charge=100)[:4]) == {"a": 2, "n": 2}


def test_waiting_makes_up_for_tokens_that_were_given() -> None:
    queue = _Queue(Order(policy="fair", ageing=10.0))
    queue.queue.charge(queue.add("heavy", tenant="heavy", arrival=0.0), 3 * TOKENS_PER_AGEING)
    queue.add("soon", tenant="b", arrival=29.0)
    queue.add("late", tenant="c", arrival=31.0)
    assert queue.drain() == ["soon", "heavy", "late"]


def test_within_a_tenant_priority_decides() -> None:
    queue = _Queue(Order(policy="fair"))
    queue.add("a", tenant="x", priority=1)
    queue.add("b", tenant="x", priority=0)
    assert queue.drain() == ["b", "a"]


def test_what_is_taken_out_is_not_served_and_not_counted() -> None:
    queue = _Queue(Order(policy="fair"))
    requests = [queue.add(str(number), tokens=number + 1, tenant=str(number % 2)) for number in range(6)]
    for request in (requests[0], requests[3], requests[0]):
        queue.queue.remove(request)
    assert (len(queue.queue), queue.queue.num_tokens, queue.queue.oldest) == (4, 2 + 3 + 5 + 6, requests[1])
    assert queue.drain() == ["1", "2", "4", "5"]
    assert (len(queue.queue), queue.queue.num_tokens, queue.queue.oldest) == (0, 0, None)


def test_tenants_without_end_do_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting_queue, "_MAX_TENANTS_REMEMBERED", 100)
    queue = _Queue(Order(policy="fair"))
    for number in range(250):
        queue.add("r", tenant=str(number))
        queue.drain(charge=1)
    assert len(queue.queue._served) <= 100


def test_tenants_that_wait_are_not_searched_for_one_to_forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting_queue, "_MAX_TENANTS_REMEMBERED", 10)
    queue = _Queue(Order(policy="fair"))
    waiting = [queue.add("r", tenant=str(number)) for number in range(50)]
    monkeypatch.setattr(WaitingQueue, "_forget_tenants", lambda _: pytest.fail("there is none"))
    queue.queue.charge(waiting[0], 1)


def test_requests_without_end_that_leave_before_their_turn_do_not_fill_the_memory() -> None:
    queue = _Queue(Order())
    queue.add("first")
    for number in range(1_000):
        queue.queue.remove(queue.add(str(number)))
    assert len(queue.queue._heaps[""]) < 100
    assert queue.drain() == ["first"]


def test_those_that_begin_together_are_the_first_in_order() -> None:
    queue = _Queue(Order(policy="priority"))
    for name, priority in (("a", 1), ("b", 0), ("c", 1), ("d", -1)):
        queue.add(name, priority=priority)
    assert [request.request_id for request in queue.queue.first(3)] == ["d", "b", "a"]
    assert len(queue.queue) == 4
    assert len(queue.queue.first(9)) == 4


def test_those_that_begin_together_are_the_first_of_each_tenant_in_turn() -> None:
    queue = _Queue(Order(policy="fair"))
    for name, tenant, priority in (("a", "x", 1), ("b", "x", 0), ("c", "y", 1), ("d", "y", 0)):
        queue.add(name, tenant=tenant, priority=priority)
    queue.queue.remove(queue.add("gone", tenant="y", priority=-1))
    queue.queue.charge(queue.queue.first(1)[0], 10)
    assert [request.request_id for request in queue.queue.first(9)] == ["d", "c", "b", "a"]


@pytest.mark.parametrize("ageing", [0.0, -1.0, float("inf"), float("nan")])
def test_waiting_counts_for_something(ageing: float) -> None:
    with pytest.raises(ValueError, match="ageing takes more than no time"):
        Order(policy="fair", ageing=ageing)


def test_two_tenants_get_equal_shares_though_one_sends_ten_times_as_much() -> None:
    scheduler = Scheduler(SchedulerConfig(num_blocks=64, max_num_seqs=4, order=Order(policy="fair")))
    for number in range(220):
        tenant = "small" if number % 11 == 0 else "flood"
        scheduler.add(Request(str(number), [number] * 8, StopRule(max_tokens=8), tenant=tenant))
    given: Counter[str] = Counter()
    while given["small"] < 20 * 15:
        batch = scheduler.schedule()
        for item in batch.items:
            given[item.sequence.request.tenant] += len(item.tokens)
        scheduler.update(batch, step_tokens(batch))
    assert 0.8 < given["flood"] / given["small"] < 1.25
