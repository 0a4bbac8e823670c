"""The native library as this CPU gets it, and as lesser ones would."""

import platform
import random
import shutil
from collections.abc import Callable, Iterator

import pytest
import torch

from kernels.cpu.library import default_cache_dir, native, open_library
from kernels.cpu.native import NativeOps
from tests.kernels.interpreter import Interpreter


def _builds() -> list[str]:
    """Targets for the compiler: AVX-512 or whatever this CPU has, AVX2, and SSE."""
    return ["native", "x86-64-v3", "x86-64"] if "AVX" in torch.backends.cpu.get_cpu_capability() else ["native"]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session", params=_builds())
def ops(request: pytest.FixtureRequest) -> NativeOps:
    """The native operations in each build that this machine can run."""
    if platform.machine() != "x86_64" and request.param != "native":
        pytest.skip("only x86 has these builds")
    if shutil.which("c++") is None:
        pytest.skip("no compiler")
    library = native() if request.param == "native" else open_library(default_cache_dir(), march=request.param)
    assert library is not None, "the compiler refused it: the log says why"
    return library


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    value: torch.dtype = request.param
    return value


@pytest.fixture(params=range(4))
def rng(request: pytest.FixtureRequest) -> random.Random:
    """Seeded choices of odd shapes, and torch seeded alike."""
    torch.manual_seed(request.param)
    return random.Random(request.param)


@pytest.fixture
def strided() -> Callable[[torch.Tensor], torch.Tensor]:
    """The same values as a slice of a wider tensor full of NaN, as a view into a fused projection is."""

    def view(x: torch.Tensor) -> torch.Tensor:
        wide = torch.full((*x.shape[:-2], x.shape[-2] + 3, x.shape[-1]), float("nan"), dtype=x.dtype)
        wide[..., 1 : 1 + x.shape[-2], :] = x
        return wide[..., 1 : 1 + x.shape[-2], :]

    return view


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Interpreter]:
    """Triton's interpreter, for kernels on a machine without a GPU."""
    process = Interpreter()
    yield process
    process.close()
