"""One level of load driven at one server: ready-made requests in, what became of them out."""

import asyncio
import gc
import time
from collections.abc import Mapping, Sequence
from typing import Any

from bench.arrivals import Level
from bench.client import Client
from bench.measure import RequestRecord, Run
from bench.progress import progress
from bench.prompts import Prompt, request_body
from engine.errors import OctavoError

GREEDY: Mapping[str, Any] = {
    "temperature": 0.0,
    "ignore_eos": True,
    "stream": True,
    "stream_options": {"include_usage": True},
}
"""What all requests share: answers of exactly the length that is asked for, counted by the server."""


def bodies(prompts: Sequence[Prompt], model: str) -> list[bytes]:
    """Every request's body for /v1/completions, made before the clock starts."""
    return [request_body(prompt, chat=False, common={**GREEDY, "model": model}, extra={}) for prompt in prompts]


async def warm_up(client: Client, prompts: Sequence[Prompt], model: str) -> None:
    """Send unmeasured requests, all at once. Raises OctavoError when one fails: so would others."""
    records = [RequestRecord(index) for index in range(len(prompts))]
    await asyncio.gather(
        *(client.send(body, record) for body, record in zip(bodies(prompts, model), records, strict=True))
    )
    if error := next((record.error for record in records if record.error is not None), None):
        raise OctavoError(f"a warm-up request failed: {error}")


async def drive(
    client: Client, level: Level, prompts: Sequence[Prompt], model: str, *, label: str, repeat: int, seed: str
) -> Run:
    """Send all ``prompts`` in the rhythm of ``level`` and wait for their ends; ``seed`` determines random arrivals."""
    ready = bodies(prompts, model)
    records = [
        RequestRecord(index, prompt_tokens=prompt.length, asked_tokens=prompt.output_len)
        for index, prompt in enumerate(prompts)
    ]
    gc.collect()
    cpu = time.process_time()
    with progress(label, len(prompts), "req") as bar:

        async def send(index: int, scheduled: float | None) -> None:
            records[index].scheduled = scheduled
            await client.send(ready[index], records[index])
            bar.update()

        await level.drive(send, len(prompts), seed)
    cpu = time.process_time() - cpu
    records.sort(key=lambda record: record.last)
    begin = min(record.start for record in records)
    return Run(label, repeat, records, records[-1].last - begin, cpu)
