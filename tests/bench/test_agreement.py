import json
from pathlib import Path

import pytest

from bench.agreement import compare, read_prompts
from bench.policy_list import Candidate
from engine.errors import ConfigError
from engine.kv_policies.window import SlidingWindow
from engine.tokenizer import Tokenizer
from tests.engine.checkpoints import byte_tokenizer

CANDIDATE = Candidate(SlidingWindow(window=8), "window:window=8", 8)
TOKENIZER = Tokenizer(byte_tokenizer())
CHATTING = Tokenizer(byte_tokenizer(), chat_template="{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")


def test_answers_agree_until_their_first_difference() -> None:
    found = compare(CANDIDATE, [[1, 2, 3, 4], [5, 6, 7, 8], [9]], [[1, 2, 0, 4], [5, 6, 7, 8], [0]])
    assert found.by_prompt == [2, 4, 0]
    assert found.until_first_difference == 2
    assert found.share_until_first_difference == pytest.approx((0.5 + 1 + 0) / 3)
    assert found.equal_tokens == pytest.approx((0.75 + 1 + 0) / 3)
    assert found.equal_answers == pytest.approx(1 / 3)
    assert (found.label, found.budget) == ("window window=8", 8)


@pytest.mark.parametrize(("want", "have"), [([1, 2, 3, 4], [1, 2]), ([1, 2], [1, 2, 3, 4])], ids=["shorter", "longer"])
def test_an_answer_of_another_length_differs_where_one_ends(want: list[int], have: list[int]) -> None:
    found = compare(CANDIDATE, [want], [have])
    assert found.until_first_difference == 2
    assert found.equal_answers == 0
    assert found.equal_tokens == 2 / len(want)


def write(folder: Path, *lines: object) -> str:
    path = folder / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return str(path)


def test_prompts_are_put_in_the_models_chat_template(tmp_path: Path) -> None:
    path = write(tmp_path, {"prompt": "Hi"}, {"messages": [{"role": "system", "content": "Yo"}]}, {"prompt": [7, 8]})
    first, second, ids = read_prompts(path, CHATTING)
    assert CHATTING.decode(first) == "<user>Hi"
    assert CHATTING.decode(second) == "<system>Yo"
    assert ids == [7, 8]


def test_without_a_template_texts_are_continued_and_conversations_refused(tmp_path: Path) -> None:
    (only,) = read_prompts(write(tmp_path, {"text": "Hi"}), TOKENIZER)
    assert TOKENIZER.decode(only) == "Hi"
    with pytest.raises(ConfigError, match="--prompts: a conversation needs a chat template"):
        read_prompts(write(tmp_path, {"messages": [{"role": "user", "content": "Hi"}]}), TOKENIZER)
