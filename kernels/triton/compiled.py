"""What compilers make of a kernel variant, on a machine that needs no GPU, and the table of it.

`bench/compile_kernels.py` fills the table. It is not checked in yet, since some variants still spill registers.
"""

import ast
import functools
import hashlib
import json
import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.triton.gpu import GPU
from kernels.triton.registry import kernel_of
from kernels.triton.variant import Variant

TABLE: Final = Path(__file__).with_name("compiled.json")

_COUNTED: Final = {
    "mma": r"\bmma\.sync",
    "wgmma": r"\bwgmma\.mma_async",
    "async_copies": r"\bcp\.async\.c[ag]\.",
}
"""Instructions by what they match in PTX."""


@dataclass(frozen=True, slots=True)
class Compiled:
    """One variant for one architecture."""

    digest: str
    """Of the variant and of all source that it is compiled from."""
    threads: int
    registers: int
    """Of each thread."""
    spills: int
    """Instructions that write a register to memory, or read it back, for want of registers."""
    shared: int
    """Bytes of a program."""
    mma: int
    wgmma: int
    async_copies: int
    """Instructions in the code, as it stands; loops run them many times."""

    def faults(self, variant: Variant) -> list[str]:
        """What no variant may do."""
        found = []
        if self.spills:
            found.append(f"spills registers: {self.spills} instructions")
        if variant.tensor_cores and not self.mma + self.wgmma:
            found.append("has no tensor-core instructions")
        return found

    def programs_per_multiprocessor(self, gpu: GPU) -> int:
        """How many run at once by registers, shared memory and threads (CUDA's occupancy rules, warps of 32)."""
        warps = self.threads // 32
        registers = -(-self.registers * 32 // 256) * 256 * warps  # given out to warps by the 256
        shared = {(8, 0): 164, (9, 0): 228}[gpu.capability] * 1024
        return min(65536 // registers, shared // (self.shared + 1024), 2048 // self.threads, 32)


def compile_variant(variant: Variant, gpu: GPU) -> Compiled:
    """Compile for a GPU that need not be there. Triton caches what it compiles wherever its cache is."""
    kernel, arguments = kernel_of(variant), dict(variant.arguments)
    types = {name: arguments[name].split(":")[0] if name in arguments else "constexpr" for name in kernel.arg_names}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(kernel.arg_names)
        if arguments.get(name, "").endswith(":16")
    }
    target = GPUTarget("cuda", gpu.capability[0] * 10 + gpu.capability[1], 32)
    source = ASTSource(kernel, types, dict(variant.constants), aligned)
    made = triton.compile(source, target=target, options=variant.options)
    registers, spills = _resources(made.asm["cubin"])
    counts = {name: len(re.findall(pattern, made.asm["ptx"])) for name, pattern in _COUNTED.items()}
    return Compiled(digest(variant), made.metadata.num_warps * 32, registers, spills, made.metadata.shared, **counts)


def digest(variant: Variant) -> str:
    """Changes when the variant does, or a jit function in its file or in a file that this imports."""
    file = variant.kernel.partition(".")[0]
    return hashlib.sha256(f"{variant}\n{_jit_source(file)}".encode()).hexdigest()[:16]


def read_table() -> tuple[str, dict[str, dict[str, Compiled]]]:
    """The version of Triton that made the table, and what it holds: by architecture, by the variant's name."""
    table = json.loads(TABLE.read_text())
    return table["triton"], {
        architecture: {name: Compiled(**row) for name, row in rows.items()}
        for architecture, rows in table["compiled"].items()
    }


def write_table(compiled: dict[str, dict[str, Compiled]]) -> None:
    """One line for each variant."""
    blocks = []
    for architecture, rows in compiled.items():
        lines = ",\n".join(f"      {json.dumps(name)}: {json.dumps(asdict(row))}" for name, row in rows.items())
        blocks.append(f'    "{architecture}": {{\n{lines}\n    }}')
    blocks_text = ",\n".join(blocks)
    TABLE.write_text(f'{{\n  "triton": "{triton.__version__}",\n  "compiled": {{\n{blocks_text}\n  }}\n}}\n')


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers of each thread, and instructions that spill them, as the tool says that comes with Triton.

    Stack is not what tells: some programs without a single spill have a little.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    match = re.search(r"REG:(\d+)", said)
    if match is None:
        raise ValueError(f"cuobjdump says nothing of registers: {said[:1000]}")
    return int(match[1]), len(re.findall(r"\b(?:STL|LDL)\b", said))


@functools.cache
def _jit_source(file: str) -> str:
    """The jit functions and constants of a file of `kernels/triton`, and of those that it imports; no docstrings."""
    tree = ast.parse(Path(__file__).with_name(f"{file}.py").read_text())
    parts = []
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("kernels.triton."):
            parts.append(_jit_source(node.module.removeprefix("kernels.triton.")))
        elif isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(one) for one in node.decorator_list):
            node.body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            parts.append(ast.unparse(node))
        elif isinstance(node, ast.Assign) and "constexpr" in ast.unparse(node.value):
            parts.append(ast.unparse(node))
    return "\n".join(parts)
