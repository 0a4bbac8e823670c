import json
from typing import Any

import pytest

from bench.sse import SSEParser, Stream, error_message, is_plain_token

BYTES = (
    b": a comment\n\n"
    b'data: {"text":"caf\xc3\xa9"}\n\n'
    b'event: message\r\ndata:{"b": 2}\r\nid: 7\r\n\r\n'
    b"data: two\ndata: lines\n\n"
    b"\n\nretry: 10\n\n"
    b"data: [DONE]\n\n"
)
EVENTS = [b'{"text":"caf\xc3\xa9"}', b'{"b": 2}', b"two\nlines", b"[DONE]"]


@pytest.mark.parametrize("cut", range(len(BYTES) + 1))
def test_events_do_not_depend_on_where_the_network_cuts(cut: int) -> None:
    parser = SSEParser()
    assert parser.feed(BYTES[:cut]) + parser.feed(BYTES[cut:]) + parser.close() == EVENTS


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_events_do_not_depend_on_the_size_of_pieces(size: int) -> None:
    parser = SSEParser()
    pieces = [BYTES[start : start + size] for start in range(0, len(BYTES), size)]
    assert [event for piece in pieces for event in parser.feed(piece)] == EVENTS
    assert parser.close() == []


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
def test_a_last_event_without_its_blank_line_is_not_lost(end: bytes) -> None:
    parser = SSEParser()
    assert parser.feed(b"data: [DONE]" + end) == []
    assert parser.close() == [b"[DONE]"]


def completion(text: str, finish: str | None = None, **more: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": text, "finish_reason": finish}], **more}


def chat(delta: dict[str, Any], finish: str | None = None, **more: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}], **more}


def taken(*chunks: dict[str, Any]) -> Stream:
    stream = Stream()
    for number, chunk in enumerate(chunks, start=1):
        stream.take(json.dumps(chunk).encode(), float(number))
    return stream


@pytest.mark.parametrize(
    ("chunk", "carries"),
    [
        (completion("a"), True),
        (completion("a", "length"), True),
        (completion(""), True),  # a token whose text is held back
        (completion("", "length"), False),
        ({"choices": [], "usage": {"completion_tokens": 3}}, False),
        (chat({"role": "assistant", "content": ""}), False),
        (chat({"role": "assistant", "content": "a"}), True),
        (chat({"content": "a"}), True),
        (chat({"content": ""}), True),
        (chat({"reasoning_content": "hm"}), True),
        (chat({"tool_calls": [{"index": 0}]}), True),
        (chat({}, "stop"), False),
        (completion("a", usage=None), True),
        (chat({"content": "a"}, usage={"completion_tokens": 1}), True),
        (completion('"finish_reason":null,"role"', "stop"), True),
        ({}, False),
        ({"choices": None}, False),
        ({"choices": 3}, False),
    ],
)
def test_a_chunk_counts_when_it_carries_tokens(chunk: dict[str, Any], carries: bool) -> None:
    assert len(taken(chunk).chunk_times) == carries


@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": ")])
def test_the_fast_reading_agrees_with_the_full_one(separators: tuple[str, str]) -> None:
    def plain(chunk: dict[str, Any]) -> bool:
        return is_plain_token(json.dumps(chunk, separators=separators).encode())

    assert plain(completion('she said "role", "usage":{ and "error"', usage=None))
    assert plain(chat({"content": "a"}))
    assert not plain(completion("a", "stop"))
    assert not plain(chat({"role": "assistant", "content": ""}))
    assert not plain(completion("a", usage={"completion_tokens": 1}))
    assert not plain({"error": {"message": "x"}})
    assert not plain(completion('"finish_reason":null', "stop"))


def test_the_end_is_the_last_token_or_the_finish_reason_and_not_the_usage() -> None:
    stream = taken(completion("a"), completion("", "length"), {"choices": [], "usage": {"completion_tokens": 1}})
    assert stream.finished
    assert stream.last == 2
    assert list(stream.chunk_times) == [1]
    assert stream.usage == {"completion_tokens": 1}


def test_errors_inside_a_stream_are_kept() -> None:
    assert (
        taken(completion("a"), {"error": {"message": "out of\nmemory", "code": 500}}).error
        == "in the stream: out of memory"
    )
    for junk in (b"<html>", b"[1]", b"\xff"):
        stream = Stream()
        stream.take(junk, 1.0)
        assert stream.error is not None


def test_error_bodies_of_any_shape_become_one_line() -> None:
    assert error_message({"error": {"message": "no", "type": "x"}}) == "no"
    assert error_message({"error": "plain"}) == "plain"
    assert error_message({"detail": "fastapi"}) == "fastapi"
    assert error_message({"error": {}}) == "{}"
    assert error_message(None) == "None"
    assert len(error_message("<html>\n" * 1000)) == 300
