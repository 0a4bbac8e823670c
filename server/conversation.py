"""A client's messages and tools as a chat template takes them, also one that has never heard of tools."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from server.tool_format import ToolFormat
from server.tools import Tool, ToolCall

if TYPE_CHECKING:
    from server.protocol import Message

Turn = dict[str, Any]


def native_turns(messages: Sequence["Message"]) -> list[Turn]:
    """For templates that know tools, by Hugging Face's conventions: a call's arguments are an object, not its text."""
    turns = []
    for message in messages:
        turn = _turn(message)
        if message.tool_calls:
            turn["tool_calls"] = [_native(call) for call in message.tool_calls]
        if message.tool_call_id is not None:
            turn["tool_call_id"] = message.tool_call_id
        turns.append(turn)
    return turns


def plain_turns(messages: Sequence["Message"], tools: Sequence[Tool], form: ToolFormat) -> list[Turn]:
    """For templates that do not: tools are a system message, calls are text, and their results a user's words."""
    turns: list[Turn] = []
    previous = None
    for message in messages:
        turn = _turn(message)
        if message.tool_calls:
            calls = [(call.function.name, _arguments(call)) for call in message.tool_calls]
            turn["content"] = "\n".join(filter(None, (message.content, form.write(calls))))
        if message.role == "tool":
            turn = {"role": "user", "content": f"<tool_response>\n{message.content}\n</tool_response>"}
            if previous == "tool":
                turns[-1]["content"] += "\n" + turn["content"]
                continue
        turns.append(turn)
        previous = message.role
    if tools:
        system = turns.pop(0)["content"] if turns and turns[0]["role"] == "system" else ""
        turns.insert(0, {"role": "system", "content": "\n\n".join(filter(None, (system, _instructions(tools, form))))})
    return turns


def _turn(message: "Message") -> Turn:
    role = "system" if message.role == "developer" else message.role
    turn: Turn = {"role": role, "content": message.content or ""}
    return turn if message.name is None else {**turn, "name": message.name}


def _native(call: ToolCall) -> dict[str, Any]:
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": call.function.name, "arguments": _arguments(call)},
    }


def _arguments(call: ToolCall) -> Any:
    """A call's arguments as an object; as they are, if a model wrote something else."""
    try:
        value = json.loads(call.function.arguments)
    except (ValueError, RecursionError):
        return call.function.arguments
    return value if isinstance(value, dict) else call.function.arguments


def _instructions(tools: Sequence[Tool], form: ToolFormat) -> str:
    """What Hermes' and Qwen's templates tell their models, in other words."""
    listed = "\n".join(json.dumps(tool.described(), ensure_ascii=False) for tool in tools)
    example = form.write([("function-name", {"argument-name": "value"})])
    return (
        f"You can call these functions. Each line is the JSON signature of one:\n<tools>\n{listed}\n</tools>\n"
        f"To call a function, answer with its name and its arguments as JSON, in exactly this form:\n{example}"
    )
