"""Drives a server as a plan says: warms up, runs every level, shows progress, and hands the records to the report."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench import loop
from bench.client import Client, Server
from bench.driving import recording, send_all, unmeasured
from bench.measure import Run, Summary, cautions, summarize
from bench.output import INTERRUPTED, save
from bench.progress import progress
from bench.prompts import Prompt, request_body
from bench.report import document, error_lines, table
from bench.serve import Plan
from engine.errors import ConfigError, OctavoError


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
        loop.run(_measure(plan, args, session))
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
                requests = list(zip(prompts, bodies, strict=True))
                with (
                    recording(level.label, repeat, session.runs) as records,
                    progress(title, len(bodies), "req") as bar,
                ):
                    await send_all(client, level, requests, records, bar, f"{key}/arrivals")


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
    errors = await unmeasured(client, bodies)
    if errors and len(errors) == len(bodies):
        hint = ""
        if errors[0].startswith(("HTTP 400", "HTTP 422")):
            hint = " (it may want --prompt-format text, --no-ignore-eos, --no-stream-usage or shorter lengths)"
        raise ConfigError(f"the warm-up request to {base_url} failed: {errors[0]}{hint}")


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
    contents = document(args, session, plan.objective, summaries, runs)
    save(args, contents, lambda path: _draw(path, by_level, args.label or session.model))


def _draw(path: str, by_level: Mapping[str, Sequence[Run]], title: str) -> None:
    from bench.plot import draw  # matplotlib takes half a second to import

    draw(path, by_level, title=title)
