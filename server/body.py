"""What all bodies that clients send have in common."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

MAX_NAME_LENGTH = 256

Name = Annotated[str, Field(max_length=MAX_NAME_LENGTH)]


class Body(BaseModel):
    """Base of everything that a client sends."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, frozen=True, protected_namespaces=())
