"""What a KV policy is: a value that a request names, frozen, with the paper's hyper-parameters as its fields."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol, runtime_checkable

from scheduler.kv_budget import KVBudget

if TYPE_CHECKING:  # policies are settings too, and a command's help needs no torch
    from torch import Tensor


class KVPolicy(Protocol):
    """Keeps a sequence's KV cache small. Its fields' types and defaults are those that a client may send."""

    name: ClassVar[str]
    """What clients call it."""

    def budget(self) -> KVBudget | None:
        """How many slots a sequence may hold; None: as many as it has tokens. Raises ValueError for a bad field."""


@dataclass(frozen=True, slots=True)
class Slots:
    """One layer's part of what a sequence holds, oldest first: L slots, the newest token's the last."""

    keys: "Tensor"
    """[Hkv, L, D], rotated."""
    values: "Tensor"
    """[Hkv, L, D]."""
    mass: "Tensor"
    """[Hkv, L] float32: the attention that each slot got from the queries that the budget counts, summed over them and
    over the query heads of its group; meaningless if it counts none."""


@runtime_checkable
class Selector(KVPolicy, Protocol):
    """A policy whose budget is a `Selection`: which tokens stay is what it scores highest."""

    def score(self, slots: Slots) -> "Tensor":
        """[Hkv, L]: the slots of the highest scores stay, for each KV head its own."""
