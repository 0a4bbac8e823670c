"""`octavo trace`: what a trace that `octavo serve --trace FILE` wrote is good for.

`replay` decides once more; `fit` makes a cost model for `octavo simulate`, and shows how true the simulator is.
"""

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
    fit = actions.add_parser(
        "fit",
        help="fit the cost of a step, and compare the simulator with what was measured",
        description="Fit a cost model to the steps of a trace, then simulate the requests of a trace with it, and show "
        "measured and simulated figures side by side.",
    )
    fit.add_argument("file", metavar="FILE", type=Path, help="what `octavo serve --trace FILE` wrote")
    fit.add_argument("--output", metavar="FILE", type=Path, help="write the model here, for `octavo simulate --cost`")
    fit.add_argument(
        "--check",
        metavar="FILE",
        type=Path,
        help="simulate the requests of this trace instead, which nothing is fitted to",
    )


def run(args: argparse.Namespace) -> int:
    """Do what the action says. Raises OctavoError for a trace that cannot be used."""
    from scheduler.trace import TraceError

    try:
        if args.action == "replay":
            _replay(args.file)
        else:
            from bench.fit import fit

            fit(args.file, args.output, args.check)
    except TraceError as error:
        raise OctavoError(str(error)) from error
    return 0


def _replay(file: Path) -> None:
    """Replay, and say how much there was."""
    from scheduler.trace import Replay

    replay, began = Replay(file), time.perf_counter()
    replay.run()
    print(
        f"{replay.steps} steps, {replay.tokens} tokens of {replay.requests} requests, "
        f"{replay.preemptions} preemptions: every decision is the same, every invariant holds\n"
        f"replayed in {time.perf_counter() - began:.2f} s; the model took {replay.seconds:.2f} s"
    )
