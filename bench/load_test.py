"""Drives a server as a plan says: warms up, runs every level, shows progress, and hands the records to the report."""

import argparse
import asyncio
import gc
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Never

from tqdm import tqdm

from bench.arrivals import Level
from bench.client import Client, Server
from bench.measure import RequestRecord, Run, Summary, cautions, summarize
from bench.prompts import Prompt, request_body
from bench.report import document, error_lines, table, write_json
from bench.serve import Plan
from engine.errors import ConfigError, OctavoError

INTERRUPTED = 130


@dataclass(slots=True)
class Session:
    """What has been learnt so far; whole at every moment, so that Ctrl-C can report it."""

    model: str = ""
    server_version: Any = None
    runs: list[Run] = field(default_factory=list)
    interrupted: bool = False


def execute(plan: Plan, args: argparse.Namespace) -> int:
    """Measure and report; see ``bench.serve.run`` for the result. Raises ConfigError when the server cannot be used."""
    session = Session()
    failure: OctavoError | None = None
    try:
        with asyncio.Runner(loop_factory=event_loop_factory()) as runner:
            runner.run(_measure(plan, args, session))
    except KeyboardInterrupt:
        session.interrupted = True
    except OctavoError as error:  # perhaps the server died between two runs: what came before still counts
        failure = error
    runs = [run for run in session.runs if run.records]
    if runs:
        _report(plan, args, session, runs)
    if failure is not None:
        raise failure
    if session.interrupted:
        print("interrupted" + ("; the figures are of what had ended by then" if runs else ""), file=sys.stderr)
        return INTERRUPTED
    return 1 if any(record.error is not None for run in runs for record in run.records) else 0


def event_loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's, where it is installed; else None, for asyncio's own."""
    try:
        import uvloop
    except ImportError:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


async def _measure(plan: Plan, args: argparse.Namespace, session: Session) -> None:
    """Run every level ``--repeats`` times, the levels inside, so that a machine's slow drift falls on all alike."""
    server = Server(args.base_url, args.endpoint, args.api_key, args.timeout)
    async with Client(server) as client:
        session.model = args.model or await client.model()
        session.server_version = await client.version()
        for repeat in range(args.repeats):
            for level in plan.levels:
                key = f"{args.seed}/{level.label}/{repeat}"
                prompts = plan.source.draw(key, plan.requests(level, args))
                bodies = _bodies(prompts, plan, args, session.model)
                warmup = plan.source.draw(f"{key}/warmup", args.warmup)
                await _warm_up(client, _bodies(warmup, plan, args, session.model), args.base_url)
                title = level.label if args.repeats == 1 else f"{level.label} {repeat + 1}/{args.repeats}"
                with (
                    _recording(level.label, repeat, session) as records,
                    _progress(title, len(bodies)) as bar,
                ):
                    await _drive(level, client, list(zip(prompts, bodies, strict=True)), records, bar, key)


def _bodies(prompts: Sequence[Prompt], plan: Plan, args: argparse.Namespace, model: str) -> list[bytes]:
    """Every request's body, made before the clock starts."""
    common: dict[str, Any] = {"model": model, "temperature": args.temperature, "stream": True}
    if args.stream_usage:
        common["stream_options"] = {"include_usage": True}
    if plan.ignore_eos:
        common["ignore_eos"] = True
    return [request_body(prompt, chat=plan.chat, common=common, extra=plan.extra_body) for prompt in prompts]


async def _warm_up(client: Client, bodies: Sequence[bytes], base_url: str) -> None:
    """Send the unmeasured requests at once. Raises ConfigError when all of them fail: so would the others."""
    records = [RequestRecord(index) for index in range(len(bodies))]
    await asyncio.gather(*(client.send(body, record) for body, record in zip(bodies, records, strict=True)))
    errors = [record.error for record in records if record.error is not None]
    if errors and len(errors) == len(records):
        hint = ""
        if errors[0].startswith(("HTTP 400", "HTTP 422")):
            hint = " (it may want --prompt-format text, --no-ignore-eos, --no-stream-usage or shorter lengths)"
        raise ConfigError(f"the warm-up request to {base_url} failed: {errors[0]}{hint}")


@contextmanager
def _recording(label: str, repeat: int, session: Session) -> Iterator[list[RequestRecord]]:
    """A list for the requests sent; when the block ends, however it ends, those that ended become a Run."""
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
        session.runs.append(Run(label, repeat, ended, duration, cpu, interrupted=len(sent) - len(ended)))


def _has_ended(record: RequestRecord) -> bool:
    return record.error is not None or bool(record.chunk_times)


async def _drive(
    level: Level,
    client: Client,
    requests: Sequence[tuple[Prompt, bytes]],
    records: list[RequestRecord],
    bar: "tqdm[Never]",
    key: str,
) -> None:
    async def send(index: int, scheduled: float | None) -> None:
        prompt, body = requests[index]
        record = RequestRecord(index, scheduled=scheduled, prompt_tokens=prompt.length, asked_tokens=prompt.output_len)
        records.append(record)
        await client.send(body, record)
        bar.update()

    await level.drive(send, len(requests), f"{key}/arrivals")


def _progress(title: str, total: int) -> "tqdm[Never]":
    """A bar on stderr; none when that is not a terminal."""
    return tqdm(total=total, desc=title, unit="req", file=sys.stderr, disable=None, leave=False, mininterval=0.25)


def _report(plan: Plan, args: argparse.Namespace, session: Session, runs: Sequence[Run]) -> None:
    by_level = {level.label: [run for run in runs if run.label == level.label] for level in plan.levels}
    by_level = {label: group for label, group in by_level.items() if group}
    summaries: list[Summary] = [summarize(group, plan.objective) for group in by_level.values()]
    print(table(summaries, title=f"{args.label or session.model} at {args.base_url}, {args.endpoint}"))
    for label, group in by_level.items():
        for caution in cautions(group):
            print(f"note, {label}: {caution}")
    for line in error_lines(runs):
        print(line, file=sys.stderr)
    if args.json:
        _write(args.json, lambda: write_json(args.json, document(args, session, plan.objective, summaries, runs)))
    if args.plot:
        from bench.plot import draw  # matplotlib takes half a second to import

        _write(args.plot, lambda: draw(args.plot, by_level, title=args.label or session.model))


def _write(path: str, write: Callable[[], None]) -> None:
    """Write a file; a failure is one line for the user, after the table that was already printed."""
    try:
        write()
    except (OSError, ValueError) as error:
        raise OctavoError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from None
    print(f"wrote {path}")
