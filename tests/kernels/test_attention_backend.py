"""Who computes attention: the device decides, unless somebody is named."""

import subprocess
import sys

import pytest
import torch

from kernels import ops
from kernels.counted import Counted
from kernels.reference.paged_attention import paged_attention
from tests.kernels.attention_cases import make_case


def test_torch_is_the_reference_on_every_device() -> None:
    case = make_case([(1, 40), (20, 70)])
    named = ops.paged_attention(*case.arguments(), backend="torch")
    assert torch.equal(named, paged_attention(*case.arguments()))


def test_triton_is_for_cuda_devices() -> None:
    case = make_case([(1, 40)])
    with pytest.raises(ValueError, match="CUDA device, not on cpu"):
        ops.paged_attention(*case.arguments(), backend="triton")
    mass, one = torch.zeros(case.key_cache.shape[:3]), torch.zeros(1, dtype=torch.int32)
    first = case.q, case.key_cache, case.block_tables, case.query_start, case.seq_lens, case.scale
    with pytest.raises(ValueError, match="CUDA device, not on cpu"):
        ops.attention_mass(*first, mass, Counted(one, one), backend="triton")


def test_a_head_dimension_without_a_kernel_is_refused_where_triton_was_named() -> None:
    with pytest.raises(ValueError, match=r"no kernel for .* and 130 dimensions"):
        ops.paged_attention(*make_case([(1, 40)], dims=130).arguments(), backend="triton")


def test_importing_the_operations_imports_no_kernel_and_needs_no_triton() -> None:
    """Even where Triton is not installed, which `None` in its place looks like."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "from kernels import ops\n"
        "assert not any(name.startswith('kernels.triton') for name in sys.modules)\n"
        "assert ops._triton() is None"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False).stderr == ""
