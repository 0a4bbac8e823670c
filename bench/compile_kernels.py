"""Compile every kernel variant for every architecture without a GPU, and keep what came out.

    python -m bench.compile_kernels              compile what changed since the table was made
    python -m bench.compile_kernels --all        compile everything
    python -m bench.compile_kernels --only d128  print what some variants compile to, and write nothing

It writes `kernels/triton/compiled.json`, and `docs/gpu-kernels-compiled.md` from that; fails if a variant spills
registers or lacks tensor-core instructions.
"""

import argparse
import re
import sys
import tempfile
from multiprocessing import get_context
from pathlib import Path
from typing import Final

import triton

from bench.progress import progress
from kernels.triton.compiled import TABLE, Compiled, compile_variant, digest, read_table, write_table
from kernels.triton.gpu import COMPILED_FOR, GPU
from kernels.triton.registry import declared_variants
from kernels.triton.variant import Variant

DOCUMENT: Final = Path(__file__).parent.parent / "docs" / "gpu-kernels-compiled.md"

COLUMNS: Final = "variant", "warps", "registers", "shared memory", "programs", "mma", "wgmma", "cp.async"

INTRODUCTION: Final = """\
# What the GPU kernels compile to

Made by `make kernels`: code compiled ahead of time, on a machine without a GPU, by the compilers in Triton {version}.
Nothing here was measured. What the kernels do, and what a variant's name says, is in [gpu-kernels.md](gpu-kernels.md).

`programs` is how many a multiprocessor has room for at once; `mma`, `wgmma` and `cp.async` count instructions in the
code. The check fails if a variant spills registers, or does not multiply on tensor cores where it must."""

Work = tuple[str, Variant, GPU]


def main(arguments: list[str] | None = None) -> int:
    """Returns the process's exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.compile_kernels", description=__doc__.split("\n")[0])
    parser.add_argument("--all", action="store_true", help="compile what the table has already, too")
    parser.add_argument("--only", metavar="REGEX", help="print the variants whose names match, and write nothing")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="processes (default: 2)")
    args = parser.parse_args(arguments)
    work = [(name, variant, gpu) for gpu in COMPILED_FOR for name, variant in declared_variants(gpu).items()]
    if args.only is not None:
        work = [one for one in work if re.search(args.only, one[0])]
    known = {} if args.all or args.only is not None else _known()
    found = {(gpu, name): known[digest(variant), gpu] for name, variant, gpu in work if (digest(variant), gpu) in known}
    found |= _compile_all([one for one in work if (one[2], one[0]) not in found], args.jobs)
    faults = [
        f"{gpu.architecture} {name}: {fault}"
        for name, variant, gpu in work
        for fault in found[gpu, name].faults(variant)
    ]
    if args.only is not None:
        for name, _, gpu in work:
            print(gpu.architecture, _row(name, found[gpu, name], gpu))
    else:
        compiled = {gpu.architecture: {n: found[g, n] for n, _, g in work if g is gpu} for gpu in COMPILED_FOR}
        write_table(compiled)
        DOCUMENT.write_text(document(compiled))
        print(f"{len(found)} variants are in {TABLE.name}")
    print(*faults, sep="\n", end="\n" if faults else "")
    return 1 if faults else 0


def document(compiled: dict[str, dict[str, Compiled]]) -> str:
    """The table for people to read."""
    lines = [INTRODUCTION.format(version=triton.__version__)]
    for gpu in COMPILED_FOR:
        lines += ["", f"## {gpu.architecture}", "", f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
        lines += [_row(name, row, gpu) for name, row in compiled[gpu.architecture].items()]
    return "\n".join(lines) + "\n"


def _row(name: str, row: Compiled, gpu: GPU) -> str:
    spilled = f", {row.spills} spills" if row.spills else ""
    numbers = (row.threads // 32, f"{row.registers}{spilled}", row.shared, row.programs_per_multiprocessor(gpu))
    counts = row.mma, row.wgmma, row.async_copies
    return f"| {name} | {' | '.join(map(str, numbers + counts))} |"


def _known() -> dict[tuple[str, GPU], Compiled]:
    """The table's rows, if this version of Triton made them."""
    if not TABLE.exists():
        return {}
    version, compiled = read_table()
    if version != triton.__version__:
        return {}
    return {(row.digest, gpu): row for gpu in COMPILED_FOR for row in compiled.get(gpu.architecture, {}).values()}


def _compile_all(work: list[Work], jobs: int) -> dict[tuple[GPU, str], Compiled]:
    """In processes of their own, as compilers hold Python's lock, with a cache that is thrown away."""
    found = {}
    with (
        tempfile.TemporaryDirectory() as cache,
        get_context("spawn").Pool(jobs, _begin, (cache,)) as pool,
        progress("compiling", len(work), "variant") as bar,
    ):
        for (name, _, gpu), row in zip(work, pool.imap(_compile, work), strict=True):
            found[gpu, name] = row
            bar.update()
    return found


def _begin(cache: str) -> None:
    triton.knobs.cache.dir = cache


def _compile(work: Work) -> Compiled:
    return compile_variant(work[1], work[2])


if __name__ == "__main__":
    sys.exit(main())
