"""`octavo trace fit`: a cost model from measured steps, and the simulator beside the server that was measured."""

from collections.abc import Sequence
from pathlib import Path

from bench import output
from bench.forecast import comparison, share, speed_of
from bench.measure import percentile
from bench.progress import progress
from engine.errors import OctavoError
from scheduler.cluster import Cluster, UnservableError
from scheduler.cost_model import CostModel, Observation
from scheduler.recording import Recording, read_recording
from scheduler.simulator import Served


def fit(file: Path, target: Path | None, check: Path | None) -> None:
    """Fit, report, and write the model to ``target``. Raises TraceError or OctavoError."""
    recording = read_recording(file)
    steps = recording.steps
    cost = CostModel.fit(steps, f"fitted to {len(steps):,} steps of {file.name}")
    print("\n".join([cost.source, "", coefficients(cost), "", errors_line(cost, steps), ""]))
    if check is not None:
        file, recording = check, read_recording(check)
        print(f"{file.name}, to which nothing was fitted:\n{errors_line(cost, recording.steps)}\n")
    print("\n".join(comparison_lines(recording, simulated(recording, cost), file.name)))
    if target is not None:
        output.write(str(target), lambda path: _write(path, cost))


def _write(path: str, cost: CostModel) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(cost.to_json())


def coefficients(cost: CostModel) -> str:
    """One row per coefficient, in units that give readable numbers."""
    rows = [
        ["a step", f"{cost.base * 1e3:.4g} ms"],
        ["a token, of those beyond the knee", f"{cost.per_token * 1e6:.4g} µs"],
        ["the knee", f"{cost.knee:.4g} tokens"],
        ["a token of context", f"{cost.per_context_token * 1e9:.4g} ns"],
        ["a pair of tokens in attention", f"{cost.per_pair * 1e9:.4g} ns"],
        ["a sampled token", f"{cost.per_sample * 1e6:.4g} µs"],
        ["a token moved to the host or back", f"{cost.per_moved_token * 1e6:.4g} µs"],
    ]
    return output.table(["cost of", ""], rows)


def errors_line(cost: CostModel, steps: Sequence[Observation]) -> str:
    """How far the model is from the single steps, and from all of them together."""
    off = sorted(abs(cost.seconds(work) / seconds - 1) for work, seconds in steps)
    total = sum(cost.seconds(work) for work, _ in steps) / sum(seconds for _, seconds in steps) - 1
    return (
        f"Of the {len(steps):,} steps half are within {share(percentile(off, 50))} of the model, 90% within "
        f"{share(percentile(off, 90))}; all together the model says {total:+.1%}."
    )


def simulated(recording: Recording, cost: CostModel) -> list[Served]:
    """What becomes of the recorded requests in the simulator. Raises OctavoError if one can never run."""
    cluster = Cluster(1, recording.config, cost)
    try:
        with progress("simulating", len(recording.arrivals), "req") as bar:
            return cluster.simulate(recording.arrivals, lambda _: bar.update()).served
    except UnservableError as error:
        raise OctavoError(str(error)) from None


def comparison_lines(recording: Recording, served: Sequence[Served], name: str) -> list[str]:
    """The table, and what it leaves out."""
    lines = [
        f"{len(recording.arrivals):,} requests of {name} at the moments when they came:",
        "",
        comparison(speed_of(recording.served, {}), speed_of(served, {})),
    ]
    if recording.left_out:
        lines += ["", f"note: {recording.left_out} requests got no token, and are left out"]
    return lines
