"""How a request's KV cache is kept small: the field that says so, and which policies a client may name."""

import math
from collections.abc import Collection
from typing import Annotated, Any

from pydantic import PlainValidator, TypeAdapter, WithJsonSchema

from engine.errors import InvalidRequestError
from engine.kv_policies.policy import KVPolicy
from engine.kv_policies.registry import POLICIES, make_policy


def _policy(value: object) -> KVPolicy | None:
    if isinstance(value, dict) and not all(math.isfinite(one) for one in value.values() if isinstance(one, float)):
        raise ValueError("its numbers must be finite")
    return None if value is None else make_policy(value)


def _schema() -> dict[str, Any]:
    """A policy's name, or an object: the name as its ``type``, and the policy's fields."""
    objects = []
    for name, cls in POLICIES.items():
        fields = TypeAdapter(cls).json_schema().get("properties", {})
        objects.append(
            {
                "type": "object",
                "title": name,
                "description": (cls.__doc__ or "").partition("\n")[0],
                "properties": {"type": {"const": name}, **fields},
                "required": ["type"],
                "additionalProperties": False,
            }
        )
    return {"anyOf": [{"type": "string", "enum": list(POLICIES)}, *objects, {"type": "null"}]}


KVPolicyField = Annotated[KVPolicy | None, PlainValidator(_policy), WithJsonSchema(_schema())]
"""What clients send, as the policy that it stands for."""


def choose_policy(given: KVPolicy | None, default: KVPolicy, allowed: Collection[str]) -> KVPolicy:
    """The policy that a request gave, or the server's ``default``, which is always among the ``allowed`` names.

    No names at all allow every policy. Raises InvalidRequestError if the request's is not allowed.
    """
    if given is None:
        return default
    names = dict.fromkeys((default.name, *(allowed or POLICIES)))
    if given.name not in names:
        raise InvalidRequestError(
            f"kv_policy: {given.name!r} is not allowed here, but {', '.join(map(repr, names))}", param="kv_policy"
        )
    return given
