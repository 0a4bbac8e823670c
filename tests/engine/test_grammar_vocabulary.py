"""Tokens as their bytes, and text as tokens, for kinds of tokenizers that spell them in their own ways."""

import json
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers

from engine.grammar import Grammar
from engine.grammar_compiler import GrammarCompiler
from engine.grammar_matcher import GrammarMatcher
from engine.grammar_vocabulary import GrammarVocabulary
from engine.launch import LoadedModel
from engine.tokenizer import Tokenizer
from engine.weights.gguf_tokenizer import build_tokenizer
from tests.engine.checkpoints import byte_tokenizer

END = 2
PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁a", "b", "a"]


def sentencepiece(prefix: bool) -> Tokenizer:
    """Spaces are U+2581, bytes are spelled out, and a space may come before any text."""
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": PIECES,
        "tokenizer.ggml.scores": [0.0] * len(PIECES),
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, 1, 1, 1, 1],
        "tokenizer.ggml.add_space_prefix": prefix,
    }
    return Tokenizer(build_tokenizer(metadata, "test"), eos_token_ids=frozenset({END}))


def spaced_bytes() -> Tokenizer:
    """Byte-level, with a space before any text."""
    backend = byte_tokenizer()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return Tokenizer(backend, eos_token_ids=frozenset({END}))


def words_only() -> Tokenizer:
    """Three words, and nothing for the rest."""
    vocab = {"<unk>": 0, "ab": 1, "</s>": 2, "abc": 3, "d": 4}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab=vocab, unk_token="<unk>"))
    backend.add_special_tokens(["<unk>", "</s>"])
    return Tokenizer(backend, eos_token_ids=frozenset({END}))


def allowed(matcher: GrammarMatcher, tokenizer: Tokenizer) -> set[str | None]:
    bits = np.unpackbits(np.frombuffer(matcher.mask(), np.uint8), bitorder="little")
    return {tokenizer.backend.id_to_token(token) for token in bits.nonzero()[0].tolist()}


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepieces_spaces_and_bytes_are_text(prefix: bool) -> None:
    tokenizer = sentencepiece(prefix)
    compiler = GrammarCompiler(tokenizer, len(PIECES))
    (matcher,) = compiler.matchers(Grammar("regex", "b( a|é)"), 1)
    assert allowed(matcher, tokenizer) == {"b"}
    matcher.accept(PIECES.index("b"))
    assert allowed(matcher, tokenizer) == {"▁", "▁a", "<0x20>", "<0xC3>"}
    matcher.accept(PIECES.index("<0xC3>"))
    assert allowed(matcher, tokenizer) == {"<0xA9>"}
    matcher.accept(PIECES.index("<0xA9>"))
    assert matcher.complete
    compiler.close()


@pytest.mark.parametrize(
    "tokenizer",
    [sentencepiece(True), sentencepiece(False), spaced_bytes(), Tokenizer(byte_tokenizer())],
    ids=["space first", "plain pieces", "spaced bytes", "plain bytes"],
)
def test_tokens_spell_the_text_that_they_are_asked_for(tokenizer: Tokenizer) -> None:
    words = GrammarVocabulary(tokenizer, 320, END)

    @given(st.one_of(st.text(max_size=12), st.text("ab \x02", max_size=12)).map(str.encode) | st.binary(max_size=8))
    def run(text: bytes) -> None:
        assert b"".join(words.tokens[token] for token in words(text)) == text

    run()


def test_what_no_token_spells_is_left_out_and_the_longest_token_is_taken() -> None:
    assert GrammarVocabulary(words_only(), 5, END)(b"xabcdabx") == [3, 4, 1]


def test_text_that_is_forced_is_tokenized_as_the_model_knows_it(embedded: LoadedModel) -> None:
    tokenizer = embedded.checkpoint.tokenizer
    words = GrammarVocabulary(tokenizer, tokenizer.vocab_size, END)
    text = json.dumps({"name": "weather", "arguments": {"city": "Zürich", "days": 12}}, ensure_ascii=False)
    assert words(text.encode()) == tokenizer.encode(text, add_special_tokens=False)
