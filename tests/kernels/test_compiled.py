"""Kernels on a machine without a GPU: what every variant compiles to is on record, and nothing of it is out of date.

`make kernels` compiles them all; here only a sample is, one variant of each kernel for each architecture.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import triton

from kernels.triton import compiled, paged_attention
from kernels.triton.attention_shapes import HEADS, counts
from kernels.triton.compiled import Compiled, compile_variant, digest, read_table
from kernels.triton.gpu import COMPILED_FOR, GPU, H200
from kernels.triton.launch_table import launch_parameters
from kernels.triton.registry import declared_variants
from kernels.triton.variant import plan_launch

EVERY_GPU = pytest.mark.parametrize("gpu", COMPILED_FOR, ids=lambda gpu: gpu.architecture)

SAMPLE = (
    "paged_attention.attend: decode split d64 bf16 page16",
    "paged_attention.attend: prefill d64 bf16 page16",
    "paged_attention.merge: decode split d64 bf16 page16",
    "attention_mass.sum_rows: decode split d64 bf16 page16",
    "attention_mass.merge_tops: decode split d64 bf16 page16",
    "attention_mass.sum_columns: decode d64 bf16 page16",
)


@EVERY_GPU
def test_the_table_has_every_variant_as_it_is_now_and_none_with_a_fault(gpu: GPU) -> None:
    """Otherwise `make kernels` has work to do, or a kernel spills registers, or misses tensor cores."""
    rows, variants = read_table()[1][gpu.architecture], declared_variants(gpu)
    assert list(rows) == list(variants)
    assert [name for name, variant in variants.items() if rows[name].digest != digest(variant)] == []
    assert {name: rows[name].faults(variant) for name, variant in variants.items() if rows[name].faults(variant)} == {}


@EVERY_GPU
@pytest.mark.parametrize("name", SAMPLE)
def test_a_sample_compiles_to_what_the_table_says(name: str, gpu: GPU, tmp_path: Path) -> None:
    """To the last register with the compiler that made the table; with another one only without a fault."""
    version, table = read_table()
    variant = declared_variants(gpu)[name]
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path)
        found = compile_variant(variant, gpu)
    assert found.faults(variant) == []
    if version == triton.__version__:
        assert found == table[gpu.architecture][name]


def test_the_sample_has_every_kernel() -> None:
    kernels = {variant.kernel for variant in declared_variants(H200).values()}
    assert kernels == {name.partition(":")[0] for name in SAMPLE}


def test_prefill_for_hopper_multiplies_by_whole_warpgroups() -> None:
    rows = read_table()[1]["sm_90"]
    prefill = [
        row for name, row in rows.items() if name.startswith("paged_attention.attend: prefill") and "fp32" not in name
    ]
    assert prefill
    assert all(row.wgmma for row in prefill)


@EVERY_GPU
def test_whatever_a_model_launches_was_declared(gpu: GPU) -> None:
    declared = set(declared_variants(gpu).values())
    for dims, (heads, kv_heads) in HEADS.items():
        cache = torch.empty((4096, kv_heads, 16, dims), dtype=torch.bfloat16, device="meta")
        for tokens, sequences in ((1, 1), (7, 8), (128, 128), (9, 8), (64, 8), (65, 8), (2048, 1), (8192, 256)):
            q = torch.empty((tokens, heads, dims), dtype=torch.bfloat16, device="meta")
            batch = counts(sequences, 40), counts(sequences + 1), counts(sequences)
            _, launches = paged_attention.plan(q, cache, cache, *batch, 0.1, None, None, None, None, gpu)
            assert {launch.variant for launch in launches} <= declared


def test_spills_and_missing_tensor_cores_are_faults() -> None:
    variant = declared_variants(H200)[SAMPLE[0]]
    fine = Compiled("", threads=128, registers=64, spills=0, shared=1024, mma=2, wgmma=0, async_copies=0)
    assert fine.faults(variant) == []
    assert fine.faults(replace(variant, tensor_cores=False)) == []
    assert replace(fine, spills=3).faults(variant) == ["spills registers: 3 instructions"]
    assert replace(fine, mma=0).faults(variant) == ["has no tensor-core instructions"]
    assert replace(fine, mma=0).faults(replace(variant, tensor_cores=False)) == []


def test_a_variant_is_out_of_date_when_a_function_that_it_calls_has_changed() -> None:
    source = compiled._jit_source("paged_attention")
    assert "def fold_scores(" in source
    assert "def plan(" not in source
    variant = declared_variants(H200)[SAMPLE[0]]
    assert digest(variant) != digest(replace(variant, num_warps=8))


@pytest.mark.parametrize(
    ("registers", "shared", "programs"), [(64, 1024, 8), (255, 1024, 2), (32, 100 * 1024, 2), (16, 0, 16)]
)
def test_programs_share_a_multiprocessor_by_registers_memory_and_threads(
    registers: int, shared: int, programs: int
) -> None:
    row = Compiled("", threads=128, registers=registers, spills=0, shared=shared, mma=0, wgmma=0, async_copies=0)
    assert row.programs_per_multiprocessor(H200) == programs


def test_a_gpu_takes_launch_parameters_of_the_newest_one_that_is_not_newer() -> None:
    bucket = "prefill plain d128"
    assert launch_parameters("attention rows", GPU((8, 9), 1), bucket) == launch_parameters(
        "attention rows", GPU((8, 0), 1), bucket
    )
    assert launch_parameters("attention rows", GPU((10, 0), 1), bucket) == launch_parameters(
        "attention rows", H200, bucket
    )
    with pytest.raises(ValueError, match="has no attention rows for compute capability"):
        launch_parameters("attention rows", GPU((7, 5), 1), bucket)


def test_an_integer_that_is_neither_a_count_nor_aligned_makes_no_variant() -> None:
    with pytest.raises(ValueError, match="stride = 24"):
        plan_launch("a.b", (1, 1, 1), {"stride": 24}, {}, counts=("n",), num_warps=4, num_stages=1)
