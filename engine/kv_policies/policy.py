"""What a KV policy is: a value that a request names, frozen, with the paper's hyper-parameters as its fields."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol, runtime_checkable

from kernels.pruning import Pruning
from scheduler.kv_budget import KVBudget

if TYPE_CHECKING:  # policies are settings too, and a command's help needs no torch
    from collections.abc import Callable

    from torch import Tensor


class KVPolicy(Protocol):
    """Keeps a sequence's KV cache small. Its fields' types and defaults are those that a client may send."""

    name: ClassVar[str]
    """What clients call it."""

    def budget(self) -> KVBudget | None:
        """How many slots a sequence may hold; None: as many as it has tokens. Raises ValueError for a bad field."""


@dataclass(frozen=True, slots=True)
class Slots:
    """What a sequence holds in each of L layers, oldest first: n slots, the newest token's the last."""

    kv: "Callable[[int], Tensor]"
    """Reads keys (0) or values (1), which most policies need not."""
    mass: "Tensor"
    """[L, Hkv, n] float32: the attention that each slot got from the queries that the budget counts, summed over them
    and over the query heads of its group; meaningless if it counts none."""
    positions: "Tensor"
    """[L, Hkv, n] int32: the tokens'; −1 for a slot that holds none, since its head kept fewer than others."""
    output: "Tensor"
    """[L, Hkv] float32: the sum of the absolute values of what each head's attention gave for all tokens so far;
    known to a `Pruner` only."""
    off: "Tensor"
    """[L, Hkv] bool: the heads that were turned off before."""

    def keys(self) -> "Tensor":
        """[L, Hkv, n, D], rotated."""
        return self.kv(0)

    def values(self) -> "Tensor":
        """[L, Hkv, n, D]."""
        return self.kv(1)


@runtime_checkable
class Selector(KVPolicy, Protocol):
    """A policy whose budget is a `Selection`: which tokens stay is what it scores highest."""

    def score(self, slots: Slots) -> "Tensor":
        """[L, Hkv, n]: the slots of the highest scores stay, for each layer and KV head its own.

        A slot of score −inf goes even if there is room for it: so layers and heads may keep fewer slots than others.
        """


@runtime_checkable
class Pruner(Selector, Protocol):
    """A selector that prunes within attention too."""

    def heads_off(self, slots: Slots) -> "Tensor":
        """[L, Hkv] bool: which KV heads are turned off, those in ``slots.off`` among them; told at each selection."""

    def pruning(self) -> Pruning | None:
        """What is left out of each query's attention; None if that is nothing, and no head is ever turned off."""
