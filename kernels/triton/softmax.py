"""Softmax over tiles of scores, one after the other (FlashAttention-2, Dao 2023, §3.1), in powers of two.

exp2 is one instruction where exp is two, so scores come multiplied by log2(e): their scale has it in it.
"""

import triton
import triton.language as tl


@triton.jit
def fold_scores(scores, scale, top, total):
    """Take in a tile of scores [M, N], -inf where nothing is seen; rows may have seen nothing so far.

    top [M] is the largest scaled score so far and total [M] the sum of powers below it, both float32. Returns the
    tile's powers [M, N], the new top and total, and what older sums are to be multiplied with [M].
    """
    new_top = tl.maximum(top, tl.max(scores, 1) * scale)
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    powers = tl.exp2(scores * scale - base[:, None])
    shrink = tl.exp2(top - base)
    return powers, new_top, total * shrink + tl.sum(powers, 1), shrink
