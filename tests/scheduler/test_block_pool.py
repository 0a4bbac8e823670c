"""The block pool: references, reuse in order of release, and what the prefix index still knows."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.block_pool import BlockPool, OutOfBlocksError


def test_a_new_pool_is_all_free() -> None:
    pool = BlockPool(4)
    assert (pool.num_free, pool.num_used) == (4, 0)
    pool.check([])


def test_a_pool_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one block"):
        BlockPool(0)


def test_more_blocks_than_are_free_are_refused_and_nothing_is_taken() -> None:
    pool = BlockPool(3)
    pool.allocate(2)
    with pytest.raises(OutOfBlocksError, match="2 blocks asked for, 1 free"):
        pool.allocate(2)
    assert pool.num_free == 1


def test_the_block_released_longest_ago_is_reused_first() -> None:
    pool = BlockPool(3)
    a, b, c = pool.allocate(3)
    for block in (b, a, c):
        pool.release([block])
    assert pool.allocate(3) == [b, a, c]


def test_what_was_never_used_goes_before_what_was_released() -> None:
    pool = BlockPool(4)
    pool.release(pool.allocate(2))
    assert pool.next_free(4) == [2, 3, 1, 0]
    assert [*pool.allocate(1), *pool.allocate(3)] == [2, 3, 1, 0]


def test_the_end_of_a_released_table_is_reused_before_its_beginning() -> None:
    pool = BlockPool(3)
    table = pool.allocate(3)
    pool.release(table)
    assert pool.allocate(3) == table[::-1]


def test_a_shared_block_is_free_only_when_its_last_holder_lets_go() -> None:
    pool = BlockPool(2)
    table = pool.allocate(1)
    pool.share(table)
    pool.release(table)
    assert (pool.num_free, pool.ref_count(table[0])) == (1, 1)
    pool.release(table)
    assert (pool.num_free, pool.ref_count(table[0])) == (2, 0)


def test_a_block_released_too_often_is_an_error() -> None:
    pool = BlockPool(1)
    table = pool.allocate(1)
    pool.release(table)
    with pytest.raises(ValueError, match="released more often"):
        pool.release(table)


def test_a_free_block_is_known_until_it_is_handed_out_again() -> None:
    pool = BlockPool(2)
    (block,) = pool.allocate(1)
    pool.index.add(b"key", block)
    pool.release([block])
    assert pool.index.find(b"key") == block
    pool.allocate(2)
    assert pool.index.find(b"key") is None


def test_sharing_a_free_block_takes_it_off_the_free_list() -> None:
    pool = BlockPool(2)
    (block,) = pool.allocate(1)
    pool.release([block])
    pool.share([block])
    assert pool.num_used == 1
    assert block not in pool.allocate(1)


@given(st.lists(st.tuples(st.sampled_from(["take", "share", "drop"]), st.integers(0, 5)), max_size=60))
def test_free_and_used_blocks_add_up_after_any_history(history: list[tuple[str, int]]) -> None:
    pool = BlockPool(12)
    tables: list[list[int]] = []
    for action, number in history:
        if action == "take" and number <= pool.num_free:
            tables.append(pool.allocate(number))
        elif action == "share" and tables:
            pool.share(table := list(tables[number % len(tables)]))
            tables.append(table)
        elif action == "drop" and tables:
            pool.release(tables.pop(number % len(tables)))
        pool.check(tables)
