"""The tokenizer that a GGUF file describes, built on the `tokenizers` library.

A GGUF file stores the vocabulary, the merges and the *name* of the rule that splits text into words; the rules
themselves are facts about each family of models, kept here as a table.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from engine.errors import CheckpointError

# The kinds of token in tokenizer.ggml.token_type.
_CONTROL: Final = 3
_USER_DEFINED: Final = 4
# Longer pieces would make the search for merges quadratic; real vocabularies stop at some 200 characters.
_MAX_PIECE: Final = 1024

_CONTRACTIONS: Final = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL: Final = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3: Final = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_TAIL}"
_QWEN2: Final = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN: Final = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_TAIL}"
)


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _single_digits() -> pre_tokenizers.PreTokenizer:
    """SmolLM, StarCoder: every digit stands alone, then GPT-2's rule. So "a  1" keeps its two spaces together."""
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


def _split(pattern: str) -> Callable[[], pre_tokenizers.PreTokenizer]:
    def build() -> pre_tokenizers.PreTokenizer:
        words = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        return pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])

    return build


# GPT-2's rule, Llama 3's and so on, by the names that files use for them.
_LLAMA3_NAMES: Final = ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral")
_PRE_TOKENIZERS: Final[Mapping[str, Callable[[], pre_tokenizers.PreTokenizer]]] = {
    **dict.fromkeys(("default", "gpt-2", "phi-2"), _gpt2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "codeshell"), _single_digits),
    **dict.fromkeys(_LLAMA3_NAMES, _split(_LLAMA3)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), _split(_QWEN2)),
    "tekken": _split(_TEKKEN),
}
# These vocabularies hold words that their merges cannot reach, so a whole word is looked up before it is merged; and
# llama.cpp puts BOS before text where a file of theirs does not say.
_WORDS_FIRST: Final = frozenset({*_LLAMA3_NAMES, "tekken"})


def build_tokenizer(metadata: Mapping[str, Any], where: str) -> Tokenizer:
    """Builds the tokenizer. ``where`` names the file in errors; raises CheckpointError if it cannot be built."""
    tokens = _strings(metadata, "tokens", where)
    kind = metadata.get("tokenizer.ggml.model")
    if not isinstance(kind, str) or kind not in _BUILDERS:
        raise CheckpointError(f"{where}: tokenizer model {kind!r} is not supported; known are {', '.join(_BUILDERS)}")
    try:
        tokenizer = _BUILDERS[kind](metadata, tokens, where)
        _add_tokens(tokenizer, tokens, metadata.get("tokenizer.ggml.token_type", ()))
        _add_template(tokenizer, tokens, metadata)
    except CheckpointError:
        raise
    except Exception as error:  # noqa: BLE001 (the library raises bare Exception, as for a merge of unknown tokens)
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{where}: the tokenizer cannot be built ({reason})") from None
    return tokenizer


def token_at(tokens: Sequence[str], index: Any) -> str | None:
    """The token with this id, or None where the file names none or one that is not there."""
    return tokens[index] if isinstance(index, int) and 0 <= index < len(tokens) else None


def _strings(metadata: Mapping[str, Any], key: str, where: str) -> list[str]:
    values = metadata.get(f"tokenizer.ggml.{key}")
    if not isinstance(values, list) or not values or not isinstance(values[0], str):
        raise CheckpointError(f"{where}: metadata tokenizer.ggml.{key} is missing or not a list of strings")
    return values


class _Pairs(Sequence[tuple[str, str]]):
    """Merges as the library wants them, split only as it takes them.

    A list of 49,000 tuples sets off a full garbage collection: 65 ms once torch is imported, half of the opening.
    """

    def __init__(self, merges: Sequence[str]) -> None:
        self._merges = merges

    def __len__(self) -> int:
        return len(self._merges)

    def __getitem__(self, index: Any) -> Any:
        return tuple(self._merges[index].split(" "))


def _merges(metadata: Mapping[str, Any], where: str) -> Sequence[tuple[str, str]]:
    merges = _strings(metadata, "merges", where)
    if any(merge.count(" ") != 1 for merge in merges):
        raise CheckpointError(f"{where}: metadata tokenizer.ggml.merges holds an entry that is not a pair")
    return _Pairs(merges)


