"""Triton's interpreter in a process of its own: the choice between it and the compiler is made when kernels are imported.

    interpreter.call("paged_attention", "paged_attention", q, …, gpu=H200)

runs a function of `kernels/triton` on copies of its tensors, and brings back what it returned and what it wrote. Each
tensor is copied to the end of its own memory pages, in which all else is poison, and behind which is a page that may not
be touched. So a kernel that reads past a tensor shows NaN or dies, one that writes before it is caught, and what a kernel
does not write is NaN: `torch.empty` is replaced by memory of the same kind.
"""

import ctypes
import math
import mmap
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass, replace
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

    def call(self, file: str, function: str, *args: Any, **kwargs: Any) -> Any:
        """What the function returns. Tensors that it was given are changed as it changed them."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        pickle.dump((file, function, args, kwargs), process.stdin)
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
            if not torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8)):
                ours.copy_(theirs)
        return returned

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


@dataclass
class Guards:
    """The memory of one call."""

    _pages: list[tuple[mmap.mmap, int, int]] = field(default_factory=list)

    def copy(self, x: Tensor) -> Tensor:
        """The same values and strides, in guarded memory. What a strided view leaves out is poison, too."""
        extent = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
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
