"""Equally long pieces of a text file, in tokens."""

from pathlib import Path

from engine.errors import ConfigError
from engine.tokenizer import Tokenizer


def read_tokens(path: str, tokenizer: Tokenizer) -> list[int]:
    """The whole file, tokenized as one text. Raises ConfigError."""
    try:
        return tokenizer.encode(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--text {path}: {getattr(error, 'strerror', None) or error}") from None


def cut(path: str, tokenizer: Tokenizer, count: int, length: int) -> list[list[int]]:
    """The file's first ``count`` windows of ``length`` tokens, which do not overlap. Raises ConfigError."""
    tokens = read_tokens(path, tokenizer)
    if len(tokens) < count * length:
        wanted = f"{count} windows of {length:,}" if count > 1 else f"{length:,}"
        raise ConfigError(f"--text {path}: has {len(tokens):,} tokens, too few for {wanted}")
    return [tokens[start : start + length] for start in range(0, count * length, length)]
