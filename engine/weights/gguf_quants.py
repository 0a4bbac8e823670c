"""From GGUF's quantized blocks to float32, exactly: bit for bit what `gguf.quants.dequantize` gives.

The types that most files use are unpacked by torch, a chunk of blocks at a time; the rest
(Q5_0, Q5_1 and the K-quants) go through the `gguf` package, imported only then.
"""

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from engine.weights.gguf_header import QuantType
from kernels.ops import GroupQuantized

_PLAIN: Final[Mapping[str, torch.dtype]] = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


# Blocks unpacked at a time: 32,736 elements. Below 32,768 torch computes an op in the calling thread. That keeps the
# temporaries in cache, and spares each op a barrier between threads: while two other processes kept both cores busy,
# those barriers made loading the embedded model take 10 s instead of 0.4 s.
_CHUNK_BLOCKS: Final = 1023


def dequantize_into(raw: Tensor, stored: QuantType, out: Tensor) -> None:
    """Unpacks ``raw``, contiguous uint8 [rows, bytes per row], into ``out``, contiguous [rows, elements per row].

    ``out`` has any float dtype. The values are exact in float32; a narrower ``out`` rounds each once.
    """
    if stored.name in _PLAIN:
        out.copy_(raw.view(_PLAIN[stored.name]))
        return
    blocks, values = raw.view(-1, stored.nbytes), out.view(-1, stored.block)
    for start in range(0, len(blocks), _CHUNK_BLOCKS):
        chunk = blocks[start : start + _CHUNK_BLOCKS]
        kept = group_quantized(chunk, stored)
        values[start : start + _CHUNK_BLOCKS] = _by_gguf(chunk, stored) if kept is None else kept.dequantize()


def group_quantized(raw: Tensor, stored: QuantType) -> GroupQuantized | None:
    """What ``raw``, contiguous uint8 [rows, bytes per row], holds, if its type has a scale for each 32 values."""
    blocks = raw.view(len(raw), -1, stored.nbytes)
    match stored.name:
        case "Q4_0":
            codes, minimum = _nibbles(blocks[..., 2:]), None
        case "Q4_1":
            codes, minimum = _nibbles(blocks[..., 4:]), _float16(blocks, 2)
        case "Q8_0":
            return GroupQuantized((blocks[..., 2:] ^ 128).flatten(1), _float16(blocks, 0), None, 8)
        case _:
            return None
    return GroupQuantized(codes.flatten(1), _float16(blocks, 0), minimum, 4)


def stored_dtype(stored: QuantType) -> torch.dtype:
    """The dtype that holds this type's values exactly."""
    return _PLAIN.get(stored.name, torch.float32)


def _float16(blocks: Tensor, start: int) -> Tensor:
    """The little-endian float16 at byte ``start`` of each block [..., bytes], as [...]."""
    return blocks[..., start : start + 2].contiguous().view(torch.float16).squeeze(-1)


def _nibbles(packed: Tensor) -> Tensor:
    """[..., 16] bytes → [..., 2, 16]: the low halves are a block's first 16 elements, the high ones its last."""
    return torch.stack((packed & 15, packed >> 4), dim=-2)


def _by_gguf(blocks: Tensor, stored: QuantType) -> Tensor:
    # Imported here: it costs 60 ms, and most files do not need it.
    import gguf
    import numpy as np

    with np.errstate(all="ignore"):  # a damaged file's infinite scale is for the engine to notice, not for a warning
        values = gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[stored.name])
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
