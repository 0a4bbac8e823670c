"""Attention sinks (StreamingLLM, Xiao et al. 2024, §3.2): what a sequence of a batch sees besides its newest keys."""

from typing import NamedTuple

from torch import Tensor


class Sinks(NamedTuple):
    """Per sequence, a window over its slots and how many slots at its beginning are seen through it.

    Positions are counted inside the cache, as the paper does: the sinks keep the positions 0, 1, … however far the
    window has moved on. So they are met by queries that were rotated for the end of the window, not for their true
    positions; rotations being relative, the keys in the window are met by the queries as they are.
    """

    windows: Tensor
    """int32 [B]: a key less than this many slots before the query is seen; 0: every key is."""
    counts: Tensor
    """int32 [B]: so are this many first slots."""
    q: Tensor
    """Like the queries, [T, Hq, D]: what is multiplied with those first slots. Rows of sequences without any may hold
    anything."""
