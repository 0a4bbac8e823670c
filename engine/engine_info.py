"""The facts about a running engine that its start log states and its users ask for."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """What was loaded, and how much it can hold."""

    model_name: str
    architecture: str
    dtype: str
    device: str
    threads: int
    vocab_size: int
    hidden_size: int
    max_model_len: int
    weight_bytes: int
    num_blocks: int
    block_size: int
    kv_bytes: int
    load_seconds: float
    weight_bits: tuple[int, ...] = ()
    """Bits of those weights that are multiplied as codes."""
    kv_format: str | None = None
    """What keys and values are stored as; None: as values of ``dtype``."""
    position_dependent_rotation: bool = False
    """Whether a key's rotation depends on more than how far away it is (dynamic NTK scaling)."""
    windows: tuple[int | None, ...] = ()
    """Each layer's own sliding window in tokens; None where it sees everything."""
    full_length_slots: int | None = None
    """KV slots that a plain request of the full context length holds at most; None: one for each token."""

    @property
    def dtypes(self) -> str:
        """The model's dtype, and those of its weights and its KV where they are others."""
        others = [f"{self._bits} weights"] if self.weight_bits else []
        others += [f"{self.kv_format} KV"] if self.kv_format is not None else []
        return f"{self.dtype} with {' and '.join(others)}" if others else self.dtype

    @property
    def _bits(self) -> str:
        return " and ".join(map(str, self.weight_bits)) + "-bit"

    @property
    def kv_tokens(self) -> int:
        """Tokens that the KV cache holds."""
        return self.num_blocks * self.block_size

    @property
    def full_length_requests(self) -> float:
        """How many requests of the full context length the KV cache holds at a time."""
        return self.kv_tokens / (self.full_length_slots or self.max_model_len)

    def lines(self) -> list[str]:
        """The start log."""
        return [
            f"model {self.model_name} ({self.architecture}), {self.dtype} on {self.device}, "
            f"{self.threads} thread{'s' if self.threads > 1 else ''}",
            f"{f'{self._bits} ' if self.weight_bits else ''}weights {_size(self.weight_bytes)}, "
            f"loaded in {self.load_seconds:.1f} s",
            f"KV cache {_size(self.kv_bytes)} of {self.kv_format or self.dtype}: {self.kv_tokens:,} tokens in "
            f"{self.num_blocks:,} blocks of {self.block_size}, {self.full_length_requests:.1f} requests at the full "
            f"{self.max_model_len:,} tokens",
        ]


def _size(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.0f} MiB"
