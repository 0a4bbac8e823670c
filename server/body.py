"""What all bodies that clients send have in common."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from server.kv_policy import KVPolicyField

MAX_NAME_LENGTH = 256
MAX_USER_LENGTH = 1024
MAX_TIMEOUT = 86400
"""Seconds."""

Name = Annotated[str, Field(max_length=MAX_NAME_LENGTH)]


class Body(BaseModel):
    """Base of everything that a client sends."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, frozen=True, protected_namespaces=())


class QueuedBody(Body):
    """What every request may say that waits for the engine."""

    model: Name | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=MAX_NAME_LENGTH)] | None = None
    user: Annotated[str, Field(max_length=MAX_USER_LENGTH)] | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None
    timeout: Annotated[float, Field(gt=0, le=MAX_TIMEOUT)] | None = None
    kv_policy: KVPolicyField = None
