"""What a KV policy is: a value that a request names, frozen, with the paper's hyper-parameters as its fields."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol, runtime_checkable

from scheduler.kv_budget import KVBudget

if TYPE_CHECKING:  # policies are settings too, and a command's help needs no torch
    from torch import Tensor

    from kernels.ops import KVFormat


class KVPolicy(Protocol):
    """Keeps a sequence's KV cache small. Its fields' types and defaults are those that a client may send."""

    name: ClassVar[str]
    """What clients call it."""

    def budget(self) -> KVBudget | None:
        """How many slots a sequence may hold; None: as many as it has tokens. Raises ValueError for a bad field."""


@dataclass(frozen=True, slots=True)
class Slots:
    """One layer's part of what a sequence holds, oldest first: L slots, the newest token's the last."""

    key_rows: "Tensor"
    """[Hkv, L, W]: the keys, as they are stored."""
    value_rows: "Tensor"
    """[Hkv, L, W]: the values likewise."""
    mass: "Tensor"
    """[Hkv, L] float32: the attention that each slot got from the queries that the budget counts, summed over them and
    over the query heads of its group; meaningless if it counts none."""
    kv_format: "KVFormat | None" = None
    """Of the rows, where they are not values of the model's dtype."""

    @property
    def keys(self) -> "Tensor":
        """[Hkv, L, D], rotated."""
        return self._decoded(self.key_rows)

    @property
    def values(self) -> "Tensor":
        """[Hkv, L, D]."""
        return self._decoded(self.value_rows)

    def _decoded(self, rows: "Tensor") -> "Tensor":
        return rows if self.kv_format is None else self.kv_format.decode(rows)


@runtime_checkable
class Selector(KVPolicy, Protocol):
    """A policy whose budget is a `Selection`: which tokens stay is what it scores highest."""

    def score(self, slots: Slots) -> "Tensor":
        """[Hkv, L]: the slots of the highest scores stay, for each KV head its own."""
