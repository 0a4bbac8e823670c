"""The KV cache's storage: keys and values in blocks. Which block belongs to whom is the scheduler's to know."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.errors import ConfigError
from engine.models.config import ModelConfig
from kernels.ops import KV_FORMATS, KVFormat
from scheduler.batch import Move, Transfers


@dataclass(frozen=True, slots=True)
class LayerCache:
    """One layer's part: key and value, each [num_blocks, num_kv_heads, block_size, W] (see `kernels.ops`)."""

    key: Tensor
    value: Tensor
    mass: Tensor
    """[num_blocks, num_kv_heads, block_size] float32: the attention that slots got, for sequences that sum it up."""
    kv_format: KVFormat | None
    """Of the rows, where they are not values of the model's dtype."""


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
        kv_format: KVFormat | None = None,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        width, dtype = _row(config, dtype, kv_format)
        block = (config.num_kv_heads, block_size, width)
        layers, pinned = range(config.num_layers), device.type == "cuda" and num_host_blocks > 0
        self._device = [torch.empty((2, num_blocks, *block), dtype=dtype, device=device) for _ in layers]
        self._host = [torch.empty((2, num_host_blocks, *block), dtype=dtype, pin_memory=pinned) for _ in layers]
        sums = block[:2]
        self._mass = [torch.empty((1, num_blocks, *sums), device=device) for _ in layers]
        self._host_mass = [torch.empty((1, num_host_blocks, *sums), pin_memory=pinned) for _ in layers]
        self.layers = tuple(
            LayerCache(layer[0], layer[1], mass[0], kv_format)
            for layer, mass in zip(self._device, self._mass, strict=True)
        )

    @staticmethod
    def block_bytes(config: ModelConfig, block_size: int, dtype: torch.dtype, kv_format: KVFormat | None = None) -> int:
        """Bytes of one block over all layers."""
        width, dtype = _row(config, dtype, kv_format)
        return config.kv_rows_per_token * block_size * width * dtype.itemsize

    def transfer(self, transfers: Transfers) -> None:
        """Move blocks to the host, on the device, and back from the host, in this order; see `Transfers`."""
        for device, host in ((self._device, self._host), (self._mass, self._host_mass)):
            _move(device, host, transfers.out)
            _move(device, device, transfers.copies)
            _move(host, device, transfers.back)


def pick_kv_format(name: str, config: ModelConfig, dtype: torch.dtype) -> KVFormat | None:
    """The format of that name; None where that, or `auto`, is a model of this dtype as it is. Raises ConfigError."""
    if name == "auto" or KV_FORMATS[name].dtype is dtype:
        return None
    try:
        KV_FORMATS[name].row_width(config.head_dim)
    except ValueError as error:
        raise ConfigError(f"--kv-cache-dtype {name}: {error}, not {config.head_dim}") from None
    return KV_FORMATS[name]


def _row(config: ModelConfig, dtype: torch.dtype, kv_format: KVFormat | None) -> tuple[int, torch.dtype]:
    """Elements of a row, and their dtype."""
    return (config.head_dim, dtype) if kv_format is None else (kv_format.row_width(config.head_dim), kv_format.dtype)


def _move(origin: Sequence[Tensor], target: Sequence[Tensor], moves: Sequence[Move]) -> None:
    """Copy blocks in every layer; all sources are read before any destination is written."""
    if not moves:
        return
    sources, destinations = torch.tensor(moves).unbind(1)
    sources, destinations = sources.to(origin[0].device), destinations.to(target[0].device)
    for layer, to in zip(origin, target, strict=True):
        to[:, destinations] = layer[:, sources].to(to.device)
