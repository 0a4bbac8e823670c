"""`octavo simulate`: what a load does to N replicas, or how many of them it needs, without a model or a GPU.

The scheduler is the server's own and decides every step; only how long a step takes comes from a cost model.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import ceil
from typing import Final

from bench import flags, output, simulated_load, simulated_replica
from bench.capacity import least
from bench.extras import require
from bench.forecast import Forecast, cautions, draw, forecast_of, samples_of, table, table_of_tries
from bench.progress import progress
from bench.serve import parse_objective
from bench.simulated_load import SimulatedLoad, load_of
from bench.simulated_replica import SimulatedReplica, replica_of
from engine.errors import ConfigError
from scheduler.cluster import ROUTINGS, Cluster, Outcome, Routing, UnservableError

_MOST_REPLICAS: Final = 1_000_000
_MOST_EACH: Final = 2
"""Requests of one replica, in units of --sample: more of them, where one gets so many, would show nothing new."""
_FINEST: Final = 100
"""The answer for a cluster that is simulated by a sample is at most this part too large."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to do, resolved and checked."""

    load: SimulatedLoad
    replica: SimulatedReplica
    replicas: Sequence[int] | None
    """None: as many as it takes."""
    most: int
    """Replicas that can be of use."""
    routing: Routing
    sample: int | None
    seed: str
    objective: Mapping[str, float]
    attainment: float

    def cluster(self, replicas: int) -> Cluster:
        """So many replicas, of which a sample is simulated."""
        return Cluster(
            replicas,
            self.replica.config,
            self.replica.cost,
            self.routing,
            sample=self.sample,
            most_each=None if self.sample is None else _MOST_EACH * self.sample,
            seed=self.seed,
        )

    @property
    def title(self) -> str:
        """The load, the replica, the router and the objective."""
        lines = [self.load.title, self.replica.title, f"routing: {self.routing}"]
        if self.objective:
            limits = ", ".join(f"{name} ≤ {limit:g} ms" for name, limit in self.objective.items())
            lines.append(f"objective: {limits}, for {100 * self.attainment:g}% of the requests")
        return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    simulated_load.add_arguments(parser)
    simulated_replica.add_arguments(parser)
    cluster = parser.add_argument_group("the cluster")
    cluster.add_argument("--replicas", metavar="N,N,...", help="what to simulate (default: find how many it takes)")
    cluster.add_argument(
        "--routing", choices=ROUTINGS, default="round-robin", help="which replica gets a request (default: %(default)s)"
    )
    cluster.add_argument(
        "--sample",
        type=int,
        default=2000,
        metavar="N",
        help="of a large cluster, simulate the replicas that about so many requests go to; 0: all of them, every "
        "request (default: %(default)s)",
    )
    objective = parser.add_argument_group("the objective")
    objective.add_argument("--slo", metavar="ttft=MS,tpot=MS", help="what is quick enough (ttft, tpot, latency)")
    objective.add_argument(
        "--attainment",
        type=float,
        default=0.99,
        metavar="S",
        help="the share of the requests that has to be (default: %(default)g)",
    )
    output.add_arguments(parser, plot="the objective over the replicas, and the distributions of TTFT and TPOT")


def run(args: argparse.Namespace) -> int:
    """Simulate and report. Returns 0; 1 if no number of replicas is enough.

    Raises ConfigError for flags that make no sense, or a load that no replica can serve.
    """
    plan = make_plan(args)
    if args.plot:
        require("matplotlib")
    print(plan.title, "", sep="\n")
    tries: list[tuple[Forecast, Mapping[str, Sequence[float]]]] = []

    def attempt(replicas: int) -> tuple[Forecast, Outcome]:
        outcome = _simulate(plan, replicas)
        forecast = forecast_of(outcome, plan.objective)
        tries.append((forecast, samples_of(outcome.served) if args.plot else {}))
        return forecast, outcome

    answer = None
    if plan.replicas is not None:
        _show([attempt(replicas) for replicas in plan.replicas])
    else:
        answer = _search(plan, attempt)
    findings = {
        "load": plan.load.title,
        "replica": asdict(plan.replica.config),
        "cost": asdict(plan.replica.cost),
        "objective_ms": dict(plan.objective),
        "attainment": plan.attainment,
        "answer": answer,
        "tries": [asdict(forecast) for forecast, _ in tries],
    }
    files = ("load", "cost", "model")
    contents = output.document("simulate", add_arguments, args, findings, group="octavo", files=files)
    output.save(args, contents, lambda path: draw(path, tries, title=plan.load.title.replace("; ", "\n")))
    return 1 if plan.replicas is None and answer is None else 0


