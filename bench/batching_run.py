"""One batching mode under the load: drives it, and reads from the server's /metrics how full its steps were."""

import asyncio
import re

from bench.batching import Plan
from bench.client import Client, Server
from bench.driving import drive, warm_up
from bench.load_test import event_loop_factory
from bench.measure import Run
from engine.errors import OctavoError


def measure(plan: Plan, mode: str, repeat: int, url: str, timeout: float) -> tuple[Run, float]:
    """The run, and the sequences that got a token per step, on average."""
    with asyncio.Runner(loop_factory=event_loop_factory()) as runner:
        return runner.run(_measure(plan, mode, repeat, Server(url, timeout=timeout)))


async def _measure(plan: Plan, mode: str, repeat: int, server: Server) -> tuple[Run, float]:
    async with Client(server) as client:
        model = await client.model()
        await warm_up(client, plan.warmup(), model)
        before = await _work_done(client, server)
        seed = f"{plan.seed}/{repeat}"
        run = await drive(client, plan.level, plan.prompts(repeat), model, label=mode, repeat=repeat, seed=seed)
        return run, tokens_per_step(before, await _work_done(client, server))


async def _work_done(client: Client, server: Server) -> tuple[float, float]:
    async with client.session.get(f"{server.root}/metrics") as response:
        return work_done(await response.text())


def work_done(page: str) -> tuple[float, float]:
    """From a page of Prometheus's text format: (steps computed, tokens generated) since the server started."""
    values = []
    for name in ("iteration_tokens_total_count", "generation_tokens_total"):
        found = re.search(rf"^octavo:{name}(?:{{[^}}]*}})? (\S+)$", page, flags=re.MULTILINE)
        if found is None:
            raise OctavoError(f"the server's /metrics page has no octavo:{name}")
        values.append(float(found[1]))
    return values[0], values[1]


def tokens_per_step(before: tuple[float, float], after: tuple[float, float]) -> float:
    """Tokens generated in a step, on average, between two readings of ``work_done``: how many sequences were in it."""
    steps = after[0] - before[0]
    return (after[1] - before[1]) / steps if steps > 0 else 0.0
