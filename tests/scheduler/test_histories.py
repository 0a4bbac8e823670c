"""Design invariants after every step of random histories: all features of the scheduler at once."""

from collections import Counter

from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.scheduler.histories import STATES, Histories

_OFTEN = [
    "a beam ended",
    "a beam forked",
    "abort in mid-step",
    "batching continuous",
    "cached block moved to the host",
    "continuations forked",
    "copied on write",
    "deadline queued",
    "ends with its prompt",
    "observed in chunks",
    "preempted",
    "prefix found on the device",
    "prompt in chunks",
    "several sequences",
    *(f"ended by {reason}" for reason in ("stop", "length", "abort", "timeout")),
    *(f"order {policy}" for policy in ("fcfs", "priority", "fair")),
]
"""What happens in a tenth of all histories, at least; in most cases in three times as many."""
_AT_TIMES = [
    "a fork found no place",
    "deadline decoding",
    "nothing to do yet",
    "preempted while parked",
    "prefix found on the host",
    "queue timeout queued",
    "swapped in",
    "swapped out",
    "swapped out while parked",
    "to be recomputed",
    *(f"abort {state}" for state in (*STATES, "ended")),
    *(f"batching {mode}" for mode in ("none", "static", "dynamic")),
]
"""What is rarer, but is to happen at all."""


def test_every_invariant_holds_in_histories_of_all_features_at_once() -> None:
    reached: Counter[str] = Counter()
    machine = type("CountedHistories", (Histories,), {"reached": reached})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=350, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
    assert reached["steps"] >= 10_000
    assert not [name for name in _OFTEN if reached[name] < reached["histories"] / 10]
    assert not [name for name in _AT_TIMES if not reached[name]]
