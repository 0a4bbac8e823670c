"""The loads that are simulated: made up from a rate and distributions of lengths, or recorded.

A made-up request is a function of the seed and its index alone, so that of millions only those are made that somebody
looks at, and they are the same however many replicas share them.
"""

import hashlib
import json
import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from statistics import NormalDist
from typing import Any, Final

from bench.arrivals import arrival_moments
from engine.errors import ConfigError
from scheduler.simulator import Arrival

MOST_REQUESTS: Final = 50_000_000
"""Their moments take 8 bytes each, and half a second per million."""
_MOST_TOKENS: Final = 1 << 24
_NORMAL: Final = NormalDist()


@dataclass(frozen=True, slots=True)
class Lengths:
    """A distribution of token counts: `fixed` (n), `uniform` (low, high), `lognormal` (median, sigma, most)."""

    text: str
    """As it was given."""
    kind: str
    values: tuple[float, ...]

    def at(self, share: float) -> int:
        """The count that ``share`` (0 to 1, both excluded) of all are below."""
        match self.kind, self.values:
            case "fixed", (length,):
                return int(length)
            case "uniform", (low, high):
                return int(low + share * (high - low + 1))
            case _, (median, sigma, most):
                return max(1, int(min(most, round(median * math.exp(sigma * _NORMAL.inv_cdf(share))))))
        raise AssertionError(self)


_FORMS: Final = {"fixed": 1, "uniform": 2, "lognormal": 3}


def parse_lengths(text: str, flag: str) -> Lengths:
    """Lengths from text: `512`, `uniform:1:1024`, `lognormal:512:0.8` or `lognormal:512:0.8:4096` (cut at 4096)."""
    kind, _, rest = text.partition(":") if ":" in text else ("fixed", "", text)
    try:
        values = [float(part) for part in rest.split(":")]
    except ValueError:
        values = []
    if kind == "lognormal" and len(values) == 2:
        values.append(_MOST_TOKENS)
    counts = [value for index, value in enumerate(values) if not (kind == "lognormal" and index == 1)]
    sound = len(values) == _FORMS.get(kind) and all(value % 1 == 0 and 1 <= value <= _MOST_TOKENS for value in counts)
    if not sound or (kind == "uniform" and values[0] > values[1]) or not all(0 <= value < math.inf for value in values):
        raise ConfigError(
            f"{flag} takes a number of tokens, uniform:LOW:HIGH or lognormal:MEDIAN:SIGMA[:MOST], not {text!r}"
        )
    return Lengths(text, kind, tuple(values))


@dataclass(frozen=True, slots=True, kw_only=True)
class SyntheticLoad:
    """Requests at random moments, of random lengths. A `scheduler.cluster.Load`."""

    moments: "array[float]"
    """Of their arrival, in units of the mean gap."""
    rate: float
    """Requests per second."""
    inputs: Lengths
    """Tokens of a prompt, beside those of its prefix."""
    outputs: Lengths
    prefixes: int = 0
    """Shared beginnings, of which each prompt has one, all equally often; 0 for none."""
    prefix_tokens: int = 0
    seed: str = ""

    def __len__(self) -> int:
        return len(self.moments)

    def __getitem__(self, index: int, /) -> Arrival:
        drawn = hashlib.blake2b(f"{self.seed}/{index}".encode(), digest_size=24).digest()
        first, second, third = ((int.from_bytes(drawn[at : at + 8], "little") + 0.5) / 2**64 for at in (0, 8, 16))
        return Arrival(
            time=self.moments[index] / self.rate,
            prompt=self.inputs.at(first),
            output=self.outputs.at(second),
            prefix=int(third * self.prefixes) if self.prefixes else None,
            prefix_tokens=self.prefix_tokens,
        )


def random_moments(count: int, burstiness: float, seed: str) -> "array[float]":
    """When ``count`` requests arrive, in units of the mean gap: those of `bench.arrivals.OpenLoop`."""
    return array("d", islice(arrival_moments(1.0, seed, burstiness), count))


def read_jsonl(path: Path) -> list[Arrival]:
    """Recorded requests, one JSON object a line, sorted by time; the first comes at 0. Raises ConfigError.

    `time` (seconds), `prompt_tokens` and `output_tokens`; where they are known `prefix` (a number that prompts with the
    same beginning share) and `prefix_tokens` (its length, part of `prompt_tokens`), `priority`, `tenant`.
    """
    try:
        with path.open(encoding="utf-8") as file:
            lines = [(number, line) for number, line in enumerate(file, start=1) if line.strip()]
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is no text") from None
    arrivals = []
    for number, line in lines:
        try:
            arrivals.append(_arrival(json.loads(line)))
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path}, line {number}: is not valid JSON: {error.msg}") from None
        except ValueError as error:
            raise ConfigError(f"{path}, line {number}: {error}") from None
    if not arrivals:
        raise ConfigError(f"{path}: holds no requests")
    arrivals.sort(key=lambda arrival: arrival.time)
    return moved(arrivals, start=arrivals[0].time)


_KEYS: Final = ("time", "prompt_tokens", "output_tokens", "prefix", "prefix_tokens", "priority", "tenant")


def _arrival(entry: Any) -> Arrival:
    if not isinstance(entry, dict):
        raise ValueError("a request is a JSON object")
    if unknown := sorted(set(entry) - set(_KEYS)):
        raise ValueError(f"a request has no {unknown[0]!r}, but {', '.join(_KEYS)}")
    time, tenant, prefix = entry.get("time"), entry.get("tenant", ""), entry.get("prefix")
    if isinstance(time, bool) or not isinstance(time, int | float) or not math.isfinite(time):
        raise ValueError(f"time is {time!r}, not a number of seconds")
    if not isinstance(tenant, str):
        raise ValueError(f"tenant is {tenant!r}, not a text")
    prompt = _whole(entry, "prompt_tokens", 1)
    shared = _whole(entry, "prefix_tokens", 0, 0) if prefix is not None else 0
    if shared > prompt:
        raise ValueError(f"prefix_tokens is {shared}, more than the {prompt} of the whole prompt")
    return Arrival(
        time=float(time),
        prompt=prompt - shared,
        output=_whole(entry, "output_tokens", 1),
        prefix=None if prefix is None else _whole(entry, "prefix", 0),
        prefix_tokens=shared,
        priority=_whole(entry, "priority", -_MOST_TOKENS, 0),
        tenant=tenant,
    )


def _whole(entry: dict[str, Any], name: str, least: int, default: int | None = None) -> int:
    value = entry.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= _MOST_TOKENS:
        raise ValueError(f"{name} is {value!r}, not a whole number from {least} to {_MOST_TOKENS}")
    return value


def moved(arrivals: Sequence[Arrival], *, start: float = 0.0, speed: float = 1.0) -> list[Arrival]:
    """The same requests, from ``start`` on and ``speed`` times as fast."""
    return [replace(arrival, time=(arrival.time - start) / speed) for arrival in arrivals]
