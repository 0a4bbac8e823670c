"""The KV cache's storage: keys and values in blocks. Which block belongs to whom is the scheduler's to know."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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
    output: Tensor
    """[num_blocks, num_kv_heads] float32: the sum of |attention's output| of a sequence's KV heads, for sequences that
    sum it up, with their first block."""
    kv_format: KVFormat | None
    """Of the rows, where they are not values of the model's dtype."""


@dataclass(frozen=True, slots=True)
class Storage:
    """All layers' blocks in one place: a tensor for each kind of thing that is kept, [layers, blocks, …]."""

    kv: Tensor
    """[layers, 2, blocks, num_kv_heads, block_size, W]: rows of keys, and of values."""
    mass: Tensor
    """[layers, blocks, num_kv_heads, block_size] float32, see `LayerCache`."""
    positions: Tensor
    """[layers, blocks, num_kv_heads, block_size] int32: of the tokens in slots that a policy selected."""
    hidden: Tensor
    """[layers, blocks, num_kv_heads] int32: how many first slots a KV head does not see of a sequence that a policy
    selected for, with its first block."""
    output: Tensor
    """[layers, blocks, num_kv_heads] float32, see `LayerCache`."""

    @classmethod
    def empty(
        cls,
        config: ModelConfig,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        kv_format: KVFormat | None,
        **place: Any,
    ) -> "Storage":
        """Room for so many blocks; ``place`` is what torch.empty is told of the device."""
        layers, heads = config.num_layers, config.num_kv_heads
        width, dtype = _row(config, dtype, kv_format)
        return cls(
            kv=torch.empty((layers, 2, num_blocks, heads, block_size, width), dtype=dtype, **place),
            mass=torch.empty((layers, num_blocks, heads, block_size), **place),
            positions=torch.empty((layers, num_blocks, heads, block_size), dtype=torch.int32, **place),
            hidden=torch.empty((layers, num_blocks, heads), dtype=torch.int32, **place),
            output=torch.empty((layers, num_blocks, heads), **place),
        )

    def places(self, table: Sequence[int], num_slots: int) -> Tensor:
        """Where a block table's first slots are, in every layer, for each KV head: [layers, num_kv_heads, num_slots]
        int64, as indices into the flattened ``mass`` and ``positions``."""
        layers, blocks, heads, size = self.mass.shape
        slots = torch.arange(num_slots)
        in_blocks = torch.tensor(table)[slots // size] * (heads * size) + slots % size
        first = torch.arange(layers)[:, None] * (blocks * heads * size) + torch.arange(heads) * size
        return (first.unsqueeze(-1) + in_blocks).to(self.mass.device)

    def rows(self) -> Tensor:
        """All keys and values, [layers · 2 · blocks · num_kv_heads · block_size, W]."""
        return self.kv.view(-1, self.kv.shape[-1])

    def of_kv(self, places: Tensor, which: int) -> Tensor:
        """Places [layers, …] as indices into `rows`, of keys (0) or values (1)."""
        layers, per_layer = self.mass.shape[0], self.mass[0].numel()
        jumps = (torch.arange(layers, device=places.device) + which) * per_layer
        return places + jumps.view(-1, *[1] * (places.dim() - 1))

    def by_block(self) -> list[Tensor]:
        """Everything, with the blocks as the second dimension."""
        return [self.kv[:, 0], self.kv[:, 1], self.mass, self.positions, self.hidden, self.output]


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
        pinned = device.type == "cuda" and num_host_blocks > 0
        self.storage = Storage.empty(config, num_blocks, block_size, dtype, kv_format, device=device)
        self._host = Storage.empty(config, num_host_blocks, block_size, dtype, kv_format, pin_memory=pinned)
        self.kv_format = kv_format
        here = self.storage
        self.layers = tuple(
            LayerCache(here.kv[layer, 0], here.kv[layer, 1], here.mass[layer], here.output[layer], kv_format)
            for layer in range(config.num_layers)
        )

    @staticmethod
    def block_bytes(config: ModelConfig, block_size: int, dtype: torch.dtype, kv_format: KVFormat | None = None) -> int:
        """Bytes of one block over all layers."""
        width, dtype = _row(config, dtype, kv_format)
        return config.kv_rows_per_token * block_size * width * dtype.itemsize

    def decoded(self, rows: Tensor) -> Tensor:
        """Rows [..., W] as keys or values [..., head_dim]."""
        return rows if self.kv_format is None else self.kv_format.decode(rows)

    def hidden_slots(self, block_tables: Tensor, selected: Tensor | None) -> Tensor | None:
        """How many first slots each KV head does not see of sequences that a policy ``selected`` for, [B] bool.

        block_tables [B, M] → [layers, B, num_kv_heads] int32, 0 for the other sequences; None if there are no others.
        """
        if selected is None:
            return None
        return self.storage.hidden[:, block_tables[:, 0]] * selected.unsqueeze(-1)

    def transfer(self, transfers: Transfers) -> None:
        """Move blocks to the host, on the device, and back from the host, in this order; see `Transfers`."""
        for device, host in zip(self.storage.by_block(), self._host.by_block(), strict=True):
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


def _move(origin: Tensor, target: Tensor, moves: Sequence[Move]) -> None:
    """Copy blocks, the second dimension, in every layer; all sources are read before any destination is written."""
    if moves:
        sources, destinations = torch.tensor(moves).unbind(1)
        moved = origin[:, sources.to(origin.device)]
        target[:, destinations.to(target.device)] = moved.to(target.device)
