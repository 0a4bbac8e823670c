"""Policies by name, and from what a client or a setting says: ``"streaming"``, or an object with its fields."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Final

from engine.kv_policies.full import Full
from engine.kv_policies.h2o import H2O
from engine.kv_policies.knorm import KNorm
from engine.kv_policies.policy import KVPolicy
from engine.kv_policies.pyramid import Pyramid
from engine.kv_policies.snapkv import SnapKV
from engine.kv_policies.spatten import SpAtten
from engine.kv_policies.streaming import Streaming
from engine.kv_policies.tova import TOVA
from engine.kv_policies.window import SlidingWindow

POLICIES: Final[Mapping[str, type[Any]]] = {
    cls.name: cls for cls in (Full, SlidingWindow, Streaming, H2O, SpAtten, SnapKV, Pyramid, TOVA, KNorm)
}


def make_policy(given: object, policies: Mapping[str, type[Any]] = POLICIES) -> KVPolicy:
    """The policy that a name, or an object with a ``type`` and the policy's fields, stands for.

    Raises ValueError, in words for the one who gave it: an unknown name or field, a value of a wrong type or out of
    range.
    """
    fields: dict[str, Any] = {"type": given} if isinstance(given, str) else given  # type: ignore[assignment]
    if not isinstance(fields, Mapping) or not isinstance(fields.get("type"), str):
        raise ValueError("must be a policy's name, or an object with its name as 'type'")
    cls = policies.get(fields["type"])
    if cls is None:
        raise ValueError(f"there is no policy {fields['type'][:64]!r}, but {', '.join(map(repr, policies))}")
    known = {field.name: field for field in dataclasses.fields(cls)}
    for name, value in fields.items():
        if name == "type":
            continue
        if name not in known:
            has = f"has only {', '.join(map(repr, known))}" if known else "has no fields"
            raise ValueError(f"the policy {cls.name!r} {has}, not {str(name)[:64]!r}")
        _check_type(name, value, known[name].type)
    policy: KVPolicy = cls(**{name: value for name, value in fields.items() if name != "type"})
    policy.budget()
    return policy


def describe(policy: KVPolicy) -> dict[str, Any]:
    """The object that `make_policy` makes the same policy of."""
    return {"type": policy.name, **dataclasses.asdict(policy)}  # type: ignore[call-overload]


_LARGEST: Final = 2**31 - 1


def _check_type(name: str, value: object, expected: object) -> None:
    """A field is an int, or a float that may be given as an int."""
    if expected is int:
        if type(value) is not int or not 0 <= value <= _LARGEST:
            raise ValueError(f"{name} must be a whole number from 0 to {_LARGEST}, not {value!r:.64}")
    elif type(value) not in (int, float) or not -_LARGEST <= value <= _LARGEST:  # type: ignore[operator]
        raise ValueError(f"{name} must be a number of a sane size, not {value!r:.64}")


def policy_setting(value: object) -> KVPolicy:
    """A setting's value: a policy, its name, or its object, as JSON where it is text."""
    if any(isinstance(value, cls) for cls in POLICIES.values()):
        return value  # type: ignore[return-value]
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            value = json.loads(value)
        except ValueError:
            raise ValueError('expected a KV policy\'s name, or JSON such as {"type": "streaming"}') from None
    return make_policy(value)
