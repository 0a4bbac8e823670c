"""A KV memory that remembers, per slot, which past was written there: an oracle for sharing, copying and swapping."""

from collections.abc import Sequence as Seq

from scheduler.batch import Move, ScheduledBatch
from scheduler.request import Sequence

Content = tuple[int, ...]
"""All tokens up to and including the one whose KV the slot holds: KV depends on nothing else."""
Blocks = list[list[Content | None]]


class RecordingMemory:
    """Executes scheduled batches the way the engine does: transfers, then all writes, then all reads."""

    def __init__(self, num_blocks: int, block_size: int, num_host_blocks: int = 0) -> None:
        self.block_size = block_size
        self._slots: Blocks = [[None] * block_size for _ in range(num_blocks)]
        self._host: Blocks = [[None] * block_size for _ in range(num_host_blocks)]

    def execute(self, batch: ScheduledBatch) -> None:
        """Write what the batch computes and assert that every sequence then reads its own past, and nothing else."""
        self._move(self._slots, self._host, batch.transfers.out)
        self._move(self._slots, self._slots, batch.transfers.copies)
        self._move(self._host, self._slots, batch.transfers.back)
        written: set[tuple[int, int]] = set()
        for item in batch.items:
            past = tuple(item.sequence.tokens)
            for position in range(item.start, item.start + len(item.tokens)):
                assert item.tokens[position - item.start] == past[position]
                block, offset = item.block_table[position // self.block_size], position % self.block_size
                assert (block, offset) not in written, "two sequences write the same slot in one step"
                written.add((block, offset))
                self._slots[block][offset] = past[: position + 1]
        for item in batch.items:
            past = tuple(item.sequence.tokens)
            for position in range(item.start + len(item.tokens)):
                block, offset = item.block_table[position // self.block_size], position % self.block_size
                assert self._slots[block][offset] == past[: position + 1], "a sequence reads KV that is not its own"

    def _move(self, origin: Blocks, target: Blocks, moves: Seq[Move]) -> None:
        contents = [list(origin[source]) for source, _ in moves]
        assert len({destination for _, destination in moves}) == len(moves), "two blocks move to one place"
        for (_, destination), content in zip(moves, contents, strict=True):
            target[destination] = content


def sample(sequence: Sequence, count: int, vocabulary: int = 50) -> list[int]:
    """Deterministic next tokens, a function of the past and the continuation alone, as a seeded sampler's are."""
    state = 17
    for token in sequence.tokens:
        state = (state * 31 + token + 1) % 1_000_003
    return [(state + 7 * (sequence.index + i)) % vocabulary for i in range(count)]


def step_tokens(batch: ScheduledBatch) -> list[list[int]]:
    """What the sampler returns for each item of the batch."""
    return [sample(item.sequence, item.num_samples) for item in batch.items]
