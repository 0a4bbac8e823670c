"""`octavo trace replay FILE`: a trace that `octavo serve --trace FILE` wrote, decided once more."""

import argparse
import time
from pathlib import Path

from engine.errors import OctavoError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    replay = actions.add_parser(
        "replay",
        help="make the recorded calls again and compare every decision",
        description="Make the recorded calls again, without a model: exit code 0 if every decision is the same and "
        "every invariant holds, 1 with the first difference otherwise.",
    )
    replay.add_argument("file", metavar="FILE", type=Path, help="what `octavo serve --trace FILE` wrote")


def run(args: argparse.Namespace) -> int:
    """Replay, and say how much there was."""
    from scheduler.trace import Replay, TraceError

    replay, began = Replay(args.file), time.perf_counter()
    try:
        replay.run()
    except TraceError as error:
        raise OctavoError(str(error)) from error
    print(
        f"{replay.steps} steps, {replay.tokens} tokens of {replay.requests} requests, "
        f"{replay.preemptions} preemptions: every decision is the same, every invariant holds\n"
        f"replayed in {time.perf_counter() - began:.2f} s; the model took {replay.seconds:.2f} s"
    )
    return 0
