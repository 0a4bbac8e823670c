"""One batching mode under the load: drives it, and reads from the server's /metrics how many steps that took."""

import re
from typing import NamedTuple

from bench.batching import Plan
from bench.client import Client, Server
from bench.driving import drive, warm_up
from bench.measure import Run
from engine.errors import OctavoError


class Work(NamedTuple):
    """What a server has computed."""

    steps: int
    tokens: int
    """Generated ones."""


async def measure(plan: Plan, mode: str, repeat: int, server: Server) -> tuple[Run, Work]:
    """The run, and what it took. Raises OctavoError when the warm-up fails or the server has no such metrics."""
    async with Client(server) as client:
        model = await client.model()
        await warm_up(client, plan.warmup(), model)
        before = work_done(await client.page("/metrics"))
        seed = f"{plan.seed}/{repeat}"
        run = await drive(client, plan.level, plan.prompts(repeat), model, label=mode, repeat=repeat, seed=seed)
        after = work_done(await client.page("/metrics"))
        return run, Work(after.steps - before.steps, after.tokens - before.tokens)


def work_done(page: str) -> Work:
    """From a page of Prometheus's text format: the work since the server started. Raises OctavoError."""
    values = []
    for name in ("iteration_tokens_total_count", "generation_tokens_total"):
        found = re.search(rf"^octavo:{name}(?:{{[^}}]*}})? (\S+)$", page, flags=re.MULTILINE)
        if found is None:
            raise OctavoError(f"the server's /metrics page has no octavo:{name}")
        values.append(int(float(found[1])))
    return Work(*values)