def make_plan(args: argparse.Namespace) -> Plan:
    """Check the flags against one another. Raises ConfigError, naming the flag at fault."""
    flags.at_least(args, 0, "sample")
    if not 0 < args.attainment <= 1:
        raise ConfigError(f"--attainment is a share, above 0 and up to 1, not {args.attainment:g}")
    objective = parse_objective(args.slo, "--slo")
    replicas = None if args.replicas is None else flags.whole_numbers(args.replicas, "--replicas")
    if replicas and max(replicas) > _MOST_REPLICAS:
        raise ConfigError(f"--replicas takes numbers up to {_MOST_REPLICAS:,}, not {max(replicas)}")
    if replicas is None and not objective:
        raise ConfigError("give --replicas, to see what so many do, or --slo, to find how many are enough")
    load = load_of(args, replicas)
    useful = _useful(load, args.routing)
    if replicas and max(replicas) > useful and args.routing == "prefix":
        raise ConfigError(f"--routing prefix keeps no more replicas busy than there are prefixes, {useful}")
    return Plan(
        load=load,
        replica=replica_of(args, load.recorded),
        replicas=replicas,
        most=min(useful, _MOST_REPLICAS),
        routing=args.routing,
        sample=args.sample or None,
        seed=str(args.seed),
        objective=objective,
        attainment=args.attainment,
    )


def _useful(load: SimulatedLoad, routing: Routing) -> int:
    """Replicas that can be of use: no more than there are requests, or prefixes to route by."""
    if routing != "prefix" or load.prefixes is None:
        return load.size
    if not load.prefixes:
        raise ConfigError("--routing prefix needs a load with prefixes: --prefixes N, or lines of JSON that name them")
    return min(load.prefixes, load.size)


def _simulate(plan: Plan, replicas: int) -> Outcome:
    cluster, load = plan.cluster(replicas), plan.load.of(replicas)
    total = cluster.considered(load)
    expected = total * cluster.simulated(total) // replicas
    try:
        with progress(f"{replicas:,} replicas", expected, "req") as bar:
            return cluster.simulate(load, lambda _: bar.update())
    except UnservableError as error:
        raise ConfigError(str(error)) from None


def _show(results: Sequence[tuple[Forecast, Outcome]]) -> None:
    """The figures of every number of replicas, and what to know about them."""
    print(table([forecast for forecast, _ in results]))
    print()
    for forecast, outcome in results:
        name = "1 replica" if forecast.replicas == 1 else f"{forecast.replicas:,} replicas"
        for note in [*_notes(forecast, outcome), *cautions(outcome.served)]:
            print(f"note, {name}: {note}")


def _notes(forecast: Forecast, outcome: Outcome) -> list[str]:
    notes = [forecast.note]
    if outcome.cut:
        notes.append(f"only the first {outcome.total:,} requests were looked at; --sample sets how many")
    if outcome.unserved:
        notes.append(f"{outcome.unserved} requests wait for others to fill their static batch; they count nowhere")
    return notes


def _search(plan: Plan, attempt: Callable[[int], tuple[Forecast, Outcome]]) -> int | None:
    """Find the least number of replicas that is enough, and report."""
    results: dict[int, tuple[Forecast, Outcome]] = {}

    def enough(replicas: int) -> bool:
        results[replicas] = attempt(replicas)
        return (results[replicas][0].speed.attained or 0.0) >= plan.attainment

    def grain(replicas: int) -> int:
        forecast, _ = results[replicas]
        return 1 if forecast.simulated == forecast.replicas else max(1, replicas // _FINEST)

    answer = least(enough, _guess(plan), plan.most, grain)
    print(table_of_tries([forecast for forecast, _ in results.values()], plan.attainment))
    print()
    if answer is None:
        print(f"No number of replicas is enough, not even {plan.most:,}.\n")
        _show([results[plan.most]])
        return None
    exact = grain(answer)
    within = "" if exact == 1 else f" (give or take {exact:,}: a sample shows no more)"
    print(f"{answer:,} {'replica is' if answer == 1 else 'replicas are'} enough{within}, if more are never worse.\n")
    _show([results[answer]])
    return answer


def _guess(plan: Plan) -> int:
    """Replicas that just keep up: the load's rate over that of one replica that has all requests at once."""
    load = plan.load.of(1)
    span = load[len(load) - 1].time
    batch = [replace(load[index], time=0.0) for index in range(min(len(load), 2 * plan.replica.config.max_num_seqs))]
    try:
        outcome = Cluster(1, plan.replica.config, plan.replica.cost).simulate(batch)
    except UnservableError as error:
        raise ConfigError(str(error)) from None
    if not outcome.served or span <= 0:
        return 1
    capacity = len(outcome.served) / outcome.duration
    return ceil(len(load) / span / capacity)
