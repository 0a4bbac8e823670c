"""The requests of OpenAI's API and its common extensions, checked strictly.

Bodies are validated straight from their bytes: a boolean is no integer, "3" is no number, NaN and infinity
are nothing, and a lone surrogate is no text. Unknown fields are ignored, as OpenAI's clients expect. A field
that is known but not served yet is declared as such, and refuses every value but those that change nothing.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    PlainValidator,
    ValidationInfo,
    WithJsonSchema,
    model_validator,
)
from pydantic.config import JsonDict
from pydantic_core import CoreSchema
from pydantic_core.core_schema import no_info_after_validator_function

from engine.beam_search import MAX_LENGTH_PENALTY
from engine.errors import InvalidRequestError
from server.body import Body, Name
from server.structured_output import ConstrainedBody
from server.tools import ToolCalls, ToolChoiceField, Tools, check_choice

MAX_N = 128
MAX_STOPS = 4
MAX_STOP_LENGTH = 1024
MAX_STOP_TOKEN_IDS = 128
MAX_BIASES = 1024
MAX_CHOICES = 2048
"""Prompts times continuations of one request."""
MAX_MESSAGES = 4096
MAX_TEMPLATE_VALUES = 4096
"""Values in a request's ``chat_template_kwargs``, nested ones included."""
MAX_IDS = 2**20
"""Token ids in a list, whatever the model: more are not even counted."""
_OF_SAMPLING: Mapping[str, tuple[object, ...]] = {
    "temperature": (0,),
    "top_p": (1,),
    "top_k": (-1, 0),
    "min_p": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "stop": ([],),
}
"""Fields that a beam search does not know, and their values that ask for nothing."""
_OF_BEAMS: Mapping[str, tuple[object, ...]] = {"length_penalty": (1,), "early_stopping": (False,)}
"""The same of fields that only a beam search knows."""

TokenIds = list[int]
_INTS = {"type": "array", "items": {"type": "integer"}}
_STRINGS = {"type": "array", "items": {"type": "string"}}
_TEXT_PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
}
_STOP = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_LENGTH}


class Unserved:
    """For a field that is not served: null and the ``neutral`` values pass, for they ask for nothing."""

    def __init__(self, *neutral: object, why: str = "this is not served yet; leave it out") -> None:
        self._neutral = neutral
        self._why = why

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"enum": [None, *self._neutral]}

    def _check(self, value: object) -> None:
        if value is not None and not any(type(value) is type(one) and value == one for one in self._neutral):
            raise ValueError(self._why)


def _check_length(ids: list[Any], info: ValidationInfo) -> list[Any]:
    """``ids``, unless it is longer than the context length, which ``read_body`` gives with the body."""
    limit = (info.context or {}).get("max_model_len", MAX_IDS)
    if len(ids) > limit:
        raise InvalidRequestError(
            f"{info.field_name}: {len(ids)} token ids are more than {limit}, the model's context length",
            param=info.field_name,
            code="context_length_exceeded",
        )
    return ids


def _is_ids(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)


