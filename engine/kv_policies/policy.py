"""What a KV policy is: a value that a request names, frozen, with the paper's hyper-parameters as its fields."""

from typing import ClassVar, Protocol

from scheduler.kv_budget import KVBudget


class KVPolicy(Protocol):
    """Keeps a sequence's KV cache small. Its fields' types and defaults are those that a client may send."""

    name: ClassVar[str]
    """What clients call it."""

    def budget(self) -> KVBudget | None:
        """How many slots a sequence may hold; None: as many as it has tokens. Raises ValueError for a bad field."""
