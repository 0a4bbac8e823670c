"""The requests of OpenAI's Responses API, and the conversation that each of them stands for.

Nothing is kept here from one request to the next: a client sends the whole conversation, earlier answers included.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, PlainValidator, WithJsonSchema, model_validator

from engine.errors import InvalidRequestError
from server.body import Body, Name
from server.protocol import MAX_MESSAGES, ChatRequest, Message, SamplingBody, TemplateValues, Unserved, text_of_parts
from server.structured_output import JsonSchemaFormat, ResponseFormat, check_patterns
from server.tools import (
    MAX_TOOLS,
    Function,
    FunctionCall,
    Tool,
    ToolCall,
    ToolChoice,
    check_choice,
    check_tools,
    tool_choice,
)

MAX_PAIRS = 16
"""Of metadata."""
MAX_INCLUDES = 32
LOGPROBS = "message.output_text.logprobs"
"""What ``include`` says who wants log-probabilities."""
_ONE_ANSWER = "a response is one sampled answer"
_NOT_KEPT = "no response is kept here; send the earlier items of the conversation as input"
_PARTS: Mapping[str, str] = {"input_text": "text", "output_text": "text", "refusal": "refusal"}


def _text(value: object) -> str | None:
    return text_of_parts(value, _PARTS)


def _as_items(value: object) -> object:
    """A text is what a user says."""
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


def _no_reasoning(value: object) -> object:
    given = value.values() if isinstance(value, dict) else [value]
    if any(one not in (None, "none") for one in given):
        raise ValueError("the model is not asked to reason here; leave it out")
    return value


def _flat_choice(value: object) -> ToolChoice | None:
    match value:
        case None | "none" | "auto" | "required":
            return tool_choice(value)
        case {"type": "function", "name": str(name)}:
            return tool_choice({"type": "function", "function": {"name": name}})
    raise ValueError("must be 'none', 'auto', 'required', or {\"type\": \"function\", \"name\": …}")


class FlatTool(Function):
    """A function as this API writes it."""

    type: Literal["function"]

    @model_validator(mode="before")
    @classmethod
    def _is_a_function(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("type") != "function":
            raise ValueError("only tools of type 'function' are served")
        return value

    @property
    def nested(self) -> Tool:
        """As the chat API writes it."""
        fields = {name: getattr(self, name) for name in Function.model_fields}
        return Tool.model_construct(type="function", function=Function.model_construct(**fields))


def _flat_tools(tools: list[FlatTool] | None) -> list[FlatTool] | None:
    check_tools([tool.nested for tool in tools or ()])
    return tools


Text = Annotated[
    str | None,
    PlainValidator(_text),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}, {"type": "null"}]}),
]


class InputItem(Body):
    """Something that was said or called, or what a call brought."""

    type: Literal["message", "function_call", "function_call_output"] = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: Text = None
    call_id: Name | None = None
    name: Name | None = None
    arguments: str | None = None
    output: Text = None

    @model_validator(mode="after")
    def _has_what_its_type_needs(self) -> Self:
        needed = {
            "message": ("role", "content"),
            "function_call": ("call_id", "name", "arguments"),
            "function_call_output": ("call_id", "output"),
        }
        for name in needed[self.type]:
            if getattr(self, name) is None:
                raise ValueError(f"an item of type {self.type!r} needs {name}")
        return self


Input = Annotated[
    list[InputItem],
    Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True),
    BeforeValidator(_as_items, json_schema_input_type=str | list[InputItem]),
]


class TextFormat(Body):
    """The form of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    name: Name | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> Self:
        if (self.type == "json_schema") != (self.schema_ is not None):
            raise ValueError("schema belongs to the type 'json_schema'")
        check_patterns(self.schema_)
        return self

    @property
    def nested(self) -> ResponseFormat:
        """As the chat API writes it."""
        schema = None
        if self.schema_ is not None:
            schema = JsonSchemaFormat.model_construct(name=self.name, schema_=self.schema_, strict=self.strict)
        return ResponseFormat.model_construct(type=self.type, json_schema=schema)


class TextConfig(Body):
    """What the text is to be like."""

    format: TextFormat | None = None
    verbosity: Annotated[Any, Unserved("medium")] = None