def _prompts(value: object, info: ValidationInfo) -> list[str | TokenIds]:
    """Any of the four forms of a prompt, as a list with one entry per prompt."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if type(value[0]) is int:
            if _is_ids(_check_length(value, info)):
                return [value]
        elif len(value) > MAX_CHOICES:
            raise ValueError(f"at most {MAX_CHOICES} prompts are taken")
        elif isinstance(value[0], list):
            for item in value:
                if isinstance(item, list):
                    _check_length(item, info)
        if all(isinstance(item, str) for item in value) or all(map(_is_ids, value)):
            return value
    raise ValueError("must be text, a list of texts, a list of token ids, or a list of such lists; not empty")


def _stops(value: object) -> list[str]:
    stops = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise ValueError("must be text, or a list of texts")
    if len(stops) > MAX_STOPS:
        raise ValueError(f"at most {MAX_STOPS} stop strings are taken")
    if not all(0 < len(stop) <= MAX_STOP_LENGTH for stop in stops):
        raise ValueError(f"a stop string has 1 to {MAX_STOP_LENGTH} characters")
    return stops


def _early_stopping(value: object) -> object:
    if not (value is None or isinstance(value, bool) or value == "never"):
        raise ValueError("must be true, false or 'never'")
    return value


def _template_values(value: dict[str, Any] | None) -> dict[str, Any] | None:
    """``value``, unless it holds too much."""
    count, rest = 0, [value]
    while rest:
        one = rest.pop()
        inner = one.values() if isinstance(one, dict) else one if isinstance(one, list) else ()
        count += len(inner)
        if count > MAX_TEMPLATE_VALUES:
            raise ValueError(f"at most {MAX_TEMPLATE_VALUES} values are taken, nested ones included")
        rest.extend(inner)
    return value


def text_of_parts(value: object, fields: Mapping[str, str]) -> str | None:
    """A message's text, its parts joined by newlines. ``fields`` say, by a part's type, where its text is."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("must be text, or a list of text parts")
    texts = []
    for part in value:
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise ValueError("each part must be an object with a type")
        field = fields.get(part["type"])
        if field is None:
            raise ValueError(f"parts of type {part['type'][:64]!r} are not served, only {', '.join(map(repr, fields))}")
        if not isinstance(part.get(field), str):
            raise ValueError(f"a part of type {part['type']!r} must have a {field}")
        texts.append(part[field])
    return "\n".join(texts)


def _content(value: object) -> str | None:
    return text_of_parts(value, {"text": "text"})


Prompt = Annotated[
    list[str | TokenIds],
    PlainValidator(_prompts),
    WithJsonSchema(
        {"anyOf": [{"type": "string"}, _STRINGS, _INTS, {"type": "array", "items": _INTS}], "title": "Prompt"}
    ),
]
Stops = Annotated[
    list[str],
    PlainValidator(_stops),
    WithJsonSchema({"anyOf": [_STOP, {"type": "array", "items": _STOP, "maxItems": MAX_STOPS}, {"type": "null"}]}),
]
EarlyStopping = Annotated[
    bool | Literal["never"] | None,
    PlainValidator(_early_stopping),
    WithJsonSchema({"enum": [True, False, "never", None]}),
]
Content = Annotated[
    str | None,
    PlainValidator(_content),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": _TEXT_PART}, {"type": "null"}]}),
]
TemplateValues = Annotated[dict[Name, Any] | None, AfterValidator(_template_values)]


class StreamOptions(Body):
    """What a stream adds to its chunks."""

    include_usage: bool | None = None


