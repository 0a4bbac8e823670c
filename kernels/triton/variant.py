"""A kernel launch as data, so that what is launched is what was compiled ahead of time and held to account.

An operation plans its launches from its tensors' shapes, dtypes and addresses alone, never from what they hold. So the
same function that plans a launch for tensors on a GPU plans it for tensors on torch's `meta` device, which is how every
variant that can be launched is listed on a machine that has no GPU (`kernels/triton/registry.py`).
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

Constant = int | bool | str | None
Value = Tensor | int | float | None

_POINTERS: Final = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int16: "*i16",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.bool: "*i1",
    torch.float8_e4m3fn: "*fp8e4nv",
}


@dataclass(frozen=True, slots=True)
class Variant:
    """All that Triton compiles a kernel from, besides its source and the GPU's architecture."""

    kernel: str
    """The file in `kernels/triton`, and the function in it: `paged_attention.attend`."""
    arguments: tuple[tuple[str, str], ...]
    """The type of each argument that is not a constant, as Triton writes it; `:16` behind it says that the address or
    number is a multiple of 16."""
    constants: tuple[tuple[str, Constant], ...]
    num_warps: int
    num_stages: int
    tensor_cores: bool
    """Whether its compiled code must multiply matrices on tensor cores."""

    @property
    def options(self) -> dict[str, int | bool]:
        """What Triton calls options. A product and a sum may be one instruction, whatever a version's default."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


@dataclass(frozen=True, slots=True)
class Launch:
    """A variant, how many programs of it, and what they work on."""

    variant: Variant
    grid: tuple[int, int, int]
    values: Mapping[str, Value]

    @property
    def function(self) -> str:
        """The kernel's name within its file."""
        return self.variant.kernel.partition(".")[2]

    def run(self, kernel: Any) -> None:
        """Launch ``kernel``, the function that the variant names, on the current stream."""
        kernel[self.grid](**self.values, **dict(self.variant.constants), **self.variant.options)


def plan_launch(
    kernel: str,
    grid: tuple[int, int, int],
    values: Mapping[str, Value],
    constants: Mapping[str, Constant],
    *,
    counts: Collection[str],
    num_warps: int,
    num_stages: int,
    tensor_cores: bool = True,
) -> Launch:
    """A launch of the variant that Triton makes of these values: an argument that is None becomes a constant.

    ``counts`` are the integers that vary from launch to launch, which the kernel must list in ``do_not_specialize``.
    Raises ValueError for another integer that is no multiple of 16: it would be one variant more at run time.
    """
    arguments = tuple((name, _type(name, value, counts)) for name, value in values.items() if value is not None)
    missing = {name: None for name, value in values.items() if value is None}
    given = {name: value for name, value in values.items() if value is not None}
    variant = Variant(kernel, arguments, tuple({**missing, **constants}.items()), num_warps, num_stages, tensor_cores)
    return Launch(variant, grid, given)


def _type(name: str, value: Value, counts: Collection[str]) -> str:
    if isinstance(value, Tensor):
        return _POINTERS[value.dtype] + (":16" if value.data_ptr() % 16 == 0 else "")
    if isinstance(value, float):
        return "fp32"
    if name in counts:
        return "i32"
    if not isinstance(value, int) or value % 16:
        raise ValueError(f"{name} = {value} is neither a count nor a multiple of 16")
    return "i32:16"
