"""Chat templates: a conversation to the text that the model was trained on, by Hugging Face's conventions.

A template comes from a checkpoint, that is from strangers, so it runs in Jinja's sandbox: no attributes of Python's
insides, no changes to what it is given.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from jinja2 import TemplateError, meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from engine.errors import ConfigError, InvalidRequestError

if TYPE_CHECKING:
    from engine.tokenizer import Tokenizer

RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token"})
"""Variables that a request's ``chat_template_kwargs`` must not set."""


class GenerationTag(Extension):
    """`{% generation %}…{% endgeneration %}` marks an assistant's words for training; here it is its contents."""

    tags = {"generation"}  # noqa: RUF012 — Jinja's own interface

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Replace the tag by what it encloses."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """A compiled template, and the special tokens that it may write.

    Raises:
        ConfigError: the template's syntax is wrong.
    """

    def __init__(self, source: str, *, bos_token: str | None = None, eos_token: str | None = None) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", GenerationTag]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        self._tokens = {"bos_token": bos_token or "", "eos_token": eos_token or ""}
        self.source = source
        try:
            self._template = environment.from_string(source)
            self.knows_tools = "tools" in meta.find_undeclared_variables(environment.parse(source))
        except TemplateError as error:
            raise ConfigError(f"the chat template is not valid: {error}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> str:
        """The conversation's text, its special tokens spelled out. Only a template that ``knows_tools`` shows them.

        Raises:
            InvalidRequestError: the template refuses the conversation, or cannot work with the variables.
        """
        given = dict(variables or {})
        if taken := RESERVED & given.keys():
            raise InvalidRequestError(f"chat_template_kwargs must not set {min(taken)}", param="chat_template_kwargs")
        # One dict rather than keywords: a client may call a variable "self".
        context = {"documents": None, **given, **self._tokens, "tools": list(tools) or None}
        context |= {"messages": messages, "add_generation_prompt": add_generation_prompt}
        try:
            text = self._template.render(context)
        except RecursionError:
            raise InvalidRequestError("the chat template went too deep", param="messages") from None
        except Exception as error:
            # A template can fail in any way that Python can: it computes with what the client sent.
            message = " ".join(str(error).split())[:500]
            raise InvalidRequestError(f"the chat template refused the messages: {message}", param="messages") from error
        return text.encode(errors="replace").decode()


def load_template(file: Path | None, tokenizer: "Tokenizer") -> ChatTemplate | None:
    """The template in ``file``, or without one the model's own, if it has any.

    Raises:
        ConfigError: it cannot be read, or its syntax is wrong.
    """
    source = tokenizer.chat_template
    if file is not None:
        try:
            source = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--chat-template: {file} cannot be read") from error
    if source is None:
        return None
    return ChatTemplate(source, bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as models saw it in training: Jinja's own filter would escape HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
