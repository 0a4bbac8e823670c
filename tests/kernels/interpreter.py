"""Triton's interpreter in a process of its own, since importing a kernel decides between it and the compiler.

    interpreter.call("kernels.triton.paged_attention", "paged_attention", q, …, gpu=H200)

runs a function there on copies of its tensors, and brings back what it returned and what it wrote. Each
tensor is copied to the end of its own memory pages, in which all else is poison, and behind which is a page that may
not be touched. So a kernel that reads past a tensor shows NaN or dies, one that writes before it is caught, and what a
kernel does not write is NaN: `torch.empty` is replaced by memory of the same kind.
"""

import ctypes
import math
import mmap
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

PAGE = mmap.PAGESIZE


class Interpreter:
    """The process, as seen from tests. Calls raise what the function raised."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.kernels.interpreter"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parent.parent.parent,
            env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        )

    def call(self, module: str, function: str, *args: Any, **kwargs: Any) -> Any:
        """What the function returns. Tensors that it was given are changed as it changed them."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        pickle.dump((module, function, args, kwargs), process.stdin)
        process.stdin.flush()
        try:
            raised, returned, written = pickle.load(process.stdout)
        except EOFError:
            code = process.wait()
            name = signal.Signals(-code).name if code < 0 else f"code {code}"
            raise AssertionError(f"{function} ended the interpreter with {name}: it left its tensors") from None
        if raised is not None:
            raise raised
        for ours, theirs in zip(_tensors((args, kwargs)), written, strict=True):
            ours.copy_(theirs)
        return returned

    def close(self) -> None:
        self._process.communicate()


@dataclass
class Guards:
    """The memory of one call."""

    _pages: list[tuple[mmap.mmap, int, int]] = field(default_factory=list)

    def copy(self, x: Tensor) -> Tensor:
        """The same values and strides, in guarded memory. What a strided view leaves out is poison, too."""
        extent = (
            1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
        )
        room = self.empty(extent, dtype=x.dtype)
        view = room.as_strided(x.shape, x.stride())
        view.copy_(x)
        return view

    def empty(self, *shape: Any, dtype: torch.dtype | None = None, device: Any = None) -> Tensor:
        """As torch.empty, full of poison."""
        size = math.prod(torch.Size(shape[0] if isinstance(shape[0], (tuple, torch.Size)) else shape))
        shape = torch.Size(shape[0] if isinstance(shape[0], (tuple, torch.Size)) else shape)
        dtype = dtype or torch.get_default_dtype()
        used = size * dtype.itemsize
        begin = -(-used // PAGE) * PAGE - used  # of the tensor, so that it ends with the page
        begin, before = begin + PAGE, begin + PAGE
        pages = mmap.mmap(-1, begin + used + PAGE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(pages))
        np.frombuffer(pages, np.uint8)[:] = 0xFF  # NaN in every float, and -1
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mprotect(ctypes.c_void_p(address + begin + used), PAGE, 0):
            raise OSError(ctypes.get_errno(), "mprotect")
        self._pages.append((pages, before, address))
        if not size:
            return torch.frombuffer(pages, dtype=torch.uint8, count=1).view(torch.uint8)[:0].view(dtype).view(shape)
        return torch.frombuffer(pages, dtype=dtype, count=size, offset=begin).view(shape)

    def check(self) -> None:
        """Raises AssertionError if anything was written before a tensor."""
        for pages, before, _ in self._pages:
            assert (np.frombuffer(pages, np.uint8, before) == 0xFF).all(), "a kernel wrote before a tensor"


@contextmanager
def guarded() -> Iterator[Guards]:
    """While this lasts, torch.empty gives guarded memory."""
    guards, torch_empty = Guards(), torch.empty
    torch.empty = guards.empty  # type: ignore[assignment]
    try:
        yield guards
    finally:
        torch.empty = torch_empty
    guards.check()


def mend_bfloat16() -> None:
    """The interpreter multiplies matrices of bfloat16 as if their bits were integers, and rounds to it toward zero.

    So that kernels' numbers are those of a GPU, widen such matrices first, and round to nearest.
    """
    from triton.language import bfloat16, float32
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    create_dot, cast_impl = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def rounding_cast(self: Any, x: Any, dtype: Any) -> Any:
        if x.dtype.scalar != float32 or dtype.scalar != bfloat16:
            return cast_impl(self, x, dtype)
        rounded = torch.from_numpy(np.ascontiguousarray(x.data)).to(torch.bfloat16)
        return TensorHandle(rounded.view(torch.uint16).numpy(), bfloat16)

    def create_wide_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        wide = [self.cast_impl(x, float32) if x.dtype.scalar == bfloat16 else x for x in (a, b)]
        return create_dot(self, *wide, *rest)

    InterpreterBuilder.create_dot = create_wide_dot
    InterpreterBuilder.cast_impl = rounding_cast


def check_variants() -> None:
    """Hold every launch to the variant that it says it is: what Triton would make of its arguments' types."""
    from kernels.triton.variant import Launch

    run = Launch.run

    def checked_run(self: Launch, kernel: Any) -> None:
        assert kernel.__name__ == self.variant.kernel.partition(".")[2]
        given = {*self.values, *dict(self.variant.constants)}
        assert list(kernel.arg_names) == [name for name in kernel.arg_names if name in given]
        assert given == set(kernel.arg_names)
        run(self, kernel)

    Launch.run = checked_run  # type: ignore[method-assign]


def _serve(receive: Any, send: Any) -> None:
    """Answer calls until there are no more."""
    import importlib

    mend_bfloat16()
    check_variants()
    np.seterr(all="ignore")
    while True:
        try:
            module, function, args, kwargs = pickle.load(receive)
        except EOFError:
            return
        raised = returned = None
        written: list[Tensor] = []
        try:
            called: Callable[..., Any] = getattr(importlib.import_module(module), function)
            with guarded() as guards:
                args, kwargs = _each((args, kwargs), guards.copy)
                returned = called(*args, **kwargs)
            returned = _each(returned, torch.clone)
            written = [x.clone() for x in _tensors((args, kwargs))]
        except Exception as error:  # noqa: BLE001  # whatever it is, the test shall see it
            raised = error
        pickle.dump((raised, returned, written), send)
        send.flush()


def _each(x: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same structure with every tensor changed."""
    if isinstance(x, Tensor):
        return change(x)
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        return type(x)(*(_each(one, change) for one in x))
    if isinstance(x, (tuple, list)):
        return type(x)(_each(one, change) for one in x)
    if isinstance(x, dict):
        return {key: _each(one, change) for key, one in x.items()}
    return x


def _tensors(x: Any) -> list[Tensor]:
    """All tensors of a structure, in order."""
    found: list[Tensor] = []
    _each(x, lambda tensor: found.append(tensor) or tensor)  # type: ignore[func-returns-value]
    return found


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what kernels print is not an answer
    _serve(sys.stdin.buffer, answers)
