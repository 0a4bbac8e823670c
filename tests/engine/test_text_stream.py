"""Text as it grows: stop strings are never shown, not even in part, and nothing else is lost."""

from hypothesis import given
from hypothesis import strategies as st

from engine.text_stream import TextStream
from engine.tokenizer import Tokenizer
from tests.engine.checkpoints import byte_tokenizer

_BACKEND = byte_tokenizer()


def _tokenizer() -> Tokenizer:
    return Tokenizer(backend=_BACKEND, eos_token_ids=frozenset({2}))


def _run(text: str, stops: tuple[str, ...], min_tokens: int = 0) -> tuple[list[str], str | None]:
    tokenizer = _tokenizer()
    stream, pieces = TextStream(tokenizer, stops), []
    for number, token in enumerate(tokenizer.encode(text, add_special_tokens=False), start=1):
        piece = stream.push(token, may_stop=number > min_tokens)
        pieces.append(piece.text)
        if piece.stop is not None:
            return pieces, piece.stop
    rest = stream.finish()
    return [*pieces, rest.text], rest.stop


@given(text=st.text(max_size=20), stops=st.lists(st.text("abé🙂", min_size=1, max_size=3), max_size=3).map(tuple))
def test_the_text_is_all_that_comes_before_the_first_stop_string(text: str, stops: tuple[str, ...]) -> None:
    text = text.replace("\ud800", "")
    pieces, stop = _run(text, stops)
    # The stream stops at the first token that completes a stop string.
    complete = [end for end in range(len(text) + 1) if any(text[:end].endswith(s) for s in stops)]
    if not complete:
        assert ("".join(pieces), stop) == (text, None)
    else:
        head = text[: complete[0]]
        begin = min(head.find(s) for s in stops if s in head)
        assert "".join(pieces) == text[:begin]
        assert stop in stops


def test_what_may_begin_a_stop_string_is_held_back_until_it_is_decided() -> None:
    pieces, stop = _run("ab-cd", ("bcx", "cde"))
    assert (pieces, stop) == (["a", "", "b-", "", "", "cd"], None)


def test_no_piece_holds_part_of_a_character() -> None:
    pieces, _ = _run("né🙂", ())
    assert pieces == ["n", "", "é", "", "", "", "🙂", ""]


def test_stop_strings_are_ordinary_text_before_min_tokens() -> None:
    assert _run("a.b.c", (".",), min_tokens=3) == (["a", ".", "b", ""], ".")
