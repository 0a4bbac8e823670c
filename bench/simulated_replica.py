"""The replica that is simulated: what a step costs, how much KV it has room for, and how its scheduler is set."""

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from bench import flags
from engine.errors import ConfigError
from scheduler.batching import Mode
from scheduler.config import SchedulerConfig
from scheduler.cost_model import CostModel
from scheduler.hardware import DEVICES, MODELS, Efficiency, ModelShape, estimate, kv_tokens

_ORDERS = ("fcfs", "priority", "fair")
_PREEMPTIONS = ("auto", "recompute", "swap")
_LIMITS = ("num_blocks", "num_host_blocks", "block_size", "max_num_seqs", "max_num_batched_tokens", "prefix_caching")
_RULES = ("preemption", "queue_timeout")


@dataclass(frozen=True, slots=True)
class SimulatedReplica:
    """One of the equal members of a cluster."""

    config: SchedulerConfig
    cost: CostModel

    @property
    def title(self) -> str:
        """In two lines: its scheduler, and the source of its cost."""
        config = self.config
        return (
            f"each replica: {config.num_blocks:,} KV blocks of {config.block_size} tokens, "
            f"{config.max_num_seqs} sequences, {config.max_num_batched_tokens:,} tokens a step, "
            f"{config.batching.mode} batching\n"
            f"cost of a step: {self.cost.source or 'of unknown source'}"
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags. Those of the scheduler are named as `octavo serve` names them."""
    cost = parser.add_argument_group("what a step of a replica costs")
    cost.add_argument("--cost", metavar="FILE", help="a cost model that `octavo trace fit --output FILE` made")
    cost.add_argument("--device", metavar="NAME", help=f"estimate from data sheets instead: {', '.join(DEVICES)}")
    cost.add_argument(
        "--model",
        metavar="NAME|FILE",
        help=f"the model on that device: {', '.join(MODELS)}, or the config.json of any dense decoder",
    )
    reached = Efficiency()
    cost.add_argument(
        "--flops-share",
        type=float,
        default=reached.flops,
        metavar="S",
        help="of the device's peak that is reached, an assumption (default: %(default)g)",
    )
    cost.add_argument(
        "--bandwidth-share", type=float, default=reached.bandwidth, metavar="S", help="likewise (default: %(default)g)"
    )
    cost.add_argument(
        "--overhead",
        type=float,
        default=reached.overhead * 1e3,
        metavar="MS",
        help="of every step: launches, scheduling; an assumption (default: %(default)g)",
    )
    _add_scheduler_arguments(parser)


def _add_scheduler_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "the replica's scheduler (defaults: those of a trace that is the load, else those of `octavo serve`)"
    )
    group.add_argument("--num-blocks", type=int, metavar="N", help="KV blocks (default: what the device has room for)")
    group.add_argument("--num-host-blocks", type=int, metavar="N", help="blocks of the host tier, for swapping")
    group.add_argument("--block-size", type=int, metavar="N", help="tokens in a block")
    group.add_argument("--max-num-seqs", type=int, metavar="N", help="sequences that run at the same time, at most")
    group.add_argument("--max-num-batched-tokens", type=int, metavar="N", help="tokens computed in a step, at most")
    group.add_argument("--prefix-caching", action=argparse.BooleanOptionalAction, help="share equal beginnings")
    group.add_argument("--preemption", choices=_PREEMPTIONS, help="what becomes of what has to make room")
    group.add_argument("--batching", choices=get_args(Mode), help="when requests may begin")
    group.add_argument("--batch-size", type=int, metavar="N", help="requests of a static or dynamic batch")
    group.add_argument("--batch-delay", type=float, metavar="S", help="seconds that a dynamic batch waits to fill")
    group.add_argument(
        "--scheduling", choices=_ORDERS, help="who runs first, by the priorities and tenants of a recorded load"
    )
    group.add_argument("--ageing", type=float, metavar="S", help="seconds of waiting that make up for a priority")
    group.add_argument("--queue-timeout", type=float, metavar="S", help="seconds that a request waits, at most")


def replica_of(args: argparse.Namespace, recorded: SchedulerConfig | None = None) -> SimulatedReplica:
    """The replica that the flags describe; ``recorded`` is what a trace says of its scheduler. Raises ConfigError."""
    for name in (*_LIMITS[2:5], "batch_size"):
        if getattr(args, name) is not None:
            flags.at_least(args, 1, name)
    for name in ("num_host_blocks", "batch_delay", "ageing", "queue_timeout"):
        if getattr(args, name) is not None:
            flags.at_least(args, 0.001 if name == "ageing" else 0, name)
    if args.cost is not None:
        if args.device or args.model:
            raise ConfigError("--cost says what a step costs, and so do --device and --model: give one of them")
        return SimulatedReplica(_config(args, recorded, room=None), read_cost(Path(args.cost)))
    if args.device is None or args.model is None:
        raise ConfigError(
            "say what a step costs: --device and --model for an estimate, or --cost FILE (`octavo trace fit` makes one)"
        )
    cost, room = _estimated(args)
    return SimulatedReplica(_config(args, recorded, room), cost)


def _estimated(args: argparse.Namespace) -> tuple[CostModel, int]:
    """The cost of a step, and the tokens of KV cache that there is room for."""
    for name in ("flops_share", "bandwidth_share"):
        if not 0 < getattr(args, name) <= 1:
            raise ConfigError(f"--{name.replace('_', '-')} is a share, above 0 and up to 1, not {getattr(args, name)}")
    flags.at_least(args, 0, "overhead")
    device = DEVICES.get(args.device)
    if device is None:
        raise ConfigError(f"--device takes {', '.join(DEVICES)}, not {args.device!r}")
    model = MODELS.get(args.model) or _read_shape(args.model)
    room = kv_tokens(device, model)
    if room < 1:
        raise ConfigError(
            f"{args.model} has {model.weights * 2 / 1e9:.1f} GB of weights, which leave no room for a KV cache in "
            f"the {device.memory / 1e9:g} GB of the {args.device}"
        )
    reached = Efficiency(flops=args.flops_share, bandwidth=args.bandwidth_share, overhead=args.overhead / 1e3)
    source = (
        f"an estimate for {Path(args.model).name} on {args.device} at {reached.flops:.0%} of its data sheet's FLOP/s "
        f"and {reached.bandwidth:.0%} of its bandwidth, not a measurement"
    )
    return estimate(device, model, reached, source), room


def _read_shape(name: str) -> ModelShape:
    path = Path(name)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise ConfigError(f"--model takes {', '.join(MODELS)} or a config.json, not {name!r}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("it is no JSON object")
        return ModelShape.from_config(config)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {getattr(error, 'strerror', None) or error}") from None


def read_cost(path: Path) -> CostModel:
    """A cost model from a file. Raises ConfigError."""
    try:
        return CostModel.from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {getattr(error, 'strerror', None) or error}") from None


def _config(args: argparse.Namespace, recorded: SchedulerConfig | None, room: int | None) -> SchedulerConfig:
    base = recorded or SchedulerConfig(num_blocks=1)
    given = _given({name: getattr(args, name) for name in (*_LIMITS, *_RULES)})
    block_size = given.get("block_size", base.block_size)
    if room is not None:
        given.setdefault("num_blocks", room // block_size)
    elif recorded is None and "num_blocks" not in given:
        raise ConfigError("a cost model does not say how much KV a replica has room for: give --num-blocks")
    if given.get("num_blocks", 1) < 1:
        raise ConfigError(f"--num-blocks must be at least 1, not {given['num_blocks']}")
    batching = {"mode": args.batching, "size": args.batch_size, "delay": args.batch_delay}
    order = {"policy": args.scheduling, "ageing": args.ageing}
    try:
        return replace(
            base,
            **given,
            batching=replace(base.batching, **_given(batching)),
            order=replace(base.order, **_given(order)),
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
