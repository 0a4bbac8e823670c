"""The host tier: what is swapped out comes back as it was, and what the device forgets is found again."""

import pytest

from scheduler.config import SchedulerConfig
from scheduler.request import Request, Status, StopRule
from scheduler.scheduler import Scheduler
from scheduler.waiting_queue import Order
from tests.scheduler.memory import RecordingMemory, step_tokens


class _Tiers:
    """A scheduler with a host tier, and an oracle of both memories."""

    def __init__(self, num_blocks: int, num_host_blocks: int, **config: object) -> None:
        self.scheduler = Scheduler(
            SchedulerConfig(num_blocks=num_blocks, num_host_blocks=num_host_blocks, block_size=4, **config)  # type: ignore[arg-type]
        )
        self.memory = RecordingMemory(num_blocks, 4, num_host_blocks)

    def add(self, name: str, prompt: list[int], max_tokens: int = 1) -> Request:
        request = Request(name, prompt, StopRule(max_tokens=max_tokens))
        self.scheduler.add(request)
        return request

    def step(self) -> int:
        batch = self.scheduler.schedule()
        self.memory.execute(batch)
        self.scheduler.update(batch, step_tokens(batch))
        self.scheduler.check()
        return batch.num_tokens

    def run(self) -> int:
        """All tokens that were computed until nothing was left to do."""
        tokens = 0
        while self.scheduler.has_work:
            tokens += self.step()
        return tokens


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_a_swapped_out_sequence_goes_on_where_it_was(prefix_caching: bool) -> None:
    tiers = _Tiers(5, 8, prefix_caching=prefix_caching)
    old, young = tiers.add("old", [9] * 8, max_tokens=8), tiers.add("young", [8] * 7, max_tokens=8)
    computed = 0
    while not tiers.scheduler.counters.preemptions:
        computed += tiers.step()
    sequence = young.sequences[0]
    assert (sequence.status, len(sequence.block_table)) == (Status.WAITING, 0)
    assert sequence.num_computed_tokens == sequence.num_tokens - 1
    assert tiers.scheduler.host_pool is not None
    assert tiers.scheduler.host_pool.num_used == len(sequence.host_table) > 0
    computed += tiers.run()
    assert computed == 8 + 7 + 7 + 7, "every token was computed once"
    assert old.finished
    assert young.sequences[0].num_output_tokens == 8
    assert tiers.scheduler.host_pool.num_used == 0


def test_without_room_on_the_host_a_sequence_is_recomputed() -> None:
    tiers = _Tiers(5, 1, prefix_caching=False)
    for name in ("old", "young"):
        tiers.add(name, [ord(name[0])] * 8, max_tokens=8)
    assert tiers.run() > 2 * (8 + 7)
    assert tiers.scheduler.counters.blocks_swapped_out == 0


def test_recompute_never_swaps_but_the_tier_still_holds_prefixes() -> None:
    tiers = _Tiers(5, 8, preemption="recompute")
    for name in ("old", "young"):
        tiers.add(name, [ord(name[0])] * 8, max_tokens=8)
    tiers.run()
    assert tiers.scheduler.counters.preemptions > 0


def test_an_abort_of_a_swapped_out_sequence_frees_its_host_blocks() -> None:
    tiers = _Tiers(5, 8)
    tiers.add("old", [9] * 8, max_tokens=8)
    young = tiers.add("young", [8] * 7, max_tokens=8)
    while not tiers.scheduler.counters.preemptions:
        tiers.step()
    tiers.scheduler.abort(young)
    tiers.scheduler.check()
    assert tiers.scheduler.host_pool is not None
    assert tiers.scheduler.host_pool.num_used == 0


def test_a_prefix_that_the_device_has_forgotten_is_fetched_from_the_host() -> None:
    tiers = _Tiers(4, 16)
    tiers.add("a", list(range(12)))
    tiers.run()
    tiers.add("b", list(range(50, 65)))
    tiers.run()
    again = tiers.add("again", list(range(12)))
    assert tiers.run() == 4
    assert (again.cached_tokens, tiers.scheduler.counters.blocks_swapped_in) == (8, 2)


