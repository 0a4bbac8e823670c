"""What a client demands of the text's form: OpenAI's ``response_format``, and the names that vLLM made common."""

from collections.abc import Sequence
from json import dumps, loads
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, PlainValidator, WithJsonSchema, model_validator

from engine.errors import InvalidRequestError
from engine.grammar import Grammar
from server.body import Body, Name, QueuedBody

if TYPE_CHECKING:
    from engine.async_engine import AsyncEngine

MAX_CHOICE_TEXTS = 1024
MAX_PATTERN_LENGTH = 4096
"""Characters of a regular expression."""
MAX_PATTERNS_LENGTH = 8192
"""Characters of all regular expressions in a schema."""
MAX_RULES_LENGTH = 16384
"""Characters of a grammar."""


def _schema(value: object) -> object:
    """The schema, also where its text was given."""
    if isinstance(value, str):
        try:
            value = loads(value)
        except (ValueError, RecursionError):
            raise ValueError("is text, but not JSON") from None
    if not (value is None or isinstance(value, dict)):
        raise ValueError("must be a JSON schema that is an object, or its text")
    check_patterns(value)
    return value


def check_patterns(schema: object) -> None:
    """Raise ValueError if a schema's regular expressions are too long: their compilation has no other limit."""
    length, rest = 0, [schema]
    while rest:
        value = rest.pop()
        if isinstance(value, list):
            rest.extend(value)
        elif isinstance(value, dict):
            rest.extend(value.values())
            named = value.get("patternProperties")
            found = [value.get("pattern"), *(named if isinstance(named, dict) else ())]
            length += sum(len(one) for one in found if isinstance(one, str))
    if length > MAX_PATTERNS_LENGTH:
        raise ValueError(f"its patterns have more than {MAX_PATTERNS_LENGTH} characters together")


Schema = Annotated[
    dict[str, Any],
    PlainValidator(_schema),
    WithJsonSchema({"anyOf": [{"type": "object"}, {"type": "string"}, {"type": "null"}]}),
]
"""A JSON schema, or its text."""
Pattern = Annotated[str, Field(max_length=MAX_PATTERN_LENGTH)]
Choices = Annotated[list[str], Field(min_length=1, max_length=MAX_CHOICE_TEXTS)]
Rules = Annotated[str, Field(max_length=MAX_RULES_LENGTH)]


class JsonSchemaFormat(Body):
    """A schema as OpenAI wraps it."""

    name: Name | None = None
    schema_: Annotated[dict[str, Any], AfterValidator(_schema), Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(Body):
    """The form of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema belongs to the type 'json_schema'")
        return self

    @property
    def grammar(self) -> Grammar | None:
        """What it demands."""
        if self.json_schema is None:
            return Grammar("json_object") if self.type == "json_object" else None
        schema = self.json_schema.schema_
        return json_schema(schema, lenient=not self.json_schema.strict)


class StructuredOutputs(Body):
    """All forms in one object, of which one is given."""

    json_: Annotated[Schema | None, Field(alias="json")] = None
    regex: Pattern | None = None
    choice: Choices | None = None
    grammar: Rules | None = None
    json_object: bool | None = None

    def grammars(self) -> dict[str, Grammar]:
        """What they demand, by field."""
        json_object = Grammar("json_object") if self.json_object else None
        found = _grammars(json=self.json_, regex=self.regex, choice=self.choice, grammar=self.grammar)
        return found if json_object is None else {**found, "json_object": json_object}


class ConstrainedBody(QueuedBody):
    """The fields by which endpoints that generate take a demand."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | None = None
    guided_regex: Pattern | None = None
    guided_choice: Choices | None = None
    guided_grammar: Rules | None = None

    @property
    def demands(self) -> list[tuple[str, Grammar]]:
        """Each with the field that makes it."""
        guided = _grammars(
            json=self.guided_json, regex=self.guided_regex, choice=self.guided_choice, grammar=self.guided_grammar
        )
        found = [(f"guided_{field}", one) for field, one in guided.items()]
        if self.structured_outputs is not None:
            found += [("structured_outputs", one) for one in self.structured_outputs.grammars().values()]
        if self.response_format is not None and (form := self.response_format.grammar) is not None:
            found.append(("response_format", form))
        return found

    @model_validator(mode="after")
    def _one_form_at_most(self) -> Self:
        if len(demands := self.demands) > 1:
            param = demands[1][0]
            raise InvalidRequestError(f"{param}: the output already has a form, by {demands[0][0]}", param=param)
        return self


async def compiled(engine: "AsyncEngine", demands: Sequence[tuple[str, Grammar]]) -> Grammar | None:
    """What is demanded, if anything is, ready for the engine.

    Raises:
        InvalidRequestError: it cannot be compiled; the field that demands it is named.
    """
    for param, grammar in demands:
        try:
            await engine.grammars.compile(grammar)
        except InvalidRequestError as error:
            raise InvalidRequestError(f"{param}: {error}", param=param) from None
        return grammar
    return None


def _grammars(
    *, json: Schema | None, regex: str | None, choice: list[str] | None, grammar: str | None
) -> dict[str, Grammar]:
    """The grammars of those that are given, by name."""
    found = {
        "json": None if json is None else json_schema(json),
        "regex": None if regex is None else Grammar("regex", regex),
        "choice": None if choice is None else Grammar("choice", dumps(choice)),
        "grammar": None if grammar is None else Grammar("lark", grammar),
    }
    return {name: one for name, one in found.items() if one is not None}


def json_schema(schema: Schema, *, lenient: bool = False) -> Grammar:
    """The grammar of a schema; if ``lenient``, of what can be enforced of it."""
    return Grammar("json_schema", dumps(with_options(schema, lenient=lenient)))


def with_options(schema: Schema, **options: object) -> Schema:
    """The schema with llguidance's options for it. A client's own are dropped: their patterns would have no limits."""
    return {**schema, "x-guidance": options}
