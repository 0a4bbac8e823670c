"""The KV cache's storage: keys and values in blocks. Which block belongs to whom is the scheduler's to know."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.models.config import ModelConfig
from scheduler.batch import Move, Transfers


@dataclass(frozen=True, slots=True)
class LayerCache:
    """One layer's part: key and value, each [num_blocks, num_kv_heads, block_size, head_dim]."""

    key: Tensor
    value: Tensor


class KVCache:
    """All layers' blocks, on the device and in the host tier behind it.

    The memory is touched as blocks are first written, so an unused part of it costs nothing. What the host holds for a
    GPU is pinned, which is touched at once.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        num_host_blocks: int = 0,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        block = (config.num_kv_heads, block_size, config.head_dim)
        layers, pinned = range(config.num_layers), device.type == "cuda" and num_host_blocks > 0
        self._device = [torch.empty((2, num_blocks, *block), dtype=dtype, device=device) for _ in layers]
        self._host = [torch.empty((2, num_host_blocks, *block), dtype=dtype, pin_memory=pinned) for _ in layers]
        self.layers = tuple(LayerCache(layer[0], layer[1]) for layer in self._device)

    @staticmethod
    def block_bytes(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
        """Bytes of one block over all layers."""
        return config.kv_values_per_token * block_size * dtype.itemsize

    def transfer(self, transfers: Transfers) -> None:
        """Move blocks to the host, on the device, and back from the host, in this order."""
        _move(self._device, self._host, transfers.out)
        _move(self._device, self._device, transfers.copies)
        _move(self._host, self._device, transfers.back)


def _move(origin: Sequence[Tensor], target: Sequence[Tensor], moves: Sequence[Move]) -> None:
    """Copy blocks in every layer; all sources are read before any destination is written."""
    if not moves:
        return
    sources, destinations = torch.tensor(moves).unbind(1)
    sources, destinations = sources.to(origin[0].device), destinations.to(target[0].device)
    for layer, to in zip(origin, target, strict=True):
        to[:, destinations] = layer[:, sources].to(to.device)