def _byte_level(metadata: Mapping[str, Any], tokens: Sequence[str], where: str) -> Tokenizer:
    rule = metadata.get("tokenizer.ggml.pre", "default")
    if rule not in _PRE_TOKENIZERS:
        known = ", ".join(_PRE_TOKENIZERS)
        raise CheckpointError(f"{where}: pre-tokenizer {rule!r} is not supported; known are {known}")
    merges = _merges(metadata, where)
    tokenizer = Tokenizer(models.BPE(vocab=_ids(tokens), merges=merges, ignore_merges=rule in _WORDS_FIRST))
    if rule == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _PRE_TOKENIZERS[rule]()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(metadata: Mapping[str, Any], tokens: Sequence[str], where: str) -> Tokenizer:
    """SentencePiece's BPE: merges in order of the merged piece's score, and bytes for what the vocabulary lacks."""
    vocab = _ids(tokens)
    if "tokenizer.ggml.merges" in metadata:
        merges: Sequence[tuple[str, str]] = _merges(metadata, where)
    else:
        merges = _merges_by_score(metadata, vocab, where)
    unknown = token_at(tokens, metadata.get("tokenizer.ggml.unknown_token_id", 0))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + ([decoders.Strip(" ", 1, 0)] if prefix else []))
    return tokenizer


_BUILDERS: Final[Mapping[str, Callable[[Mapping[str, Any], Sequence[str], str], Tokenizer]]] = {
    "gpt2": _byte_level,
    "llama": _sentencepiece,
}


def _ids(tokens: Sequence[str]) -> dict[str, int]:
    return {token: index for index, token in enumerate(tokens)}


def _merges_by_score(metadata: Mapping[str, Any], vocab: Mapping[str, int], where: str) -> list[tuple[str, str]]:
    """All the ways to put a piece together from two others, the best-scored piece first."""
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) < len(vocab):
        raise CheckpointError(f"{where}: metadata tokenizer.ggml.scores is missing or shorter than the vocabulary")
    merges: list[tuple[float, int, int, str, str]] = []
    for piece, index in vocab.items():
        if len(piece) > _MAX_PIECE:
            raise CheckpointError(f"{where}: the vocabulary has a token of {len(piece)} characters")
        for cut in range(1, len(piece)):
            left, right = vocab.get(piece[:cut]), vocab.get(piece[cut:])
            if left is not None and right is not None:
                merges.append((-scores[index], left, right, piece[:cut], piece[cut:]))
    merges.sort(key=lambda merge: merge[:3])
    return [merge[3:] for merge in merges]


def _add_tokens(tokenizer: Tokenizer, tokens: Sequence[str], kinds: Sequence[int]) -> None:
    marked = [
        (token, kind) for token, kind in zip(tokens, kinds, strict=False) if kind in (_CONTROL, _USER_DEFINED) and token
    ]
    tokenizer.add_special_tokens(
        [AddedToken(t, normalized=False, special=True) for t, kind in marked if kind == _CONTROL]
    )
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t, kind in marked if kind == _USER_DEFINED])


def _add_template(tokenizer: Tokenizer, tokens: Sequence[str], metadata: Mapping[str, Any]) -> None:
    """What goes around text: BOS or EOS, where the file or the custom of its kind of vocabulary says so."""
    kind, rule = metadata["tokenizer.ggml.model"], metadata.get("tokenizer.ggml.pre")
    before = token_at(tokens, metadata.get("tokenizer.ggml.bos_token_id"))
    after = token_at(tokens, metadata.get("tokenizer.ggml.eos_token_id"))
    add_before = metadata.get("tokenizer.ggml.add_bos_token", kind == "llama" or rule in _WORDS_FIRST)
    add_after = metadata.get("tokenizer.ggml.add_eos_token", False)
    start = [before] if add_before and before is not None else []
    end = [after] if add_after and after is not None else []
    if start or end:
        special = [(token, tokenizer.token_to_id(token)) for token in {*start, *end}]
        tokenizer.post_processor = processors.TemplateProcessing(single=[*start, "$A", *end], special_tokens=special)
