"""One level of load driven at one server: ready-made requests in, what became of them out."""

import asyncio
import gc
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Never

from tqdm import tqdm

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
    if errors := await unmeasured(client, bodies(prompts, model)):
        raise OctavoError(f"a warm-up request failed: {errors[0]}")


async def unmeasured(client: Client, ready: Sequence[bytes]) -> list[str]:
    """Send requests, all at once; returns the errors of those that failed."""
    records = [RequestRecord(index) for index in range(len(ready))]
    await asyncio.gather(*(client.send(body, record) for body, record in zip(ready, records, strict=True)))
    return [record.error for record in records if record.error is not None]


async def drive(
    client: Client, level: Level, prompts: Sequence[Prompt], model: str, *, label: str, repeat: int, seed: str
) -> Run:
    """Send all ``prompts`` in the rhythm of ``level`` and wait for their ends; ``seed`` determines random arrivals."""
    requests = list(zip(prompts, bodies(prompts, model), strict=True))
    runs: list[Run] = []
    with recording(label, repeat, runs) as records, progress(label, len(prompts), "req") as bar:
        await send_all(client, level, requests, records, bar, seed)
    return runs[0]


@contextmanager
def recording(label: str, repeat: int, runs: list[Run]) -> Iterator[list[RequestRecord]]:
    """A list for the requests sent; when the block ends, however it ends, those that ended become one of ``runs``."""
    sent: list[RequestRecord] = []
    gc.collect()
    cpu = time.process_time()
    try:
        yield sent
    finally:
        cpu = time.process_time() - cpu
        ended = sorted((record for record in sent if _has_ended(record)), key=lambda record: record.last)
        begin = min((record.start for record in sent), default=0.0)
        duration = ended[-1].last - begin if ended else 0.0
        runs.append(Run(label, repeat, ended, duration, cpu, interrupted=len(sent) - len(ended)))


def _has_ended(record: RequestRecord) -> bool:
    return record.error is not None or bool(record.chunk_times)


async def send_all(
    client: Client,
    level: Level,
    requests: Sequence[tuple[Prompt, bytes]],
    records: list[RequestRecord],
    bar: "tqdm[Never]",
    seed: str,
) -> None:
    """Send requests, each a prompt and its body, in the rhythm of ``level``; each has a record once it is sent."""

    async def send(index: int, scheduled: float | None) -> None:
        prompt, body = requests[index]
        record = RequestRecord(index, scheduled=scheduled, prompt_tokens=prompt.length, asked_tokens=prompt.output_len)
        records.append(record)
        await client.send(body, record)
        bar.update()

    await level.drive(send, len(requests), seed)