class ResponseRequest(SamplingBody):
    """POST /v1/responses."""

    input: Input
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    text: TextConfig | None = None
    tools: Annotated[
        list[FlatTool] | None, Field(max_length=MAX_TOOLS, fail_fast=True), AfterValidator(_flat_tools)
    ] = None
    tool_choice: Annotated[
        ToolChoice | None,
        PlainValidator(_flat_choice),
        WithJsonSchema({"anyOf": [{"enum": ["none", "auto", "required"]}, {"type": "object"}, {"type": "null"}]}),
    ] = None
    parallel_tool_calls: bool | None = None
    include: Annotated[list[Name], Field(max_length=MAX_INCLUDES)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    metadata: (
        Annotated[
            dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]],
            Field(max_length=MAX_PAIRS),
        ]
        | None
    ) = None
    store: bool | None = None
    chat_template_kwargs: TemplateValues = None

    n: Annotated[Any, Unserved(1, why=_ONE_ANSWER)] = None
    best_of: Annotated[Any, Unserved(1, why=_ONE_ANSWER)] = None
    use_beam_search: Annotated[Any, Unserved(False, why=_ONE_ANSWER)] = None
    response_format: Annotated[Any, Unserved(why="the form of a response is text.format")] = None
    previous_response_id: Annotated[Any, Unserved(why=_NOT_KEPT)] = None
    conversation: Annotated[Any, Unserved(why=_NOT_KEPT)] = None
    background: Annotated[Any, Unserved(False)] = None
    prompt: Annotated[Any, Unserved()] = None
    reasoning: Annotated[Any, AfterValidator(_no_reasoning)] = None
    truncation: Annotated[Any, Unserved("disabled")] = None

    @property
    def wants_logprobs(self) -> bool:
        """Whether the log-probabilities of its tokens are to come with the text."""
        return bool(self.top_logprobs) or LOGPROBS in (self.include or ())

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        demands = self.demands
        if demands and self._form is not None and self._form.type != "text":
            raise InvalidRequestError(
                f"text.format: the output already has a form, by {demands[0][0]}", param="text.format"
            )
        try:
            check_choice([tool.nested for tool in self.tools or ()], self.tool_choice)
        except ValueError as error:
            raise InvalidRequestError(f"tool_choice: {error}", param="tool_choice") from None
        return self

    @property
    def _form(self) -> TextFormat | None:
        return None if self.text is None else self.text.format

    def as_chat(self) -> ChatRequest:
        """The same as a request to the chat API; all of it has been checked."""
        fields = {name: getattr(self, name) for name in SamplingBody.model_fields}
        fields |= {
            "messages": self._messages(),
            "response_format": None if self._form is None else self._form.nested,
            "max_completion_tokens": self.max_output_tokens,
            "logprobs": self.wants_logprobs,
            "top_logprobs": self.top_logprobs,
            "tools": None if self.tools is None else [tool.nested for tool in self.tools],
            "tool_choice": self.tool_choice,
            "parallel_tool_calls": self.parallel_tool_calls,
            "chat_template_kwargs": self.chat_template_kwargs,
        }
        return ChatRequest.model_construct(**fields)

    def _messages(self) -> Sequence[Message]:
        """The conversation: calls belong to what the assistant said before them, instructions to the system's words."""
        messages: list[Message] = []
        for item in self.input:
            if item.type == "function_call":
                function = FunctionCall.model_construct(name=item.name, arguments=item.arguments)
                call = ToolCall.model_construct(id=item.call_id, function=function)
                said = messages.pop() if messages and messages[-1].role == "assistant" else None
                content, calls = (None, []) if said is None else (said.content, said.tool_calls or [])
                messages.append(_message("assistant", content, tool_calls=[*calls, call]))
            elif item.type == "function_call_output":
                messages.append(_message("tool", item.output, tool_call_id=item.call_id))
            else:
                messages.append(_message(item.role, item.content))
        if self.instructions:
            first = messages.pop(0).content if messages[0].role in ("system", "developer") else None
            messages.insert(0, _message("system", "\n\n".join(filter(None, (self.instructions, first)))))
        return messages


def _message(role: str | None, content: str | None, **fields: Any) -> Message:
    return Message.model_construct(role=role, content=content, **fields)
