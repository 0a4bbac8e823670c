"""How families of models write the calls of tools: as text, and as the grammar of that text."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from engine.grammar import Grammar
from server.structured_output import with_options
from server.tools import Tool

MOST_FORCED_CALLS: Final = 16
"""Calls that an answer makes at most where it must make some: without an end, small models find none."""
_ARGUMENTS_WHITESPACE: Final = r"[ \t\r\n]{1,8}"


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """An answer's calls are ``before``, calls with ``between`` between them, and ``after``.

    A call is ``opening``, a JSON object with the function's name and, under the key ``arguments``, its arguments,
    and ``closing``.
    """

    name: str
    marker: str
    """Where it appears, calls begin."""
    arguments: str = "arguments"
    before: str = ""
    opening: str = ""
    closing: str = ""
    between: str = "\n"
    after: str = ""
    bare: bool = False
    """Whether an answer that begins with an object is a call without the marker."""
    nine_letter_ids: bool = False
    """Whether templates insist on ids of nine letters and digits."""
    hint: str | None = None
    """What stands in chat templates of the family that do not write the marker."""

    def write(self, calls: Sequence[tuple[str, Any]]) -> str:
        """Names with their arguments as an answer."""
        objects = [json.dumps({"name": name, self.arguments: given}, ensure_ascii=False) for name, given in calls]
        return self.before + self.between.join(self.opening + one + self.closing for one in objects) + self.after

    def grammar(
        self, tools: Sequence[Tool], *, most: int, marker_id: int | None, answer: Grammar | None = None
    ) -> Grammar:
        """The answers that are 1 to ``most`` calls of the tools, or instead, where one is given, a JSON ``answer``.

        ``marker_id`` is the marker's where that is a special token: such have no text.
        """
        before = json.dumps(self.before)
        if marker_id is not None and self.before:
            before = f"<[{marker_id}]> {json.dumps(self.before.removeprefix(self.marker))}"
        more = f" ({json.dumps(self.between)} call){{0,{most - 1}}}" if most > 1 else ""
        bodies = [f"call_{index}" for index in range(len(tools))]
        rules = [
            "start: calls" + ("" if answer is None else " | answer"),
            f"calls: {before} call{more} {json.dumps(self.after)}",
            f"call: {json.dumps(self.opening)} ({' | '.join(bodies)}) {json.dumps(self.closing)}",
        ]
        if answer is not None:
            rules.append("answer: %json " + (answer.text or '{"type": "object"}'))
        for body, tool in zip(bodies, tools, strict=True):
            head = f'{{"name": {json.dumps(tool.function.name)}, "{self.arguments}": '
            schema = json.dumps(_arguments_schema(tool))
            rules.append(f'{body}: {json.dumps(head)} %json {schema} "}}"')
        return Grammar("lark", "\n".join(rules))


HERMES: Final = ToolFormat("hermes", "<tool_call>", opening="<tool_call>\n", closing="\n</tool_call>")
LLAMA3: Final = ToolFormat(
    "llama3",
    "<|python_tag|>",
    arguments="parameters",
    between="; ",
    bare=True,
    hint='"parameters": dictionary',
)
MISTRAL: Final = ToolFormat(
    "mistral", "[TOOL_CALLS]", before="[TOOL_CALLS] [", between=", ", after="]", nine_letter_ids=True
)
FORMATS: Final[Mapping[str, ToolFormat]] = {one.name: one for one in (HERMES, LLAMA3, MISTRAL)}


def choose_format(name: str, template: str | None) -> ToolFormat:
    """The format of that name; ``auto`` takes the one whose marker the chat template writes, or Hermes'."""
    if name != "auto":
        return FORMATS[name]
    written = template or ""
    known = (one for one in FORMATS.values() if one.marker in written or (one.hint is not None and one.hint in written))
    return next(known, HERMES)


def _arguments_schema(tool: Tool) -> dict[str, Any]:
    """The schema of a call's arguments, which are an object."""
    given = tool.function.parameters
    schema = {"properties": {}, "additionalProperties": False} if given is None else given
    schema = {"type": "object", **schema}
    return with_options(schema, lenient=not tool.function.strict, whitespace_pattern=_ARGUMENTS_WHITESPACE)
