"""Every kernel variant that Octavo launches, by a name that people can read.

An operation's file lists in `declared` the launches that it plans for the shapes that matter, on torch's `meta` device.
`bench/compile_kernels.py` compiles them. A new operation needs its file, and a line in `OPERATIONS`.
"""

import importlib
from typing import Any, Final

from kernels.triton.gpu import GPU
from kernels.triton.variant import Variant

OPERATIONS: Final = ("paged_attention", "attention_mass")
"""The files of `kernels/triton` that launch kernels."""


def declared_variants(gpu: GPU) -> dict[str, Variant]:
    """The variants for a GPU by name, each once, under the first of its names. Raises ValueError for a name twice."""
    names: dict[Variant, str] = {}
    variants: dict[str, Variant] = {}
    for operation in OPERATIONS:
        for name, launches in importlib.import_module(f"kernels.triton.{operation}").declared(gpu):
            for launch in launches:
                variant = launch.variant
                full = f"{variant.kernel}: {name}"
                if variants.get(full, variant) != variant:
                    raise ValueError(f"two variants are called {full}")
                if names.setdefault(variant, full) == full:
                    variants[full] = variant
    return variants


def kernel_of(variant: Variant) -> Any:
    """The function that Triton compiles."""
    file, _, function = variant.kernel.partition(".")
    return getattr(importlib.import_module(f"kernels.triton.{file}"), function)
