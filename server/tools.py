"""The functions that a client offers the model, and the calls of them that it sends back with the conversation."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, PlainValidator, WithJsonSchema

from server.body import MAX_NAME_LENGTH, Body, Name
from server.structured_output import check_patterns

MAX_TOOLS = 128
MAX_TOOLS_LENGTH = 65536
"""Characters of all tools together, as JSON."""
MAX_CALLS = 128
"""Calls in one message."""
_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")


def _function_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError("a name has 1 to 64 letters, digits, '_', '-' and '.'")
    return name


class Function(Body):
    """What a tool does."""

    name: Annotated[
        str, AfterValidator(_function_name), WithJsonSchema({"type": "string", "pattern": f"^{_NAME.pattern}$"})
    ]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    """Something that the model may call."""

    type: Literal["function"]
    function: Function

    def described(self) -> dict[str, Any]:
        """As templates and models know it."""
        return self.model_dump(exclude_none=True, exclude={"function": {"strict"}})


class FunctionCall(Body):
    """What was called."""

    name: Name
    arguments: str
    """JSON; what a model wrote need not be."""


class ToolCall(Body):
    """A call that the assistant made earlier."""

    id: Name
    type: Literal["function"] = "function"
    function: FunctionCall


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """Whether tools are called, and which."""

    mode: Literal["none", "auto", "required"]
    name: str | None = None
    """The only one that may be called, and must."""


def tool_choice(value: object) -> ToolChoice | None:
    """What a client's ``tool_choice`` says. Raises ValueError where it says nothing."""
    match value:
        case None:
            return None
        case "none" | "auto" | "required":
            return ToolChoice(value)
        case {"type": "function", "function": {"name": str(name)}} if len(name) <= MAX_NAME_LENGTH:
            return ToolChoice("required", name)
    raise ValueError('must be \'none\', \'auto\', \'required\', or {"type": "function", "function": {"name": …}}')


def check_tools(tools: Sequence[Tool] | None) -> Sequence[Tool] | None:
    """``tools``, unless they are too much, or two of them are called the same."""
    names = [tool.function.name for tool in tools or ()]
    if len(set(names)) < len(names):
        raise ValueError("two tools have the same name")
    if sum(len(json.dumps(tool.described())) for tool in tools or ()) > MAX_TOOLS_LENGTH:
        raise ValueError(f"all tools together have at most {MAX_TOOLS_LENGTH} characters")
    check_patterns([tool.function.parameters for tool in tools or ()])
    return tools


Tools = Annotated[list[Tool] | None, Field(max_length=MAX_TOOLS, fail_fast=True), AfterValidator(check_tools)]
ToolCalls = Annotated[list[ToolCall], Field(max_length=MAX_CALLS, fail_fast=True)] | None
_NAMED = {
    "type": "object",
    "properties": {
        "type": {"const": "function"},
        "function": {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]},
    },
    "required": ["type", "function"],
}
ToolChoiceField = Annotated[
    ToolChoice | None,
    PlainValidator(tool_choice),
    WithJsonSchema({"anyOf": [{"enum": ["none", "auto", "required"]}, _NAMED, {"type": "null"}]}),
]


def check_choice(tools: Sequence[Tool], choice: ToolChoice | None) -> None:
    """Raise ValueError if the choice demands a tool that is not offered."""
    if choice is None or choice.mode != "required":
        return
    if choice.name is not None and choice.name not in {tool.function.name for tool in tools}:
        raise ValueError(f"there is no tool {choice.name!r}")
    if not tools:
        raise ValueError("there are no tools to choose from")
