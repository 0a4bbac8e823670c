"""What a request's text has to look like, as a value; `engine.grammar_compiler` gives it a meaning."""

from dataclasses import dataclass
from typing import Literal

GrammarKind = Literal["json_schema", "json_object", "regex", "choice", "lark"]


@dataclass(frozen=True, slots=True)
class Grammar:
    """Which texts may come out; equal values are compiled once."""

    kind: GrammarKind
    text: str = ""
    """By kind: a JSON schema; nothing; a regular expression, which matches the whole text; a JSON list of texts; a
    grammar in llguidance's dialect of Lark."""
