"""Tokenizers rebuilt from GGUF metadata split text as the model's own tokenizer does."""

import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from engine.weights.gguf_file import open_gguf
from engine.weights.gguf_tokenizer import build_tokenizer
from tests.engine.gguf_files import BOS, EOS, TOKENS, random_tensors, tokenizer_values, write_gguf

TEXTS = [
    "",
    " ",
    "Hello, world! It's 12:30; we'll see. I'M HERE, they'Re not.",
    "def f(x: int) -> int:\n    return x ** 2  # square\n\n\n\tif x:\n\t\tpass\r\n",
    "3.14159 and 1234567890, 12 345; a  1   2    b",
    "你好，世界。안녕하세요 こんにちは Привет мир مرحبا שלום नमस्ते",
    "👩‍👩‍👧‍👦 🎉🎉 🇫🇷 e\u0301 café naïve ½ ² Ⅷ ١٢٣",
    "  leading, trailing   \n  \n\n   and \u00a0 odd \u2003 spaces\u200b\x00\x7f",
    "https://example.org/a?b=c&d=%20 {}[]<>|\\/~`@#$%^&*()_+-=",
    "CamelCaseWord snake_case_word kebab-case ALLCAPS McDonald's",
]
SPELLED = ["<s>", "a<s>b</s>", " </s> <think> hm </think>"]


def trained(pre: pre_tokenizers.PreTokenizer | None, texts: Iterable[str] = TEXTS) -> tokenizers.Tokenizer:
    """A byte-level tokenizer whose merges were learned from the texts, so that they depend on where words are split."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        min_frequency=1,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>"],
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def metadata_of(tokenizer: tokenizers.Tokenizer, pre: str) -> dict[str, Any]:
    """The GGUF metadata of a trained tokenizer."""
    import json

    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return tokenizer_values(pre) | {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3] + [1] * (len(tokens) - 2),
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.add_bos_token": False,
    }


def gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def test_smollm_splits_digits_before_words_as_its_tokenizer_json_does() -> None:
    original = trained(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2()]))
    rebuilt = build_tokenizer(metadata_of(original, "smollm"), "test")
    for text in TEXTS + SPELLED:
        assert rebuilt.encode(text).ids == original.encode(text).ids
    assert rebuilt.pre_tokenizer.pre_tokenize_str("a  12") == [
        ("a", (0, 1)),
        ("ĠĠ", (1, 3)),
        ("1", (3, 4)),
        ("2", (4, 5)),
    ]


def test_gpt2_splits_as_gpt2_does() -> None:
    original = trained(gpt2())
    for rule in ("gpt-2", "default"):
        rebuilt = build_tokenizer(metadata_of(original, rule), "test")
        for text in TEXTS + SPELLED:
            assert rebuilt.encode(text).ids == original.encode(text).ids


@pytest.mark.parametrize("rule", ["llama-bpe", "qwen2", "tekken", "gpt-2"])
def test_a_file_tokenizes_as_transformers_does_with_it(rule: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    metadata = metadata_of(trained(gpt2()), rule)
    tensors = random_tensors(len(metadata["tokenizer.ggml.tokens"]))
    path = write_gguf(tmp_path / "tiny.gguf", values=metadata, tensors=tensors)
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    ours = open_gguf(path).tokenizer
    # Qwen's tokenizer.json composes characters first (NFC), ours too; transformers forgets it for GGUF files.
    for text in (unicodedata.normalize("NFC", text) for text in TEXTS + SPELLED):
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text), skip_special_tokens=False) == text


def test_qwen2_composes_characters_first() -> None:
    metadata = metadata_of(trained(gpt2()), "qwen2")
    tokenizer = build_tokenizer(metadata, "test")
    assert tokenizer.encode("e\u0301").ids == tokenizer.encode("é").ids


def test_control_tokens_are_special_and_user_defined_ones_are_whole_but_shown() -> None:
    tokenizer = build_tokenizer(tokenizer_values(), "test")
    think = TOKENS.index("<think>")
    ids = tokenizer.encode("<s>hello<think></s>").ids
    assert ids == [BOS, TOKENS.index("hello"), think, EOS]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hello<think>"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<s>hello<think></s>"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, []),
        ({"tokenizer.ggml.add_bos_token": True}, [BOS]),
        ({"tokenizer.ggml.add_eos_token": True}, [EOS]),
        ({"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}, [BOS, EOS]),
        ({"tokenizer.ggml.pre": "llama-bpe"}, [BOS]),
        ({"tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.add_bos_token": False}, []),
    ],
)
def test_what_goes_around_text_is_as_the_file_says(flags: dict[str, Any], expected: list[int]) -> None:
    tokenizer = build_tokenizer(tokenizer_values() | flags, "test")
    assert tokenizer.encode("").ids == expected
    assert tokenizer.encode("", add_special_tokens=False).ids == []


def test_ends_of_turns_and_messages_are_ends_too(tmp_path: Path) -> None:
    values = {"tokenizer.ggml.eot_token_id": 7, "tokenizer.ggml.eom_token_id": 8, "tokenizer.chat_template": "{{ x }}"}
    tokenizer = open_gguf(write_gguf(tmp_path / "tiny.gguf", values=values)).tokenizer
    assert tokenizer.eos_token_ids == {EOS, 7, 8}
    assert (tokenizer.bos_token, tokenizer.bos_token_id, tokenizer.eos_token) == ("<s>", BOS, "</s>")
    assert tokenizer.chat_template == "{{ x }}"


def sentencepiece() -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """A tokenizer like Llama 2's, and the GGUF metadata of it: pieces, scores, byte tokens, no merges."""
    special = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    original = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    original.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    original.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    split = trained(pre_tokenizers.Metaspace(), ["the cat sat on the mat with the hat that the rat had"] * 3)
    import json

    learned = json.loads(split.to_str())["model"]
    alphabet = [piece for piece in sorted(learned["vocab"], key=learned["vocab"].__getitem__) if len(piece) == 1]
    alphabet = [piece for piece in alphabet if piece in "▁abcdefghijklmnopqrstuvwxyz"]
    merged = [merge for merge in learned["merges"] if all(set(part) <= set(alphabet) for part in merge)]
    tokens = special + alphabet + ["".join(merge) for merge in merged]
    vocab = {token: index for index, token in enumerate(tokens)}
    original.model = models.BPE(
        vocab=vocab, merges=[tuple(m) for m in merged], unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )
    learned_from = len(special) + len(alphabet)
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * learned_from + [-float(rank) for rank in range(len(tokens) - learned_from)],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    return original, metadata


