"""Text to ids and back, all at once and token by token."""

import random
import time
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from engine.tokenizer import Tokenizer
from engine.weights.gguf_tokenizer import build_tokenizer
from tests.engine.gguf_files import BOS, BYTES, EOS, TOKENS, tokenizer_values
from tests.engine.test_gguf_tokenizer import TEXTS, sentencepiece

BYTE_OF = {
    b: BYTES.index(char) for char, b in zip(BYTES, [*range(33, 127), *range(161, 173), *range(174, 256)], strict=False)
}
BYTE_OF |= {b: 188 + i for i, b in enumerate(b for b in range(256) if b not in BYTE_OF)}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Byte-level: nearly every token is one byte, so nearly every character spans several."""
    return Tokenizer(build_tokenizer(tokenizer_values(), "test"), "<s>", "</s>", frozenset({EOS}))


@pytest.fixture(scope="module")
def by_pieces() -> Tokenizer:
    """SentencePiece with byte fallback."""
    return Tokenizer(build_tokenizer(sentencepiece()[1] | {"tokenizer.ggml.add_bos_token": False}, "test"))


def streamed(tokenizer: Tokenizer, ids: list[int], **kwargs: Any) -> list[str]:
    stream = tokenizer.stream(**kwargs)
    return [*(stream.push(token) for token in ids), stream.flush()]


@pytest.mark.parametrize("text", TEXTS)
def test_a_streamed_text_adds_up_to_the_whole(text: str, tokenizer: Tokenizer, by_pieces: Tokenizer) -> None:
    for each in (tokenizer, by_pieces):
        ids = each.encode(text)
        pieces = streamed(each, ids)
        assert "".join(pieces) == each.decode(ids) == text
        assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_comes_whole_with_its_last_token(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a🎉é")
    assert streamed(tokenizer, ids) == ["a", "", "", "", "🎉", "", "é", ""]


def test_an_incomplete_character_at_the_end_is_shown_by_flush(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("ok🎉")[:-1]
    assert (
        streamed(tokenizer, ids) == ["o", "k", "", "", "", "\ufffd"] == [*"ok", "", "", "", tokenizer.decode(ids)[2:]]
    )


def test_random_tokens_stream_to_what_decode_gives(tokenizer: Tokenizer) -> None:
    rng = random.Random(0)
    for _ in range(300):
        # Runs of noise shorter than what a stream holds back, ended by text.
        noise = [
            [rng.randrange(len(TOKENS)) for _ in range(rng.randrange(20))] + tokenizer.encode("x") for _ in range(4)
        ]
        ids = [token for run in noise for token in run]
        assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)
        assert "".join(streamed(tokenizer, ids, skip_special_tokens=False)) == tokenizer.decode(
            ids, skip_special_tokens=False
        )


def test_endless_noise_is_shown_in_bounded_time_and_text_goes_on_after_it(tokenizer: Tokenizer) -> None:
    noise = [BYTE_OF[0x80]] * 2000
    start = time.perf_counter()
    pieces = streamed(tokenizer, [*noise, *tokenizer.encode("hello 🎉")])
    assert time.perf_counter() - start < 0.5
    assert "".join(pieces) == "\ufffd" * 2000 + "hello 🎉"
    assert max(len(piece) for piece in pieces) <= 33


def test_a_byte_run_that_turns_invalid_does_not_end_a_stream(by_pieces: Tokenizer) -> None:
    rng = random.Random(1)
    bytes_from = by_pieces.backend.token_to_id("<0x00>")
    cat = [bytes_from + byte for byte in "猫".encode()]
    ids = [*by_pieces.encode("the"), *cat, bytes_from + 0xFF, *by_pieces.encode("hat")]
    text = "".join(streamed(by_pieces, ids))
    assert text.startswith("the猫")
    assert text.endswith("\ufffd hat")
    for _ in range(300):
        ids = [rng.randrange(by_pieces.vocab_size) for _ in range(40)]
        text = "".join(streamed(by_pieces, [*ids, *by_pieces.encode("the hat")]))
        assert text.endswith("the hat")


def test_leading_spaces_survive_wherever_a_stream_restarts(by_pieces: Tokenizer) -> None:
    the = by_pieces.backend.token_to_id("▁the")
    noise = [by_pieces.backend.token_to_id("<0x80>")] * 40
    assert "".join(streamed(by_pieces, [the, the])) == "the the"
    assert "".join(streamed(by_pieces, [the, *noise, the])).endswith("\ufffd the")


def test_special_and_unknown_tokens_add_nothing(tokenizer: Tokenizer) -> None:
    assert streamed(tokenizer, [BOS, *tokenizer.encode("h"), EOS, 10**6]) == ["", "h", "", "", ""]
    assert "".join(streamed(tokenizer, [BOS, EOS], skip_special_tokens=False)) == "<s></s>"


def test_a_token_costs_a_stream_microseconds(tokenizer: Tokenizer) -> None:
    """Measured: 0.7 µs. The bound is a hundred times that, for a busy machine."""
    ids = tokenizer.encode("the quick brown fox " * 200)
    stream = tokenizer.stream()
    start = time.perf_counter()
    for token in ids:
        stream.push(token)
    assert (time.perf_counter() - start) / len(ids) < 70e-6


def test_token_bytes_add_up_to_the_text(tokenizer: Tokenizer, by_pieces: Tokenizer) -> None:
    for text in TEXTS:
        assert b"".join(map(tokenizer.token_bytes, tokenizer.encode(text))) == text.encode()
        # SentencePiece puts a space before the text.
        assert b"".join(map(by_pieces.token_bytes, by_pieces.encode(text))) == (b" " if text else b"") + text.encode()


def test_every_byte_has_its_token(tokenizer: Tokenizer) -> None:
    assert {tokenizer.token_bytes(index) for index in range(256)} == {bytes([byte]) for byte in range(256)}


def test_a_token_s_text_shows_parts_of_characters_as_such(tokenizer: Tokenizer, by_pieces: Tokenizer) -> None:
    assert tokenizer.token_text(TOKENS.index("Ġw")) == " w"
    assert tokenizer.token_text(BYTE_OF[0xF0]) == "\ufffd"
    assert tokenizer.token_text(BOS) == "<s>"
    assert tokenizer.token_bytes(10**6) == b""
    assert by_pieces.token_text(by_pieces.backend.token_to_id("▁the")) == " the"
    assert by_pieces.token_bytes(by_pieces.backend.token_to_id("<0xE7>")) == b"\xe7"


def test_added_tokens_are_taken_literally() -> None:
    backend = tokenizers.Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(BYTES)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<｜end▁of▁sentence｜>", special=True), "é!"])
    backend.add_tokens([AddedToken("  ", normalized=False)])
    tokenizer = Tokenizer(backend)
    assert tokenizer.token_text(256) == "<｜end▁of▁sentence｜>"
    assert tokenizer.token_text(257) == "é!"
    assert tokenizer.token_bytes(258) == b"  "
    assert tokenizer.special_token_ids == {256, 257}
    assert tokenizer.vocab_size == 259