def test_what_was_fetched_from_the_host_is_found_on_the_device_from_then_on() -> None:
    tiers = _Tiers(6, 16)
    for name, prompt in (("a", list(range(12))), ("b", list(range(50, 73))), ("again", list(range(12)))):
        tiers.add(name, prompt)
        tiers.run()
    fetched = tiers.scheduler.counters.blocks_swapped_in
    third = tiers.add("third", list(range(12)))
    assert tiers.run() == 4
    assert (third.cached_tokens, tiers.scheduler.counters.blocks_swapped_in) == (8, fetched)
    assert fetched > 0


def test_the_host_forgets_what_was_used_longest_ago() -> None:
    tiers = _Tiers(2, 2)
    for name in "abcd":  # one full block each
        tiers.add(name, [ord(name)] * 6)
        tiers.run()
    again = tiers.add("b", [ord("b")] * 6), tiers.add("a", [ord("a")] * 6)
    tiers.run()
    assert [request.cached_tokens for request in again] == [4, 0]


def test_a_newcomer_takes_no_blocks_that_a_running_prompt_still_needs() -> None:
    order = Order(policy="priority")
    tiers = _Tiers(8, 0, max_num_batched_tokens=8, prefix_caching=False, order=order)
    beams = Request("beams", [1], StopRule(max_tokens=9), beam_width=2)
    tiers.scheduler.add(beams)
    tiers.step()
    tiers.scheduler.advance(beams, [(beams.sequences[0], 5), (beams.sequences[0], 6)])
    tiers.step()  # both are parked now, behind the long prompt, which leaves a token to each
    tiers.scheduler.add(Request("long", range(20), StopRule(max_tokens=1), priority=-1))
    newcomer = tiers.add("new", [7] * 5)
    assert tiers.scheduler.pool.num_free == 6
    assert [tiers.step() for _ in range(4)] == [8, 6, 6, 5]
    assert (tiers.scheduler.counters.preemptions, newcomer.cached_tokens) == (0, 0)


def test_swapping_needs_host_blocks() -> None:
    with pytest.raises(ValueError, match="preemption by swapping needs host blocks"):
        SchedulerConfig(num_blocks=4, preemption="swap")


def test_what_a_failed_step_should_have_moved_to_the_host_is_not_found_there() -> None:
    tiers = _Tiers(5, 8)
    tiers.add("first", [9] * 17)
    tiers.run()
    tiers.add("second", [8] * 17)
    batch = tiers.scheduler.schedule()
    assert batch.transfers.out
    tiers.scheduler.discard(batch)
    again = tiers.add("again", [9] * 17)
    tiers.run()
    moved = len(batch.transfers.out)
    assert again.cached_tokens is not None
    assert again.cached_tokens <= 4 * (4 - moved)


@pytest.mark.parametrize("tainted", [False, True])
def test_what_a_tainted_sequence_left_on_the_host_is_not_found_there(tainted: bool) -> None:
    tiers = _Tiers(5, 8)
    _, young = tiers.add("old", [9] * 8, max_tokens=8), tiers.add("young", [8] * 8, max_tokens=8)
    while not young.sequences[0].host_table:
        tiers.step()
    tiers.scheduler.abort(young, tainted=tainted)
    tiers.run()
    again = tiers.add("again", [8] * 8)
    tiers.run()
    assert again.cached_tokens == (0 if tainted else 4)


@pytest.mark.parametrize("tainted", [False, True])
def test_a_tainted_sequence_leaves_no_copies_of_its_prefix(tainted: bool) -> None:
    """The host has a copy of what the device has forgotten, and the device fetches it back: both are forgotten."""
    tiers = _Tiers(6, 8)
    tiers.add("first", [9] * 9)
    tiers.run()
    tiers.add("other", [8] * 23)
    tiers.run()  # the device forgets the first, the host takes it
    again = tiers.add("again", [9] * 9, max_tokens=4)
    tiers.step()
    assert again.cached_tokens == 8
    tiers.scheduler.abort(again, tainted=tainted)
    tiers.run()
    last = tiers.add("last", [9] * 9)
    tiers.run()
    assert last.cached_tokens == (0 if tainted else 8)
