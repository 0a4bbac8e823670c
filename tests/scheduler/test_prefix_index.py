"""The prefix index: keys cover the whole past, and a salt keeps tenants apart."""

from array import array

from scheduler.prefix_index import PrefixIndex, block_key, root_key


def _keys(*blocks: list[int], salt: str | None = None, adapter: str | None = None) -> list[bytes]:
    keys, parent = [], root_key(salt, adapter)
    for block in blocks:
        parent = block_key(parent, array("i", block))
        keys.append(parent)
    return keys


def test_equal_pasts_have_equal_keys() -> None:
    assert _keys([1, 2], [3, 4]) == _keys([1, 2], [3, 4])


def test_a_block_with_another_past_has_another_key() -> None:
    assert _keys([1, 2], [3, 4])[1] != _keys([1, 9], [3, 4])[1]


def test_tokens_do_not_run_together_across_their_boundaries() -> None:
    assert _keys([1, 23]) != _keys([12, 3])


def test_a_salt_and_an_adapter_change_every_key_of_the_chain() -> None:
    plain, salted, adapted = _keys([1], [2]), _keys([1], [2], salt="x"), _keys([1], [2], adapter="x")
    assert len({*plain, *salted, *adapted}) == 6


def test_the_first_holder_of_a_key_stays() -> None:
    index = PrefixIndex()
    index.add(b"k", 1)
    index.add(b"k", 2)
    assert index.find(b"k") == 1
    index.forget(2)
    assert index.find(b"k") == 1
    index.forget(1)
    assert (index.find(b"k"), len(index)) == (None, 0)
