"""Traces as a server writes them, written by the simulator: what was measured is then known to the last digit."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

import scheduler.trace
from scheduler.config import SchedulerConfig
from scheduler.cost_model import CostModel
from scheduler.simulator import Arrival, Replica
from scheduler.trace import TracedScheduler


def write_trace(
    path: Path, config: SchedulerConfig, cost: CostModel, arrivals: Sequence[Arrival], monkeypatch: pytest.MonkeyPatch
) -> Replica:
    """Serve ``arrivals`` by a replica whose scheduler is traced, on the simulated clock; returns that replica."""
    replica = Replica(config, cost)
    replica.scheduler = TracedScheduler(config, path)
    with monkeypatch.context() as patch:
        patch.setattr(scheduler.trace, "time", SimpleNamespace(monotonic=lambda: replica.now))
        for serial, arrival in enumerate(arrivals):
            replica.advance(arrival.time)
            replica.submit(arrival, serial)
        replica.advance()
    replica.scheduler.close()
    return replica