SPM_TEXTS = ["the cat", "the  mat had hats", "that", "", "tha t\nthe", "naïve 猫 🎉 the", "a" * 50, "hat\tcat  "]


def test_sentencepiece_merges_are_recovered_from_the_scores() -> None:
    original, metadata = sentencepiece()
    rebuilt = build_tokenizer(metadata, "test")
    for text in SPM_TEXTS:
        ids = rebuilt.encode(text, add_special_tokens=False).ids
        assert ids == original.encode(text).ids
        assert rebuilt.decode(ids) == text
    assert len(rebuilt.encode("the", add_special_tokens=False).ids) == 1
    assert rebuilt.encode("the").ids[0] == 1  # BOS by default
    assert rebuilt.encode("猫", add_special_tokens=False).tokens == ["▁", "<0xE7>", "<0x8C>", "<0xAB>"]


def test_sentencepiece_files_tokenize_as_transformers_does_with_them(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    _, metadata = sentencepiece()
    gone = {"tokenizer.ggml.merges": None, "tokenizer.ggml.pre": None}
    tensors = random_tensors(len(metadata["tokenizer.ggml.tokens"]))
    path = write_gguf(tmp_path / "tiny.gguf", values=metadata | gone, tensors=tensors)
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    ours = open_gguf(path).tokenizer
    for text in SPM_TEXTS:
        assert ours.encode(text) == theirs.encode(text)


def test_a_prefix_space_is_left_out_where_the_file_says_so() -> None:
    _, metadata = sentencepiece()
    tokenizer = build_tokenizer(metadata | {"tokenizer.ggml.add_space_prefix": False}, "test")
    assert not tokenizer.encode("the", add_special_tokens=False).tokens[0].startswith("▁")
    assert tokenizer.decode(tokenizer.encode(" the").ids) == " the"