class SamplingBody(ConstrainedBody):
    """What all endpoints that generate take to steer sampling."""

    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    logit_bias: Annotated[dict[int, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=MAX_BIASES)] | None = (
        None
    )

    min_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    stop: Annotated[Stops, Field(default_factory=list)]
    stop_token_ids: (
        Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=MAX_STOP_TOKEN_IDS, fail_fast=True)] | None
    ) = None
    ignore_eos: bool | None = None

    use_beam_search: bool | None = None
    length_penalty: Annotated[float, Field(ge=-MAX_LENGTH_PENALTY, le=MAX_LENGTH_PENALTY)] | None = None
    early_stopping: EarlyStopping = None

    bad_words: Annotated[Any, Unserved([])] = None
    allowed_token_ids: Annotated[Any, Unserved()] = None
    prompt_logprobs: Annotated[Any, Unserved()] = None
    skip_special_tokens: Annotated[Any, Unserved(True)] = None
    include_stop_str_in_output: Annotated[Any, Unserved(False)] = None
    truncate_prompt_tokens: Annotated[Any, Unserved()] = None

    @property
    def num_made(self) -> int:
        """How many continuations of a prompt are made."""
        return self.best_of or self.n or 1

    @model_validator(mode="after")
    def _options_belong_to_streams(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise InvalidRequestError("stream_options is only allowed when stream is true", param="stream_options")
        return self

    @model_validator(mode="after")
    def _best_come_at_the_end(self) -> Self:
        n = self.n or 1
        if self.best_of is not None and self.best_of < n:
            raise InvalidRequestError(f"best_of must be at least n, which is {n}", param="best_of")
        if self.stream and (self.use_beam_search or (self.best_of or n) > n):
            cause = "use_beam_search" if self.use_beam_search else "best_of above n"
            raise InvalidRequestError(f"{cause} cannot stream: what is best is known only at the end", param="stream")
        return self

    @model_validator(mode="after")
    def _beams_or_sampling(self) -> Self:
        misplaced = _OF_SAMPLING if self.use_beam_search else _OF_BEAMS
        for name, neutral in misplaced.items():
            value = getattr(self, name)
            if value is not None and value not in neutral:
                only = "without use_beam_search" if self.use_beam_search else "when use_beam_search is true"
                raise InvalidRequestError(f"{name} is only allowed {only}", param=name)
        return self


class CompletionRequest(SamplingBody):
    """POST /v1/completions."""

    prompt: Prompt
    max_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    add_special_tokens: bool | None = None

    suffix: Annotated[Any, Unserved("")] = None
    prompt_embeds: Annotated[Any, Unserved()] = None

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if self.max_tokens == 0 and not self.echo:
            raise InvalidRequestError("max_tokens may only be 0 together with echo", param="max_tokens")
        name = "n" if self.best_of is None else "best_of"
        if len(self.prompt) * self.num_made > MAX_CHOICES:
            raise InvalidRequestError(f"prompts times {name} must be at most {MAX_CHOICES}", param=name)
        return self


_SAYS_SOMETHING: JsonDict = {
    "anyOf": [
        {"properties": {"content": {"type": ["string", "array"]}}, "required": ["content"]},
        {"properties": {"role": {"const": "assistant"}, "tool_calls": {"minItems": 1}}, "required": ["tool_calls"]},
    ]
}


class Message(Body):
    """One turn of a conversation."""

    model_config = ConfigDict(json_schema_extra=_SAYS_SOMETHING)

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Content = None
    name: Name | None = None
    tool_calls: ToolCalls = None
    tool_call_id: Name | None = None
    function_call: Annotated[Any, Unserved()] = None

    @model_validator(mode="after")
    def _fits_its_role(self) -> Self:
        if self.role == "function":
            raise ValueError("functions are not served; tools are")
        if self.tool_calls and self.role != "assistant":
            raise ValueError("only an assistant has tool_calls")
        if self.content is None and not self.tool_calls:
            raise ValueError("content must not be empty")
        return self


Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]


class ChatRequest(SamplingBody):
    """POST /v1/chat/completions."""

    messages: Messages
    max_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: TemplateValues = None

    tools: Tools = None
    tool_choice: ToolChoiceField = None
    parallel_tool_calls: bool | None = None
    functions: Annotated[Any, Unserved([])] = None
    function_call: Annotated[Any, Unserved("none", "auto")] = None
    modalities: Annotated[Any, Unserved(["text"])] = None
    audio: Annotated[Any, Unserved()] = None
    prediction: Annotated[Any, Unserved()] = None
    web_search_options: Annotated[Any, Unserved()] = None
    documents: Annotated[Any, Unserved([])] = None
    chat_template: Annotated[Any, Unserved()] = None
    continue_final_message: Annotated[Any, Unserved(False)] = None
    echo: Annotated[Any, Unserved(False)] = None

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequestError("top_logprobs is only allowed when logprobs is true", param="top_logprobs")
        try:
            check_choice(self.tools or (), self.tool_choice)
        except ValueError as error:
            raise InvalidRequestError(f"tool_choice: {error}", param="tool_choice") from None
        return self


class TokenizeRequest(Body):
    """POST /tokenize: a prompt, or messages to put through the chat template."""

    model: Name | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: TemplateValues = None
    tools: Tools = None

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise InvalidRequestError("either prompt or messages is needed", param="prompt")
        return self


class DetokenizeRequest(Body):
    """POST /detokenize."""

    model: Name | None = None
    tokens: Annotated[
        list[Annotated[int, Field(ge=0)]],
        Field(max_length=MAX_IDS, fail_fast=True),
        AfterValidator(_check_length),
    ]
