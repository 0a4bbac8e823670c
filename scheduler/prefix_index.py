"""Which block holds which tokens: a SHA-256 chain over whole blocks, so that equal prefixes are found and shared.

A block's key covers every token before it, the adapter and the tenant's salt, so two blocks with one key hold the
same KV by construction; Python's ``hash()`` is never used, since its collisions can be made on purpose.
"""

from __future__ import annotations

from array import array
from hashlib import sha256


def root_key(cache_salt: str | None = None, adapter: str | None = None) -> bytes:
    """The parent key of a first block: requests share blocks only if their salt and their adapter are the same."""
    parts = [part.encode("utf-8", "surrogatepass") for part in (cache_salt or "", adapter or "")]
    return sha256(b"".join(len(part).to_bytes(8, "little") + part for part in parts)).digest()


def block_key(parent: bytes, tokens: array[int]) -> bytes:
    """The key of the full block ``tokens`` (int32) that follows the block of key ``parent``."""
    return sha256(parent + tokens.tobytes()).digest()


class PrefixIndex:
    """Key → block, and back. A block enters once it is full and leaves when its memory is handed out again."""

    def __init__(self) -> None:
        self._block_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}

    def __len__(self) -> int:
        return len(self._block_of)

    def find(self, key: bytes) -> int | None:
        """The block that holds the tokens of ``key``."""
        return self._block_of.get(key)

    def key_of(self, block: int) -> bytes | None:
        """The key of the tokens that ``block`` holds, if they are known."""
        return self._key_of.get(block)

    def add(self, key: bytes, block: int) -> None:
        """Make ``block`` the holder of ``key``; the first holder stays if there is one already."""
        if key not in self._block_of and block not in self._key_of:
            self._block_of[key] = block
            self._key_of[block] = key

    def forget(self, block: int) -> None:
        """Drop what is known of ``block``; nothing happens if nothing is."""
        key = self._key_of.pop(block, None)
        if key is not None:
            del self._block_of[key]
