"""The KV cache's storage: keys and values in blocks. Which block belongs to whom is the scheduler's to know."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.models.config import ModelConfig


@dataclass(frozen=True, slots=True)
class LayerCache:
    """One layer's part: key and value, each [num_blocks, num_kv_heads, block_size, head_dim]."""

    key: Tensor
    value: Tensor


class KVCache:
    """All layers' blocks. The memory is touched as blocks are first written, so an unused part of it costs nothing."""

    def __init__(
        self, config: ModelConfig, *, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        shape = (2, num_blocks, config.num_kv_heads, block_size, config.head_dim)
        storage = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]
        self.layers = tuple(LayerCache(layer[0], layer[1]) for layer in storage)
        self._storage = storage

    @staticmethod
    def block_bytes(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
        """Bytes of one block over all layers."""
        return config.kv_values_per_token * block_size * dtype.itemsize

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy blocks (source, destination); all sources are read before any destination is written."""
        if not pairs:
            return
        sources, destinations = torch.tensor(pairs, device=self._storage[0].device).unbind(1)
        for layer in self._storage:
            layer[:, destinations] = layer[:, sources]
