"""Writing this step's keys and values into their slots of the paged cache."""

from torch import Tensor


def kv_write(k: Tensor, v: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor) -> None:
    """Scatter token t's heads to slot `slots[t]`, or nowhere if that is negative; see `kernels.ops.kv_write`."""
    tokens = (slots >= 0).nonzero().squeeze(1)
    kept = slots[tokens]
    block_size = key_cache.shape[2]
    blocks, offsets = kept // block_size, kept % block_size
    key_cache[blocks, :, offsets] = k[tokens]
    value_cache[blocks, :, offsets] = v[tokens]
