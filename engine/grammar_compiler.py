"""From grammars to matchers, by llguidance: in a thread of its own, under limits, each grammar once.

The library's parsers and compilers recurse: a schema of 3,000 definitions, each of which refers to the next, overflows
a stack of 8 MiB, and the process is gone. With a stack for the longest text that `MAX_GRAMMAR_LENGTH` lets in none has.
"""

import asyncio
import json
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Final

import llguidance
from llguidance.gbnf_to_lark import any_to_lark

from engine.errors import InvalidRequestError
from engine.grammar import Grammar, GrammarKind
from engine.grammar_matcher import GrammarMatcher, one_line
from engine.grammar_vocabulary import GrammarVocabulary
from engine.tokenizer import Tokenizer

MAX_GRAMMAR_LENGTH: Final[dict[GrammarKind, int]] = {
    "json_schema": 2**17,
    "json_object": 0,
    "regex": 2**12,
    "choice": 2**16,
    "lark": 2**17,
}
"""Characters. What compiling a regular expression takes grows with the square of its length, and nothing else limits
it: who takes schemas and grammars from strangers has to look at the regular expressions in them."""

_STACK_BYTES: Final = 256 << 20
"""Of the compiling thread; only what is used of it is ever real. A level of recursion takes up to 10 kB, and 20
characters of text."""
_CACHED: Final = 32
"""Grammars that are kept, the last used."""
_WHITESPACE: Final = r"[ \t\r\n]{1,32}"
"""Between JSON's parts, at most. Without an end to it a small model goes on indenting until its tokens are used up."""


class GrammarCompiler:
    """Makes matchers for one tokenizer, and a model of ``vocab_size`` tokens."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._ends = sorted(token for token in tokenizer.eos_token_ids if token < vocab_size)
        self._compiled: OrderedDict[Grammar, llguidance.LLMatcher] = OrderedDict()
        self._thread: ThreadPoolExecutor | None = None

    async def compile(self, grammar: Grammar) -> None:
        """Have the grammar ready for `matchers`, without holding up the event loop.

        Raises InvalidRequestError if it is too long, wrong, or too complex, or if nothing matches it.
        """
        if grammar in self._compiled:
            self._compiled.move_to_end(grammar)
        else:
            compiled = await asyncio.get_running_loop().run_in_executor(self._worker(), self._compile, grammar)
            self._compiled[grammar] = compiled
            while len(self._compiled) > _CACHED:
                self._compiled.popitem(last=False)

    def matchers(self, grammar: Grammar, count: int) -> list[GrammarMatcher]:
        """``count`` matchers at the grammar's beginning; quick after `compile`. Raises like it."""
        if grammar not in self._compiled:
            self._compiled[grammar] = self._worker().submit(self._compile, grammar).result()
        self._compiled.move_to_end(grammar)
        return [GrammarMatcher(self._compiled[grammar]) for _ in range(count)]

    def prepare(self) -> None:
        """Do now what the first grammar would have to wait for. It takes half a second, and no other thread runs."""
        if self._ends:
            self._worker().submit(lambda: self._vocabulary).result()

    def close(self) -> None:
        """End the thread."""
        if self._thread is not None:
            self._thread.shutdown(wait=False)
            self._thread = None

    def _worker(self) -> ThreadPoolExecutor:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="octavo-grammar")
            size = threading.stack_size(_STACK_BYTES)
            try:
                self._thread.submit(lambda: None).result()  # it begins with its first task, and with this stack
            finally:
                threading.stack_size(size)
        return self._thread

    def _compile(self, grammar: Grammar) -> llguidance.LLMatcher:
        limit = MAX_GRAMMAR_LENGTH[grammar.kind]
        if len(grammar.text) > limit:
            raise _refusal(f"its {len(grammar.text)} characters are more than {limit}")
        if not self._ends:
            raise _refusal("this model has no token that ends a text")
        try:
            compiled = llguidance.LLMatcher(self._vocabulary, _source(grammar), log_level=0, limits=_limits())
        except (ValueError, RecursionError) as error:
            raise _refusal(one_line(str(error))) from None
        compiled.compute_bitmask()  # the same for all that begin, and the proof that something matches at all
        if compiled.is_error():
            impossible = "NoExtension" in compiled.get_error()
            raise _refusal("no text can match" if impossible else one_line(compiled.get_error()))
        return compiled

    @cached_property
    def _vocabulary(self) -> llguidance.LLTokenizer:
        words = GrammarVocabulary(self._tokenizer, self._vocab_size, self._ends[0])
        return llguidance.LLTokenizer(llguidance.TokenizerWrapper(words), eos_token=self._ends)


def _limits() -> llguidance.LLParserLimits:
    """What a step and a matcher may take: half of the library's own limits, or less."""
    return llguidance.LLParserLimits(
        step_lexer_fuel=100_000,
        step_max_items=20_000,
        max_lexer_states=20_000,
        max_grammar_size=200_000,
        verbose_errors=False,
    )


def _source(grammar: Grammar) -> str:
    """The grammar in the library's own language. Raises ValueError, or RecursionError."""
    matcher = llguidance.LLMatcher
    match grammar.kind:
        case "json_schema":
            return _json(grammar.text)
        case "json_object":
            return _json('{"type": "object"}')
        case "regex":
            return matcher.grammar_from_regex(grammar.text)
        case "choice":
            return matcher.grammar_from_lark("start: " + " | ".join(map(json.dumps, json.loads(grammar.text))))
        case "lark":
            return matcher.grammar_from_lark(_lark(grammar.text))


def _json(schema: str) -> str:
    return llguidance.LLMatcher.grammar_from_json_schema(schema, {"whitespace_pattern": _WHITESPACE})


def _lark(text: str) -> str:
    if "::=" not in text:
        return text
    try:
        return any_to_lark(text)
    except RecursionError:
        raise
    except Exception as error:  # noqa: BLE001 — a converter's anything
        raise ValueError(str(error)) from None


def _refusal(reason: str) -> InvalidRequestError:
    return InvalidRequestError(f"the output cannot be constrained: {reason}")
