import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from bench.prompts import (
    FIRST_RANDOM_ID,
    Lengths,
    Prompt,
    PromptSource,
    RandomIds,
    RandomWords,
    TextWindows,
    open_source,
    parse_jsonl,
    request_body,
)
from engine.errors import ConfigError

WORDS = [f"word{index}" for index in range(500)]
SOURCES = [RandomIds(Lengths(64, 8)), RandomWords(Lengths(64, 8)), TextWindows(Lengths(64, 8), WORDS)]


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: type(source).__name__)
def test_prompts_depend_on_the_key_alone(source: PromptSource) -> None:
    assert source.draw("0/c=8/0", 20) == source.draw("0/c=8/0", 20)


@pytest.mark.parametrize("source", SOURCES[:2], ids=lambda source: type(source).__name__)
def test_no_two_requests_levels_or_repeats_share_even_a_first_block(source: PromptSource) -> None:
    keys = ["0/c=8/0", "0/c=8/1", "0/c=32/0", "1/c=8/0", "0/c=8/0/warmup"]
    contents = [prompt.content for key in keys for prompt in source.draw(key, 50)]
    openings = {json.dumps(c[:16] if isinstance(c, list) else c.split()[:16]) for c in contents}
    assert len(openings) == len(contents)


def test_windows_of_a_text_start_at_different_words() -> None:
    starts = [str(prompt.content).split()[0] for prompt in TextWindows(Lengths(40, 8), WORDS).draw("k", 500)]
    assert sorted(starts) == sorted(WORDS)


def test_a_short_text_is_read_in_a_circle() -> None:
    (prompt,) = TextWindows(Lengths(8, 8), ["a", "b"]).draw("k", 1)
    assert str(prompt.content).split() in (["a", "b"] * 3, ["b", "a"] * 3)


def test_random_ids_stay_within_the_vocabulary() -> None:
    ids = [i for prompt in RandomIds(Lengths(500, 1), 5000).draw("k", 20) for i in prompt.content]
    assert min(ids) >= FIRST_RANDOM_ID
    assert max(ids) < 5000
    small = [i for prompt in RandomIds(Lengths(500, 1), 40).draw("k", 2) for i in prompt.content]
    assert (min(small), max(small)) == (0, 39)


def test_lengths_are_exact_without_a_range_and_uniform_around_the_mean_with_one() -> None:
    exact = RandomIds(Lengths(100, 50)).draw("k", 20)
    assert {(prompt.length, prompt.output_len) for prompt in exact} == {(100, 50)}
    ranged = RandomIds(Lengths(100, 50, ratio=0.5)).draw("k", 3000)
    inputs = [prompt.length or 0 for prompt in ranged]
    assert (min(inputs), max(inputs)) == (50, 150)
    assert statistics.fmean(inputs) == pytest.approx(100, rel=0.03)
    assert (min(p.output_len for p in ranged), max(p.output_len for p in ranged)) == (25, 75)


@pytest.mark.parametrize("lengths", [(0, 1, 0.0), (1, 0, 0.0), (1, 1, 1.0), (1, 1, -0.1)])
def test_impossible_lengths_are_refused(lengths: tuple[int, int, float]) -> None:
    with pytest.raises(ConfigError):
        Lengths(*lengths)


def test_each_shape_of_jsonl_line_gives_its_prompt() -> None:
    chat = [{"role": "user", "content": "hello"}]
    rows: list[dict[str, Any]] = [
        {"prompt": "text"},
        {"prompt": [1, 2, 3]},
        {"messages": chat},
        {"question_id": 81, "category": "writing", "turns": ["first", "second"]},
        {"text": "line\u2028separator"},
    ]
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n"
    assert parse_jsonl(text, "f") == ["text", [1, 2, 3], chat, "first", "line\u2028separator"]


@pytest.mark.parametrize("line", ["{", "[]", "{}", '{"prompt": ""}', '{"turns": []}', '{"prompt": [1, "a"]}'])
def test_a_bad_jsonl_line_is_named(line: str) -> None:
    with pytest.raises(ConfigError, match="line 2"):
        parse_jsonl('{"text": "fine"}\n' + line, "f")


def test_a_file_is_opened_by_its_ending(tmp_path: Path) -> None:
    lines, prose, empty = tmp_path / "q.jsonl", tmp_path / "prose.txt", tmp_path / "empty.txt"
    lines.write_text('{"text": "a"}\n{"text": "b"}\n')
    prose.write_text("call me")
    empty.write_text(" \n")
    options: dict[str, Any] = {"lengths": Lengths(4, 4), "as_text": False, "vocab_size": 30_000}
    drawn = open_source(str(lines), **options).draw("k", 5)
    assert sorted(str(prompt.content) for prompt in drawn[:2]) == ["a", "b"]
    assert len(drawn) == 5
    assert isinstance(open_source(str(prose), **options), TextWindows)
    for path in (empty, tmp_path / "absent.txt", tmp_path):
        with pytest.raises(ConfigError, match="--prompts"):
            open_source(str(path), **options)


def test_only_token_ids_have_a_known_length() -> None:
    assert Prompt([1, 2, 3], 8).length == 3
    assert Prompt("one two", 8).length is None
    assert Prompt([{"role": "user", "content": "x"}], 8).length is None


def test_bodies_suit_the_endpoint_and_the_users_fields_win() -> None:
    def body(content: Any, chat: bool, extra: dict[str, Any]) -> Any:
        return json.loads(request_body(Prompt(content, 8), chat=chat, common={"model": "m"}, extra=extra))

    assert body([1, 2], False, {}) == {"model": "m", "max_tokens": 8, "prompt": [1, 2]}
    assert body("hi", True, {})["messages"] == [{"role": "user", "content": "hi"}]
    chat = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    assert body(chat, True, {})["messages"] == chat
    assert body(chat, False, {})["prompt"] == "be brief\n\nhi"
    assert body("hi", False, {"max_tokens": 3, "top_k": 5}) == {
        "model": "m",
        "max_tokens": 3,
        "prompt": "hi",
        "top_k": 5,
    }
    with pytest.raises(ConfigError, match="token ids"):
        body([1, 2], True, {})
