"""Pruning within attention (SpAtten, Wang et al. 2021, §3): what is left out of a query's."""

from typing import NamedTuple


class Pruning(NamedTuple):
    """SpAtten's local value pruning (§3.3) and progressive quantization (§3.4)."""

    values: float = 0.0
    """The share of a query's values, those of its smallest probabilities, that are not read; the other probabilities
    stay as they are."""
    high_bits: int = 0
    """Bits of queries and keys that scores are computed from at first; 0: all at once."""
    low_bits: int = 0
    """Further bits, which are read where the probabilities turn out to be flat:"""
    threshold: float = 0.0
    """where none of them reaches this."""
