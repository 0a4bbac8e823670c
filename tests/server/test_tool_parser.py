"""Calls of tools in an answer's text, however the text is cut into pieces."""

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.tool_format import HERMES, LLAMA3, MISTRAL, ToolFormat, choose_format
from server.tool_parser import ToolCallParser
from server.tool_use import whole_message

CITY = '{"name": "weather", "arguments": {"city": "a \\"}{ b"}}'
NAMES = {"weather", "clock"}
HERMES_CALL = f"<tool_call>\n{CITY}\n</tool_call>"


def read(form: ToolFormat, pieces: Sequence[str]) -> tuple[str, list[tuple[str, str]]]:
    """Words, and calls as (name, arguments), from text that comes in pieces."""
    parser, words, calls, ids = ToolCallParser(form, NAMES), "", list[list[str]](), set[str]()
    for delta in [one for piece in pieces for one in parser.push(piece)] + parser.finish():
        if isinstance(delta, str):
            words += delta
        elif delta.id is not None:
            assert delta.index == len(calls), "calls are numbered as they come"
            assert delta.name is not None
            ids.add(delta.id)
            calls.append([delta.name, delta.arguments])
        else:
            assert delta.index == len(calls) - 1
            calls[-1][1] += delta.arguments
    assert len(ids) == len(calls) == parser.num_calls
    return words, [(name, arguments) for name, arguments in calls]


WEATHER = ("weather", '{"city": "a \\"}{ b"}')
CASES: list[tuple[ToolFormat, str, str, list[tuple[str, str]]]] = [
    (HERMES, HERMES_CALL, "", [WEATHER]),
    (HERMES, f"I look it up. \n\n{HERMES_CALL}\n{HERMES_CALL}\n", "I look it up.", [WEATHER, WEATHER]),
    (HERMES, f"{HERMES_CALL} and so on", " and so on", [WEATHER]),
    (HERMES, "No < call <tool here.\n", "No < call <tool here.\n", []),
    (HERMES, "<tool_call>nothing</tool_call> a", "<tool_call>nothing</tool_call> a", []),
    (HERMES, '<tool_call>\n{"name": "other", "arguments": {}}\n</tool_call>', "", []),
    (HERMES, '<tool_call>{"arguments": {"a": 1}, "name": "clock"}</tool_call>', "", [("clock", '{"a": 1}')]),
    (HERMES, '<tool_call>{"name": "clock"}</tool_call>', "", [("clock", "{}")]),
    (HERMES, '<tool_call>{"name": "clock", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("clock", '{"a": 1}')]),
    (HERMES, '<tool_call>{"name": "clock", "arguments": {"a": [', "", [("clock", '{"a": [')]),
    (HERMES, '<tool_call>{"name": "clo', '<tool_call>{"name": "clo', []),
    (HERMES, "<tool_call>\n", "<tool_call>\n", []),
    (HERMES, '<tool_call>{"name": "clock", "arguments": {}, "id": "}"}</tool_call>x', "x", [("clock", "{}")]),
    (LLAMA3, '{"name": "clock", "parameters": {"a": 1}}', "", [("clock", '{"a": 1}')]),
    (LLAMA3, '\n<|python_tag|>{"name": "clock", "parameters": {}}', "", [("clock", "{}")]),
    (
        LLAMA3,
        '{"name": "clock", "parameters": {}}; {"name": "clock", "parameters": {"b": {}}}',
        "",
        [("clock", "{}"), ("clock", '{"b": {}}')],
    ),
    (LLAMA3, ' {"answer": 42} is all', ' {"answer": 42} is all', []),
    (LLAMA3, 'It is {"name": "clock", "parameters": {}}', 'It is {"name": "clock", "parameters": {}}', []),
    (MISTRAL, f"[TOOL_CALLS] [{CITY}, {CITY}]", "", [WEATHER, WEATHER]),
    (MISTRAL, f"Well. [TOOL_CALLS][{CITY}]", "Well.", [WEATHER]),
    (MISTRAL, "[TOOL_CALLS] nothing", "[TOOL_CALLS] nothing", []),
    (MISTRAL, "[TOOL] [1, 2]", "[TOOL] [1, 2]", []),
]


@pytest.mark.parametrize(("form", "text", "words", "calls"), CASES, ids=[case[1][:50] for case in CASES])
def test_words_and_calls_are_told_apart(form: ToolFormat, text: str, words: str, calls: list[tuple[str, str]]) -> None:
    if "other" in text:
        words = text  # an unknown function is no call
    assert read(form, [text]) == (words, calls)
    assert read(form, list(text)) == (words, calls), "and letter by letter"


MARKS = ("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>", CITY, CITY[:40], '{"name": "clock"}')
alphabet = st.sampled_from([*MARKS, *'{}[]"\\,; \nw<ä'])


@settings(deadline=None, max_examples=300)
@given(st.sampled_from([HERMES, LLAMA3, MISTRAL]), st.lists(alphabet, max_size=12).map("".join), st.data())
def test_pieces_say_what_the_whole_says(form: ToolFormat, text: str, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert read(form, pieces) == read(form, [text])


@settings(deadline=None)
@given(st.sampled_from([HERMES, LLAMA3, MISTRAL]), st.lists(st.sampled_from('{} x["'), max_size=20))
def test_text_without_a_marker_is_kept_to_the_letter(form: ToolFormat, letters: list[str]) -> None:
    text = "".join(letters)
    assert read(form, letters) == (text, [])


@pytest.mark.parametrize("form", [HERMES, LLAMA3, MISTRAL], ids=lambda form: form.name)
def test_what_a_format_writes_it_reads(form: ToolFormat) -> None:
    calls: list[tuple[str, Any]] = [("clock", {}), ("weather", {"city": "Zürich", "days": [1, 2]})]
    words, found = read(form, [form.write(calls)])
    assert words == ""
    assert [(name, json.loads(arguments)) for name, arguments in found] == calls


def test_calls_beyond_the_most_are_dropped() -> None:
    message = whole_message(ToolCallParser(HERMES, NAMES, most=1), HERMES_CALL + HERMES_CALL)
    assert isinstance(message["tool_calls"], list)
    assert len(message["tool_calls"]) == 1


def test_mistrals_templates_get_the_ids_that_they_insist_on() -> None:
    (call,) = whole_message(ToolCallParser(MISTRAL, NAMES), f"[TOOL_CALLS] [{CITY}]")["tool_calls"]  # type: ignore[misc, call-overload]
    assert len(call["id"]) == 9
    assert call["id"].isalnum()


@pytest.mark.parametrize(
    ("template", "form"),
    [
        (None, HERMES),
        ("{{ messages }}", HERMES),
        ("within <tool_call></tool_call> XML tags", HERMES),
        ('{{- "[TOOL_CALLS] [" }}', MISTRAL),
        ("<|python_tag|>", LLAMA3),
        ('Respond in the format {"name": function name, "parameters": dictionary of argument name}', LLAMA3),
    ],
)
def test_the_chat_template_shows_the_format(template: str | None, form: ToolFormat) -> None:
    assert choose_format("auto", template) is form
    assert choose_format("mistral", template) is MISTRAL
