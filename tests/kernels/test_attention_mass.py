"""Attention mass: the reference equals torch's softmax, native code equals the reference, and others' slots stay."""

import random

import pytest
import torch
from torch import Tensor

from kernels.counted import Counted
from kernels.cpu.native import NativeOps
from kernels.reference.attention_mass import attention_mass
from tests.kernels.attention_cases import AttentionCase, make_case, random_format


def counted(*pairs: tuple[int, int]) -> Counted:
    """Of each sequence: from which row on its queries count, and how many slots keep their mass."""
    first, kept = torch.tensor(pairs, dtype=torch.int32).unbind(1)
    return Counted(first.contiguous(), kept.contiguous())


def random_mass_case(rng: random.Random, dtype: torch.dtype) -> tuple[AttentionCase, Tensor, Counted]:
    """Sequences of odd lengths, the mass they had before (poison where nothing was), what each counts and sees."""
    lengths = []
    for _ in range(rng.randint(1, 4)):
        keys = rng.choice([1, 2, 15, 16, 17, 63, 64, 65, 130])
        lengths.append((rng.choice([0, 1, 1, min(keys, 3), keys]), keys))
    kv_heads = rng.choice([1, 2, 3])
    hidden = [[rng.choice([0, 0, 1, 16, 64, 200]) for _ in range(kv_heads)] for _ in lengths]
    case = make_case(
        lengths,
        kv_heads=kv_heads,
        group=rng.choice([1, 3, 8]),
        dims=rng.choice([16, 32, 80]),
        block_size=rng.choice([1, 8, 16, 128]),
        dtype=dtype,
        hidden=rng.choice([None, hidden]),
        kv_format=random_format(rng),
    )
    mass = torch.full(case.key_cache.shape[:3], torch.nan)
    for b, (queries, keys) in enumerate(lengths):
        for slot in range(keys - queries):
            mass[case.block_tables[b, slot // mass.shape[2]], :, slot % mass.shape[2]] = rng.random()
    pairs, end = [], 0
    for queries, keys in lengths:
        begin, end = end, end + queries
        pairs.append(
            rng.choice([(begin, keys - queries), (max(end - 1, begin), 0), (end, keys - queries), (begin, -1)])
        )
    return case, mass, counted(*pairs)


def arguments(case: AttentionCase) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, float]:
    return case.q, case.key_cache, case.block_tables, case.query_start, case.seq_lens, case.scale


def test_the_reference_sums_the_columns_of_a_causal_softmax() -> None:
    case = make_case([(5, 9)], kv_heads=2, group=3, dims=16)
    mass = torch.full(case.key_cache.shape[:3], torch.nan)
    table = case.block_tables[0]
    mass[table[0], :, :4] = 7.0
    attention_mass(*arguments(case), mass, counted((0, 4)))
    keys = torch.stack([case.key_cache[table[j // 16], :, j % 16] for j in range(9)], dim=1).double()
    scores = case.q.double().transpose(0, 1) @ keys.repeat_interleave(3, 0).mT * case.scale
    hidden = torch.arange(9) > torch.arange(4, 9)[:, None]
    expected = scores.masked_fill(hidden, -torch.inf).softmax(-1).sum(1).unflatten(0, (2, 3)).sum(1)
    expected[:, :4] += 7.0
    torch.testing.assert_close(mass[table[0], :, :9].double(), expected, rtol=1e-5, atol=1e-5)
    assert mass[table[0], :, 9:].isnan().all()


def test_where_the_last_query_counts_nothing_is_left_of_others(ops: NativeOps) -> None:
    case, last = make_case([(6, 30)]), counted((5, 0))
    mass = torch.full(case.key_cache.shape[:3], 9.0)
    ops.attention_mass(*arguments(case), mass, last)
    single = torch.zeros(case.key_cache.shape[:3])
    starts = torch.tensor([0, 1], dtype=torch.int32)
    one = (case.q[-1:], case.key_cache, case.block_tables, starts, case.seq_lens, case.scale)
    ops.attention_mass(*one, single, counted((0, 0)))
    seen = [(int(case.block_tables[0, j // 16]), j % 16) for j in range(30)]
    for block, offset in seen:
        torch.testing.assert_close(mass[block, :, offset], single[block, :, offset])
    total = sum(mass[block, :, offset] for block, offset in seen)
    torch.testing.assert_close(total, torch.tensor([3.0, 3.0]))


def test_native_equals_the_reference_on_odd_shapes(ops: NativeOps, dtype: torch.dtype, rng: random.Random) -> None:
    for _ in range(5):
        case, mass, counts = random_mass_case(rng, dtype)
        expected = mass.clone()
        attention_mass(*arguments(case.in_float32()), expected, counts, case.hidden)
        tolerance = 1e-4 if dtype == torch.float32 else 2e-2
        for op in (attention_mass, ops.attention_mass):
            actual = mass.clone()
            op(*arguments(case), actual, counts, case.hidden, case.kv_format)
            torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


def test_a_prompt_in_chunks_gathers_the_same_mass_as_a_whole_one(ops: NativeOps) -> None:
    whole = make_case([(40, 40)], dims=32)
    masses = []
    for sizes in ((40,), (1, 17, 22)):
        mass, end = torch.full(whole.key_cache.shape[:3], torch.nan), 0
        for size in sizes:
            begin, end = end, end + size
            lengths = torch.tensor([end], dtype=torch.int32)
            starts = torch.tensor([0, size], dtype=torch.int32)
            q = whole.q[begin:end]
            ops.attention_mass(
                q,
                whole.key_cache,
                whole.block_tables,
                starts,
                lengths,
                whole.scale,
                mass,
                counted((0, begin)),
            )
        masses.append(mass)
    torch.testing.assert_close(*masses, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_a_needed_block_that_does_not_exist_is_refused(ops: NativeOps) -> None:
    case = make_case([(1, 40)])
    case.block_tables[0, 1] = 2**31 - 7
    with pytest.raises(IndexError, match="block"):
        ops.attention_mass(*arguments(case), torch.zeros(case.key_cache.shape[:3]), counted((0, 0)))


def test_arguments_that_do_not_fit_each_other_are_refused(ops: NativeOps) -> None:
    case, counts = make_case([(1, 40)]), counted((0, 39))
    mass, long = torch.zeros(case.key_cache.shape[:3]), counts._replace(kept=counts.kept.long())
    for wrong_mass, wrong_counts in ((mass[1:], counts), (mass.double(), counts), (mass, long)):
        with pytest.raises(ValueError, match="attention_mass: "):
            ops.attention_mass(*arguments(case), wrong_mass, wrong_counts)
