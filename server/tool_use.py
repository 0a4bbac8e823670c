"""What a chat request does with tools: which it offers, which it demands, and how its answer is read."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from engine.errors import InvalidRequestError
from engine.grammar import Grammar
from engine.outputs import Output
from server.tool_format import MOST_FORCED_CALLS, ToolFormat
from server.tool_parser import CallDelta, ToolCallParser
from server.tools import Tool, ToolChoice

if TYPE_CHECKING:
    from engine.tokenizer import Tokenizer
    from server.protocol import ChatRequest
    from server.serving import Serving

Demands = Sequence[tuple[str, Grammar]]


@dataclass(frozen=True, slots=True)
class ToolUse:
    """A request's tools, unless it has none or forbids to call them."""

    form: ToolFormat
    tools: Sequence[Tool]
    choice: ToolChoice
    parallel: bool
    tokenizer: "Tokenizer"

    @classmethod
    def of(cls, body: "ChatRequest", serving: "Serving") -> Self | None:
        """What ``body`` asks for."""
        choice = body.tool_choice or ToolChoice("auto")
        if not body.tools or choice.mode == "none":
            return None
        parallel = body.parallel_tool_calls is not False
        return cls(serving.tool_format, body.tools, choice, parallel, serving.engine.tokenizer)

    def demands(self, given: Demands) -> Demands:
        """The request's demands on its text, together with those that follow from its choice of tools.

        Raises InvalidRequestError for what cannot be had together.
        """
        for param, grammar in given:
            if grammar.kind not in ("json_schema", "json_object") or (
                self.choice.mode == "required" and param != "response_format"
            ):
                raise InvalidRequestError(
                    f"{param}: not together with tools, unless tool_choice is 'none'", param=param
                )
        if self.choice.mode == "auto" and not given:
            return []
        answer = given[0][1] if given and self.choice.mode == "auto" else None
        callable_ = [tool for tool in self.tools if self.choice.name in (None, tool.function.name)]
        most = 1 if self.choice.name is not None or not self.parallel else MOST_FORCED_CALLS
        grammar = self.form.grammar(callable_, most=most, marker_id=self._marker_id, answer=answer)
        return [("tools" if answer is None else given[0][0], grammar)]

    def parser(self) -> ToolCallParser:
        """A reader of one choice."""
        names = {tool.function.name for tool in self.tools}
        return ToolCallParser(self.form, names, most=None if self.parallel else 1)

    def text(self, output: Output) -> str:
        """An output's text, with the marker in it where that is a special token, which is never part of the text."""
        marker, ids = self._marker_id, output.token_ids
        if marker not in ids:
            return output.text
        # One token's text is what was held back before it; only an answer that comes whole has more of them.
        end = len(output.text) if len(ids) == 1 else len(self.tokenizer.decode(ids[: ids.index(marker)]))
        return output.text[:end] + self.form.marker + output.text[end:]

    @property
    def _marker_id(self) -> int | None:
        token = self.tokenizer.backend.token_to_id(self.form.marker)
        return token if token in self.tokenizer.special_token_ids else None


def call_delta(delta: CallDelta) -> dict[str, object]:
    """What is new of a call, as a stream tells it."""
    if delta.id is None:
        return {"index": delta.index, "function": {"arguments": delta.arguments}}
    function = {"name": delta.name, "arguments": delta.arguments}
    return {"index": delta.index, "id": delta.id, "type": "function", "function": function}


def whole_message(parser: ToolCallParser, text: str) -> dict[str, object]:
    """A complete answer's content and calls."""
    words, names, arguments = "", list[tuple[str | None, str | None]](), list[str]()
    for piece in parser.push(text) + parser.finish():
        if isinstance(piece, str):
            words += piece
        elif piece.id is not None:
            names.append((piece.id, piece.name))
            arguments.append(piece.arguments)
        else:
            arguments[piece.index] += piece.arguments
    if not names:
        return {"content": words}
    calls = [
        {"id": call_id, "type": "function", "function": {"name": name, "arguments": given}}
        for (call_id, name), given in zip(names, arguments, strict=True)
    ]
    return {"content": words or None, "tool_calls": calls}
