"""Where sequences' KV lives: in device blocks, and behind them, if there is one, in a tier of host blocks.

The host tier serves twice. A preempted sequence can be swapped out to it as a whole, and goes on where it was when
it comes back (PagedAttention, Kwon et al. 2023, §4.5). And a cached block that the device is about to reuse moves
there first, so that a prefix is found again long after the device has forgotten it. Both are block pools with a
prefix index, under the same keys: what either holds is found.

What has to be moved is gathered while a step is decided and is done before the step computes; see `Transfers` for
the order. Host blocks that a step reads or writes stay held until it is decided, so none is used twice in a step.
"""

from array import array
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from typing import TypeGuard

from scheduler.batch import Compaction, Move, Transfers
from scheduler.block_pool import BlockPool
from scheduler.kv_budget import KVBudget, Selection, Window
from scheduler.request import Sequence

_NOTHING = Transfers()
"""What most steps move."""


class KVMemory:
    """Gives sequences their blocks and takes them back. Knows nothing of whose turn it is."""

    def __init__(
        self, num_blocks: int, block_size: int, *, num_host_blocks: int, prefix_caching: bool, step_tokens: int
    ) -> None:
        self.block_size = block_size
        self._step_tokens = step_tokens
        self.device = BlockPool(num_blocks)
        self.host = BlockPool(num_host_blocks) if num_host_blocks else None
        self._prefix_caching = prefix_caching
        self._out: list[Move] = []
        self._back: list[Move] = []
        self._copies: list[Move] = []
        self._held: list[int] = []
        self._retired: list[int] = []
        self._evicted: list[tuple[Sequence, int]] = []
        self._compactions: list[Compaction] = []

    def end_step(self) -> None:
        """Let go of the device blocks that the step still had to read."""
        self.device.release(self._retired)
        self._retired = []

    def take_compactions(self) -> tuple[Compaction, ...]:
        """Whose policy has to select in this step; the next step begins with nothing."""
        compactions, self._compactions = self._compactions, []
        return tuple(compactions)

    def take_evicted(self) -> tuple[tuple[Sequence, int], ...]:
        """Whose KV fell away in this step, and of how many tokens; the next step begins with nothing."""
        evicted, self._evicted = self._evicted, []
        return tuple(evicted)

    def take_transfers(self) -> Transfers:
        """What this step has to move; the next step begins with nothing."""
        if self.host is not None:
            self.host.release(self._held)
            self._held = []
        if not (self._out or self._back or self._copies):
            return _NOTHING
        transfers = Transfers(tuple(self._out), tuple(self._copies), tuple(self._back))
        self._out, self._back, self._copies = [], [], []
        return transfers

    def check(self, live: Iterable[Sequence]) -> None:
        """Raise AssertionError unless the live sequences' tables own every reference, and cover what is computed."""
        live = list(live)
        self.device.check([self._retired, *(sequence.block_table for sequence in live)])
        if self.host is not None:
            self.host.check([self._held, *(sequence.host_table for sequence in live)])
        for sequence in live:
            table = sequence.block_table or sequence.host_table
            assert len(table) * self.block_size >= sequence.num_slots, "computed tokens without a block"
            assert sequence.num_computed_tokens <= sequence.num_tokens, "more tokens computed than there are"
            assert not (sequence.block_table and sequence.host_table), "a sequence lives in two places"

    # a sequence's blocks grow

    def blocks_needed(self, sequence: Sequence, num_tokens: int) -> int:
        """Free blocks that its next ``num_tokens`` tokens take, those for copies on write included."""
        if sequence.request.kv_budget is not None and (selection := _due(sequence)) is not None:
            return len(self._to_replace(sequence, selection.slots + num_tokens))
        start = sequence.num_computed_tokens - sequence.num_dropped
        missing = self._num_blocks(start + num_tokens) - len(sequence.block_table)
        return missing + len(self._writes_shared(sequence, start))

    def missing_blocks(self, sequence: Sequence) -> int:
        """Blocks that it will still ask for before all tokens it has now are computed."""
        return max(self._blocks_of_all(sequence) - len(sequence.block_table), 0)

    def drop(self, sequence: Sequence) -> None:
        """Take back the blocks that a window has left before its next token."""
        budget = sequence.request.kv_budget
        if not isinstance(budget, Window):
            return
        first, count = budget.droppable(sequence.num_computed_tokens, sequence.num_dropped, self.block_size)
        if count:
            self.device.release(sequence.block_table[first : first + count])
            del sequence.block_table[first : first + count]
            sequence.num_dropped += count * self.block_size
            if not budget.own:  # what no request of the model sees was taken by no policy
                self._evicted.append((sequence, count * self.block_size))

    def grow(self, sequence: Sequence, num_tokens: int) -> None:
        """Give it the blocks of its next ``num_tokens`` tokens; as many as `blocks_needed` are free."""
        if sequence.request.kv_budget is not None and (selection := _due(sequence)) is not None:
            self._compact(sequence, selection.slots, num_tokens)
            return
        table, start = sequence.block_table, sequence.num_computed_tokens - sequence.num_dropped
        end, first = start + num_tokens, start // self.block_size
        for index in self._writes_shared(sequence, start):  # copy-on-write
            (block,) = self._allocate(1)
            self._copies.append((table[index], block))
            self.device.release([table[index]])
            table[index] = block
        missing = self._num_blocks(end) - len(table)
        if missing:
            table.extend(self._allocate(missing))
        if end // self.block_size != first:
            self._publish(sequence, first, end)

    def _to_replace(self, sequence: Sequence, num_slots: int) -> list[int]:
        """Entries of the table, as long as so many slots need it, that are missing or shared."""
        table, ref_count = sequence.block_table, self.device.ref_count
        return [
            index for index in range(self._num_blocks(num_slots)) if index >= len(table) or ref_count(table[index]) > 1
        ]

    def _keep_published(self, sequence: Sequence, num_slots: int, replaced: list[int]) -> list[int]:
        """The entries that the prefix index knows as well, if there is room to replace those too; else it forgets them.

        A cached prefix is worth a copy, yet no sequence may wait for more blocks than its budget says.
        """
        table, index = sequence.block_table, self.device.index
        known = [i for i in range(min(self._num_blocks(num_slots), len(table))) if index.key_of(table[i]) is not None]
        wanted = sorted({*replaced, *known})
        if len(wanted) <= self.device.num_free:
            return wanted
        for i in known:
            if i not in replaced:
                index.forget(table[i])
        return replaced

    def _compact(self, sequence: Sequence, num_kept: int, num_tokens: int) -> None:
        """Have ``num_kept`` slots selected into blocks of its own, with room for ``num_tokens`` more behind them."""
        source, num_slots = sequence.block_table, sequence.num_slots
        end, num_dropped = num_kept + num_tokens, sequence.num_dropped
        replaced = self._keep_published(sequence, end, self._to_replace(sequence, end))
        fresh = dict(zip(replaced, self._allocate(len(replaced)), strict=True))
        blocks = [fresh.get(i, source[i] if i < len(source) else -1) for i in range(self._num_blocks(end))]
        self._retired += [block for block in source if block not in set(blocks)]
        sequence.block_table = array("i", blocks)
        sequence.num_dropped += num_slots - num_kept
        self._evicted.append((sequence, num_slots - num_kept))
        target = sequence.block_table[: self._num_blocks(num_kept)]
        self._compactions.append(
            Compaction(sequence, source[: self._num_blocks(num_slots)], num_slots, target, num_kept, num_dropped)
        )

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Let the child share all that the parent has."""
        self.device.share(parent.block_table)
        child.block_table = parent.block_table[:]
        child.num_computed_tokens = parent.num_computed_tokens
        child.num_dropped = parent.num_dropped

    # it comes and goes

    def enter(self, sequence: Sequence, spare: int) -> bool:
        """Give a sequence what the two tiers hold of it, if all its tokens find a block and ``spare`` are left over."""
        swapped = bool(sequence.host_table)
        skipped, kept = (0, self._swapped(sequence)) if swapped else self._cached(sequence)
        shared = [block for block, in_host in kept if not in_host]
        num_free = self.device.num_free - sum(self.device.ref_count(block) == 0 for block in shared) - spare
        if self._blocks_of_all(sequence) - len(shared) > num_free:
            return False
        self.device.share(shared)
        if swapped:
            self._held.extend(sequence.host_table)
            del sequence.host_table[:]
        else:
            sequence.num_dropped = skipped * self.block_size
            sequence.num_computed_tokens = sequence.num_dropped + len(kept) * self.block_size
            self._hold([block for block, in_host in kept if in_host])
        fetched = iter(self._allocate(len(kept) - len(shared)))
        for block, in_host in kept:
            if in_host:
                target = next(fetched)
                self._back.append((block, target))
                sequence.block_table.append(target)
            else:
                sequence.block_table.append(block)
        if len(shared) < len(kept):
            self._publish(sequence, 0, sequence.num_slots)
        return True

    def swap_out(self, sequence: Sequence) -> bool:
        """Move all that it has to the host tier, where it stays until it comes back. False if there is no room."""
        self.drop(sequence)  # so that it comes back with what its next token sees, and no more
        count = self._num_blocks(sequence.num_slots)
        if self.host is None or count == 0:
            return False
        keys = self._keys(sequence, sequence.num_slots)
        known = [self.host.index.find(key) for key in keys] + [None] * (count - len(keys))
        kept = [block for block in known if block is not None]
        if count - len(kept) > self.host.num_free - sum(self.host.ref_count(block) == 0 for block in kept):
            return False
        self.host.share(kept)
        fresh = iter(self.host.allocate(count - len(kept)))
        for index, block in enumerate(known):
            if block is None:
                block = next(fresh)
                self._out.append((sequence.block_table[index], block))
                if index < len(keys):
                    self.host.index.add(keys[index], block)
            sequence.host_table.append(block)
        self.device.release(sequence.block_table)
        del sequence.block_table[:]
        return True

    def free(self, sequence: Sequence) -> None:
        """Take back all that it has, wherever that is."""
        self.device.release(sequence.block_table)
        del sequence.block_table[:]
        if self.host is not None:
            self.host.release(sequence.host_table)
            del sequence.host_table[:]

    def forget(self, sequence: Sequence) -> None:
        """Let nobody find what it has computed: neither in its blocks nor in what was left behind when it moved."""
        keys = self._keys(sequence, sequence.num_slots)
        for pool, table in ((self.device, sequence.block_table), (self.host, sequence.host_table)):
            if pool is not None:
                found = [block for block in map(pool.index.find, keys) if block is not None]
                for block in {*table, *found}:
                    pool.index.forget(block)

    def forget_moves(self, transfers: Transfers) -> None:
        """Let nobody find what the step should have moved to the host."""
        for _, block in transfers.out:
            assert self.host is not None
            self.host.index.forget(block)

    # the parts

    def _num_blocks(self, num_tokens: int) -> int:
        """Blocks that so many tokens take."""
        return -(-num_tokens // self.block_size)

    def _blocks_of_all(self, sequence: Sequence) -> int:
        """Blocks that it holds at most until all tokens that it has now are computed."""
        num_slots = sequence.num_tokens - sequence.num_dropped
        budget = sequence.request.kv_budget
        if budget is None:
            return self._num_blocks(num_slots)
        most = budget.max_blocks(min(sequence.num_uncomputed_tokens, self._step_tokens), self.block_size)
        return min(most, self._num_blocks(num_slots))

    def _writes_shared(self, sequence: Sequence, slot: int) -> Seq[int]:
        """The entries of the table that its next token, which goes to ``slot``, writes to and others hold too.

        That is the block which the token goes to, if it is there already; while a sequence counts attention, any.
        """
        table, budget, ref_count = sequence.block_table, sequence.request.kv_budget, self.device.ref_count
        if budget is not None and isinstance(budget, Selection) and budget.counts(sequence.prompt_left):
            return [index for index, block in enumerate(table) if ref_count(block) > 1]
        index = slot // self.block_size
        return (index,) if index < len(table) and ref_count(table[index]) > 1 else ()

    def _keys(self, sequence: Sequence, num_slots: int) -> list[bytes]:
        """The prefix-index keys of the whole blocks at its table's beginning; none of those that a budget changed."""
        if not self._prefix_caching:
            return []
        budget, first = sequence.request.kv_budget, sequence.num_dropped // self.block_size
        if budget is not None and not _is_own(budget):
            num_slots = min(num_slots, budget.num_exact) if sequence.num_dropped == 0 else 0
            first = 0
        return sequence.block_keys(first + num_slots // self.block_size, self.block_size)[first:]

    def _cached(self, sequence: Sequence) -> tuple[int, list[tuple[int, bool]]]:
        """The blocks of its longest known prefix, each with whether it is the host's, and how many before are not
        needed.

        The last token is always computed, since its logits are wanted, and so is all from the first observed one on.
        """
        observed = sequence.request.observed
        wanted = min(sequence.num_tokens - 1, observed.start) if observed else sequence.num_tokens - 1
        budget = sequence.request.kv_budget
        if budget is not None and _is_own(budget):
            return self._cached_window(self._keys(sequence, wanted), budget)
        if budget is not None:
            # One token less than could be shared: then nothing is dropped or selected in the step that finds it, which
            # may be the step that computes it.
            wanted = max(min(wanted, budget.num_exact - 1), 0)
        kept: list[tuple[int, bool]] = []
        for key in self._keys(sequence, wanted):
            found = self._find(key)
            if found is None:
                break
            kept.append(found)
        return 0, kept

    def _cached_window(self, keys: Seq[bytes], window: Window) -> tuple[int, list[tuple[int, bool]]]:
        """The same if a window is all that the next token sees: what lies before may be gone, and the rest found."""
        kept: list[tuple[int, bool]] = []
        for first in range(len(keys) - 1, -1, -1):
            found = self._find(keys[first])
            if found is None:
                kept = []
                continue
            kept.append(found)
            if first == window.first_seen((first + len(kept)) * self.block_size, self.block_size):
                return first, kept[::-1]
        return 0, []

    def _swapped(self, sequence: Sequence) -> list[tuple[int, bool]]:
        """The blocks of what was swapped out, each the host's unless the device still has the same."""
        kept = [(block, True) for block in sequence.host_table]
        if isinstance(sequence.request.kv_budget, Selection):  # it may have to select at once: see `_cached`
            return kept
        for index, key in enumerate(self._keys(sequence, sequence.num_slots)):
            block = self.device.index.find(key)
            if block is not None:
                kept[index] = (block, False)
        return kept

    def _find(self, key: bytes) -> tuple[int, bool] | None:
        block = self.device.index.find(key)
        if block is not None:
            return block, False
        block = None if self.host is None else self.host.index.find(key)
        return None if block is None else (block, True)

    def _publish(self, sequence: Sequence, first: int, num_slots: int) -> None:
        """Enter the table's blocks from ``first`` on, which this step fills or fetches, into the prefix index.

        That is done before they are computed: within a layer all KV is written before any is read, so a sequence
        admitted later in the same step may share them already.
        """
        keys = self._keys(sequence, num_slots)
        for index in range(first, len(keys)):
            self.device.index.add(keys[index], sequence.block_table[index])

    def _allocate(self, count: int) -> list[int]:
        """Take free device blocks; what is cached in them moves to the host first."""
        if self.host is not None and self._prefix_caching:
            for block in self.device.next_free(count):
                self._offload(block)
        return self.device.allocate(count)

    def _offload(self, block: int) -> None:
        assert self.host is not None
        key = self.device.index.key_of(block)
        if key is None or self.host.index.find(key) is not None or self.host.num_free == 0:
            return
        (target,) = self.host.allocate(1)
        self.host.index.add(key, target)
        self._out.append((block, target))
        self._held.append(target)

    def _hold(self, blocks: list[int]) -> None:
        if self.host is not None:
            self.host.share(blocks)
            self._held.extend(blocks)


def _is_own(budget: KVBudget) -> TypeGuard[Window]:
    """Whether it is the model's own window."""
    return isinstance(budget, Window) and budget.own


def _due(sequence: Sequence) -> Selection | None:
    """Its budget, if that is a selection which its policy has to make before the next token."""
    budget = sequence.request.kv_budget
    if isinstance(budget, Selection) and budget.is_due(sequence.num_slots, sequence.prompt_left):
        return budget
    return None
