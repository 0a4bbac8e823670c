"""SpAtten's pruning within attention: nothing pruned is plain attention, and each part leaves out what it says."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from kernels.kv_format import FORMATS
from kernels.pruning import Pruning
from kernels.reference.paged_attention import paged_attention
from kernels.reference.pruned_attention import pruned_attention
from tests.kernels.attention_cases import AttentionCase, make_case


def pruned(case: AttentionCase, pruning: Pruning, first_output: int = 0) -> Tensor:
    hidden = None if case.hidden is None else case.hidden[0]
    table, length = case.block_tables[0], int(case.seq_lens[0])
    return pruned_attention(
        case.q,
        case.key_cache,
        case.value_cache,
        table,
        length,
        case.scale,
        hidden,
        pruning,
        first_output,
        case.kv_format,
    )


@pytest.mark.parametrize("hidden", [None, [[0, 7]], [[25, 2**30]]])
def test_with_nothing_pruned_it_is_plain_attention(hidden: list[list[int]] | None) -> None:
    case = make_case([(20, 45)], hidden=hidden)
    torch.testing.assert_close(pruned(case, Pruning()), paged_attention(*case.arguments()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["int8", "int4", "fp8"])
def test_a_cache_in_a_format_is_read_as_what_it_decodes_to(name: str) -> None:
    pruning, kv_format = Pruning(0.3, 4, 4, 0.2), FORMATS[name]
    case = make_case([(5, 40)])
    rows = [kv_format.encode(cache) for cache in (case.key_cache, case.value_cache)]
    decoded = replace(case, key_cache=kv_format.decode(rows[0]), value_cache=kv_format.decode(rows[1]))
    stored = replace(case, key_cache=rows[0], value_cache=rows[1], kv_format=kv_format)
    torch.testing.assert_close(pruned(stored, pruning, 2), pruned(decoded, pruning, 2))


def test_a_share_of_the_values_is_left_out_and_the_others_weigh_what_they_did() -> None:
    """With values of 1 the output is what is left of the probabilities: it shrinks, by the smallest first."""
    case = make_case([(1, 40)], kv_heads=1, group=2)
    case.value_cache[~case.value_cache.isnan()] = 1.0
    left = [pruned(case, Pruning(values=share))[0, :, 0] for share in (0.0, 0.25, 0.5, 0.75, 0.97)]
    torch.testing.assert_close(left[0], torch.ones(2), rtol=1e-5, atol=1e-5)
    lost = [(before - after).min() for before, after in pairwise(left)]
    assert 0 < lost[0] < lost[1] < lost[2]
    keys = torch.stack([case.key_cache[case.block_tables[0, j // 16], 0, j % 16] for j in range(40)])
    largest = (case.q[0] @ keys.T * case.scale).softmax(-1).topk(2).values.sum(-1)  # 3% of 40, rounded up
    torch.testing.assert_close(left[-1], largest, rtol=1e-5, atol=1e-5)


def test_a_row_is_refined_only_where_it_is_flat() -> None:
    case = make_case([(30, 60)])
    high, full, mixed = (pruned(case, Pruning(0.0, 3, 5, threshold)) for threshold in (0.0, 1.1, 0.25))
    torch.testing.assert_close(pruned(case, Pruning(0.0, 8, 0, 0.0)), full)
    as_high, as_full = ((mixed == one).all(-1) for one in (high, full))
    assert (as_high | as_full).all()
    assert 0 < as_full.sum() < as_full.numel()


def test_more_rows_are_refined_the_higher_the_threshold() -> None:
    case = make_case([(30, 60)])
    full = pruned(case, Pruning(0.0, 3, 5, 2.0))
    refined = [
        int((pruned(case, Pruning(0.0, 3, 5, threshold)) == full).all(-1).sum()) for threshold in (0.0, 0.2, 0.3, 1.1)
    ]
    assert refined == sorted(refined)
    assert refined[0] < refined[1] < refined[-1]


def test_the_prompts_queries_are_exact() -> None:
    case = make_case([(12, 40)])
    plain, some = paged_attention(*case.arguments()), pruned(case, Pruning(0.0, 3, 0, 0.0), first_output=9)
    torch.testing.assert_close(some[:9], plain[:9], rtol=1e-5, atol=1e-5)
    assert ((some[9:] - plain[9:]).abs().amax(-1) > 1e-3).all()
