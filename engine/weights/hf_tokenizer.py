"""The tokenizer of a Hugging Face directory: tokenizer.json, and what tokenizer_config.json adds to it."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import tokenizers
from tokenizers import AddedToken, processors

from engine.errors import CheckpointError
from engine.tokenizer import Tokenizer
from engine.weights.config_checks import read_json

# What there may be instead of tokenizer.json, for transformers to convert.
_SLOW: Final = ("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
_ID_DIGITS: Final = 9


def read_tokenizer(folder: Path, config: Mapping[str, Any], generation: Mapping[str, Any]) -> Tokenizer:
    """Reads the tokenizer of a directory whose config.json and generation_config.json are given.

    Raises CheckpointError if there is none, or its files are damaged or ask for remote code.
    """
    settings = _read_if_there(folder / "tokenizer_config.json")
    backend = _read_backend(folder, settings)
    _add_missing_tokens(backend, settings, folder)
    named = _read_if_there(folder / "special_tokens_map.json") | settings
    bos, eos = _content(named.get("bos_token")), _content(named.get("eos_token"))
    _follow_flags(backend, settings, bos, eos)
    ends = {backend.token_to_id(eos)} if eos is not None else set()
    ends |= {*_ids(config.get("eos_token_id")), *_ids(generation.get("eos_token_id"))}
    return Tokenizer(
        backend=backend,
        bos_token=bos,
        eos_token=eos,
        eos_token_ids=frozenset(end for end in ends if end is not None),
        chat_template=_chat_template(folder, settings),
    )


def _read_if_there(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _read_backend(folder: Path, settings: Mapping[str, Any]) -> tokenizers.Tokenizer:
    file = folder / "tokenizer.json"
    try:
        if file.is_file():
            backend = tokenizers.Tokenizer.from_file(str(file))
            # Some files were saved with the limits of their training; a prompt is never cut or padded silently.
            backend.no_truncation()
            backend.no_padding()
            return backend
    except Exception as error:  # noqa: BLE001 (the library raises bare Exception)
        raise CheckpointError(f"{file}: not a tokenizer ({error})") from None
    if not any((folder / name).is_file() for name in _SLOW):
        raise CheckpointError(f"{folder}: there is no tokenizer.json")
    if settings.get("auto_map"):
        raise CheckpointError(f"{folder}: the tokenizer asks for remote code (auto_map), which Octavo never runs")
    return _convert(folder)


def _convert(folder: Path) -> tokenizers.Tokenizer:
    # Imported here: seconds, and only for directories without tokenizer.json.
    from transformers import AutoTokenizer

    try:
        converted = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        backend = getattr(converted, "backend_tokenizer", None)
    except Exception as error:  # noqa: BLE001 (a library's anything, over files that we know nothing of)
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"{folder}: transformers cannot convert its tokenizer ({reason})") from None
    if not isinstance(backend, tokenizers.Tokenizer):
        raise CheckpointError(f"{folder}: there is no tokenizer.json, and its tokenizer cannot be converted to one")
    return backend


def _add_missing_tokens(backend: tokenizers.Tokenizer, settings: Mapping[str, Any], folder: Path) -> None:
    """Fine-tunes sometimes add tokens in tokenizer_config.json alone."""
    table = settings.get("added_tokens_decoder")
    if not isinstance(table, dict):
        return
    file = folder / "tokenizer_config.json"
    there = {token.content for token in backend.get_added_tokens_decoder().values()}
    keys = [key for key in table if key.isdecimal()]
    if any(len(key) > _ID_DIGITS for key in keys):
        raise CheckpointError(f"{file}: added_tokens_decoder has an id of more than {_ID_DIGITS} digits")
    for index in sorted(keys, key=int):
        fields = table[index]
        if not isinstance(fields, dict):
            raise CheckpointError(f"{file}: added_tokens_decoder describes token {index} by no object")
        content = _content(fields)
        if not content or content in there:
            continue
        flags = {flag: bool(fields.get(flag)) for flag in ("single_word", "lstrip", "rstrip", "normalized", "special")}
        backend.add_tokens([AddedToken(content, **flags)])
        if backend.token_to_id(content) != int(index):
            raise CheckpointError(f"{file}: token {content!r} cannot have the id {index}")


def _follow_flags(backend: tokenizers.Tokenizer, settings: Mapping[str, Any], bos: str | None, eos: str | None) -> None:
    """``add_bos_token`` and ``add_eos_token``, where a file has either, overrule what tokenizer.json adds."""
    flags = [settings.get("add_bos_token"), settings.get("add_eos_token")]
    if not any(isinstance(flag, bool) for flag in flags):
        return
    before = [bos] if flags[0] is True and bos is not None else []
    after = [eos] if flags[1] is True and eos is not None else []
    special = {token: backend.token_to_id(token) for token in before + after}
    if None in special.values() or backend.encode("").ids == [special[token] for token in before + after]:
        return
    backend.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *after], special_tokens=list(special.items())
    )


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            raise CheckpointError(f"{file}: cannot be read as UTF-8 text") from None
    template = settings.get("chat_template")
    if isinstance(template, list):
        entries = [entry for entry in template if isinstance(entry, dict)]
        if not all(isinstance(entry.get("name"), str) for entry in entries):
            raise CheckpointError(f"{folder / 'tokenizer_config.json'}: chat_template has an entry without a name")
        template = {entry["name"]: entry.get("template") for entry in entries}.get("default")
    return template if isinstance(template, str) else None


def _content(token: Any) -> str | None:
    """A special token's text, whether given as a string or as an AddedToken's fields."""
    value = token.get("content") if isinstance(token, dict) else token
    return value if isinstance(value, str) else None


def _ids(value: Any) -> Iterator[int]:
    """The ids of an ``eos_token_id``: one, a list of them, or none."""
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, int) and not isinstance(item, bool) and item >= 0:
            yield item
