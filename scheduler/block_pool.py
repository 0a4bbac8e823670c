"""The KV memory as fixed-size blocks: who holds which, and which is reused next.

A block is *used* while at least one block table holds it and *free* otherwise. A free block keeps its content, and
its place in the prefix index, until it is handed out again; the free list is in order of release, so what is reused
first is what was released longest ago. (PagedAttention, Kwon et al. 2023, §4.2–4.3; that the free list doubles as a
cache follows vLLM's v1 core.)
"""

from collections import OrderedDict
from collections.abc import Iterable
from itertools import chain, islice

from scheduler.prefix_index import PrefixIndex


class OutOfBlocksError(RuntimeError):
    """More blocks were asked for than are free; callers look at ``num_free`` first."""


class BlockPool:
    """``num_blocks`` blocks, named 0 … num_blocks − 1, and the index of what they hold."""

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"a block pool needs at least one block, not {num_blocks}")
        self.num_blocks = num_blocks
        self.index = PrefixIndex()
        self._refs = [0] * num_blocks
        self._fresh = 0  # blocks from this one on were never handed out; a simulator makes thousands of pools
        self._free: OrderedDict[int, None] = OrderedDict()  # blocks that were released

    @property
    def num_free(self) -> int:
        """Blocks that no table holds, whether or not their content is still known."""
        return self.num_blocks - self._fresh + len(self._free)

    @property
    def num_used(self) -> int:
        """Blocks that at least one table holds."""
        return self._fresh - len(self._free)

    def ref_count(self, block: int) -> int:
        """How many tables hold ``block``."""
        return self._refs[block]

    def next_free(self, count: int) -> list[int]:
        """The ``count`` blocks that `allocate` would hand out, in that order."""
        return list(islice(chain(range(self._fresh, self.num_blocks), self._free), count))

    def allocate(self, count: int) -> list[int]:
        """Take the ``count`` blocks released longest ago, one reference each; their content is forgotten."""
        if count > self.num_free:
            raise OutOfBlocksError(f"{count} blocks asked for, {self.num_free} free")
        blocks = list(range(self._fresh, min(self._fresh + count, self.num_blocks)))
        self._fresh += len(blocks)
        blocks += [self._free.popitem(last=False)[0] for _ in range(count - len(blocks))]
        for block in blocks:
            self.index.forget(block)
            self._refs[block] = 1
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """Add one reference to each block, used or released."""
        for block in blocks:
            if self._refs[block] == 0:
                del self._free[block]
            self._refs[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """Drop one reference to each block of a table, given in the table's order.

        The last block becomes free first: a prefix is evicted from its leaf end, so what stays is still a prefix.
        """
        for block in reversed(list(blocks)):
            if self._refs[block] < 1:
                raise ValueError(f"block {block} is released more often than it was taken")
            self._refs[block] -= 1
            if self._refs[block] == 0:
                self._free[block] = None

    def check(self, tables: Iterable[Iterable[int]]) -> None:
        """Raise AssertionError unless free + used = total and every reference is owned by exactly the given tables."""
        held = [0] * self.num_blocks
        for table in tables:
            for block in table:
                held[block] += 1
        assert held == self._refs, "a block's references differ from the tables that hold it"
        assert self.num_free == held.count(0), "free + used ≠ total"
        assert not any(map(held.__getitem__, self._free)), "a block is free though a table holds it"
