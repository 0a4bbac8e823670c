"""The KV policies that a command compares, from ``--policy`` and ``--budgets``.

A policy is written as a server takes it, its name or a JSON object, or shorter, ``streaming:sinks=4,window=252``. A
``*`` in place of a number stands for each of the budgets in turn, alone or as ``*-4`` or ``*/2``: so a policy is
measured over its sizes whatever its fields are called.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.random_eviction import RandomEviction
from engine.engine_info import EngineInfo
from engine.errors import ConfigError
from engine.kv_policies.fit import budget_refusal
from engine.kv_policies.policy import KVPolicy
from engine.kv_policies.registry import POLICIES, describe, make_policy
from scheduler.kv_budget import KVBudget, Window

_POLICIES = {**POLICIES, RandomEviction.name: RandomEviction}
_SHARE = re.compile(r"\*(?:([-/])([1-9][0-9]{0,8}))?")
_INTEGER, _NUMBER = re.compile(r"-?[0-9]{1,10}"), re.compile(r"-?[0-9]{0,10}\.[0-9]{1,10}")


@dataclass(frozen=True, slots=True)
class Candidate:
    """A policy to be measured."""

    policy: KVPolicy
    given: str
    """What it was made from: candidates of one ``--policy`` differ in size only."""
    budget: int | None
    """Tokens whose KV it keeps; None: all."""

    @property
    def label(self) -> str:
        """Its name and fields, as in ``streaming sinks=4 window=252``."""
        fields = {name: value for name, value in describe(self.policy).items() if name != "type"}
        return " ".join([self.policy.name, *(f"{name}={value}" for name, value in fields.items())])


def candidates(given: Sequence[str], budgets: Sequence[int]) -> list[Candidate]:
    """The policies of the command line, in its order. Raises ConfigError."""
    found: list[Candidate] = []
    for text in given:
        fields = _fields(text)
        stars = any(isinstance(value, str) and _SHARE.fullmatch(value) for value in fields.values())
        found += [_candidate(text, fields, budget) for budget in (budgets if stars else [None])]
    labels = [one.label for one in found]
    for label in labels:
        if labels.count(label) > 1:
            raise ConfigError(f"--policy: there are two of {label!r}")
    return found


def _candidate(text: str, fields: Mapping[str, Any], budget: int | None) -> Candidate:
    filled = fields if budget is None else {name: _share(value, budget) for name, value in fields.items()}
    try:
        policy = make_policy(filled, _POLICIES)
        kept = _kept(policy.budget())
    except ValueError as error:
        at = "" if budget is None else f" with a budget of {budget}"
        raise ConfigError(f"--policy {text}{at}: {error}") from None
    return Candidate(policy, text, kept if budget is None else budget)


def _kept(budget: KVBudget | None) -> int | None:
    """Tokens that a policy keeps, those aside that wait to be evicted together."""
    if budget is None:
        return None
    return budget.window + budget.sinks if isinstance(budget, Window) else budget.slots


def check(policies: Sequence[Candidate], info: EngineInfo) -> None:
    """Raise ConfigError if the model cannot have one of them."""
    for one in policies:
        budget = one.policy.budget()
        refusal = None if budget is None else budget_refusal(budget, info)
        if refusal is not None:
            raise ConfigError(f"--policy {one.given}: {refusal}")


def _fields(text: str) -> Mapping[str, Any]:
    """The object that `make_policy` takes, numbers perhaps with stars."""
    if text.lstrip().startswith("{"):
        try:
            fields = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"--policy {text}: is not JSON: {error}") from None
        assert isinstance(fields, dict)
        return fields
    name, colon, rest = text.partition(":")
    fields = {"type": name}
    for part in rest.split(",") if colon else []:
        field, equals, value = part.partition("=")
        if not (field and equals and value) or field in fields:
            raise ConfigError(f"--policy {text}: expected NAME:FIELD=VALUE,FIELD=VALUE, each field once")
        fields[field] = _value(value)
    return fields


def _value(text: str) -> Any:
    """A number, or what is none as it is: the policy says what it thinks of it."""
    return int(text) if _INTEGER.fullmatch(text) else float(text) if _NUMBER.fullmatch(text) else text


def _share(value: Any, budget: int) -> Any:
    """What a star stands for; any other value as it is."""
    match = _SHARE.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        return value
    operator, operand = match.groups()
    return budget if operator is None else budget - int(operand) if operator == "-" else budget // int(operand)
