"""Writing this step's keys and values into their slots of the paged cache."""

from torch import Tensor

from kernels.kv_format import KVFormat


def kv_write(
    k: Tensor, v: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor, kv_format: KVFormat | None = None
) -> None:
    """Scatter token t's heads to slot `slots[t]`, or nowhere if that is negative; see `kernels.ops.kv_write`."""
    tokens = (slots >= 0).nonzero().squeeze(1)
    kept = slots[tokens]
    block_size = key_cache.shape[2]
    blocks, offsets = kept // block_size, kept % block_size
    for heads, cache in ((k[tokens], key_cache), (v[tokens], value_cache)):
        cache[blocks, :, offsets] = heads if kv_format is None else kv_format.encode(heads)
