"""Protecting the newest tokens, as most selecting policies do."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def protect_recent(scores: "Tensor", recent: int) -> "Tensor":
    """``scores`` [L, Hkv, n], with those of the last ``recent`` slots above all others."""
    if recent:
        scores = scores.clone()
        scores[..., -recent:] = float("inf")
    return scores
