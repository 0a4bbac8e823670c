"""Counting attention (H2O, Zhang et al. 2023, §4): which of a step's queries count, and on top of what."""

from typing import NamedTuple

from torch import Tensor


class Counted(NamedTuple):
    """What `ops.attention_mass` counts of each sequence of a batch."""

    first: Tensor
    """int32 [B]: the row of the step's queries from which on a sequence's own count; their end, if none does."""
    kept: Tensor
    """int32 [B]: this many first slots keep the sums that they have, all others begin at 0; negative: the sequence
    counts nothing, and its sums are not touched."""
