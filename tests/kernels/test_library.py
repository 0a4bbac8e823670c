"""Building, loading and doing without the native library."""

import ctypes
import json
import logging
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from kernels import ops as public
from kernels.cpu import library
from kernels.cpu.native import NativeOps
from kernels.reference.silu_and_mul import silu_and_mul


def in_fresh_process(code: str) -> object:
    """What the code prints as JSON in a new interpreter."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_without_a_compiler_there_is_one_line_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "octavo.kernels"):
        assert library.open_library(tmp_path, compiler="no-such-compiler", prebuilt=tmp_path) is None
    assert len(caplog.records) == 1
    assert "falling back to torch" in caplog.text
    assert "no-such-compiler" in caplog.text


def test_a_compiler_that_fails_leaves_no_library_and_says_why(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "fatal: out of luck" >&2\nexit 1\n')
    compiler.chmod(0o755)
    cache = tmp_path / "cache"
    assert library.open_library(cache, compiler=str(compiler), prebuilt=tmp_path) is None
    assert [record.getMessage().endswith("fatal: out of luck") for record in caplog.records] == [True]
    assert list(cache.iterdir()) == []


def test_operations_work_without_the_native_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(public, "native", lambda: None)
    x, residual = torch.randn(3, 8), torch.randn(3, 8)
    expected = residual + x
    normed = public.rms_norm(x, torch.ones(8), 0.0, residual)
    torch.testing.assert_close(residual, expected)
    torch.testing.assert_close(normed.square().mean(-1), torch.ones(3))
    assert torch.equal(public.silu_and_mul(x), silu_and_mul(x))
    k, cache = torch.randn(2, 1, 8), torch.zeros(2, 1, 4, 8)
    public.kv_write(k, k, cache, cache, torch.tensor([0, 1]))
    public.rotary_embedding(k.clone(), k.clone(), torch.ones(2, 4), torch.zeros(2, 4))
    tables, starts, lengths = (torch.tensor(x, dtype=torch.int32) for x in ([[0]], [0, 2], [2]))
    out = public.paged_attention(k, cache, cache, tables, starts, lengths, 1.0)
    assert torch.equal(out[0], k[0])


def test_dtypes_that_native_code_does_not_know_go_to_the_reference() -> None:
    x = torch.randn(3, 8, dtype=torch.float16)
    assert torch.equal(public.silu_and_mul(x), silu_and_mul(x))


def test_a_library_is_built_once(ops: NativeOps, monkeypatch: pytest.MonkeyPatch) -> None:
    """It lies in the cache after the fixture; building again must not compile."""
    commands: list[list[str]] = []
    run = library._run
    monkeypatch.setattr(library, "_run", lambda command: (commands.append(command), run(command))[1])
    path = library.build(library.default_cache_dir())
    assert path.exists()
    assert [command[1:] for command in commands] == [["--version"]]


def test_native_code_runs_on_torch_s_threads(ops: NativeOps) -> None:
    """One OpenMP runtime in the process, and every calling thread follows torch.set_num_threads."""
    maps = Path("/proc/self/maps")
    if not maps.exists() or not any("libgomp" in line for line in maps.read_text().splitlines()):
        pytest.skip("torch does not use libgomp here")
    assert len({line.split()[-1] for line in maps.read_text().splitlines() if "omp.so" in line}) == 1
    openmp = ctypes.CDLL("libgomp.so.1")
    seen = []

    def worker() -> None:
        public.silu_and_mul(torch.zeros(1, 2))
        seen.append(openmp.omp_get_max_threads())

    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            thread = threading.Thread(target=worker)
            thread.start()
            thread.join()
    finally:
        torch.set_num_threads(before)
    assert seen == [1, 3]


def test_importing_the_operations_compiles_and_opens_nothing() -> None:
    code = """
import json, subprocess, ctypes
def refuse(*args, **kwargs): raise AssertionError("started a process or opened a library")
import torch
subprocess.Popen = ctypes.CDLL = refuse
from kernels import ops
from kernels.cpu import library
print(json.dumps(library._process.cache_info().currsize))
"""
    assert in_fresh_process(code) == 0


def test_transformers_neither_meets_nor_runs_our_namespace() -> None:
    """transformers probes for a package `kernels`: ours, a namespace package, has no version and runs no code."""
    code = """
import json, sys
import transformers
from transformers.utils import import_utils
probe = getattr(import_utils, "is_kernels_available", lambda: False)
print(json.dumps([bool(probe()), [name for name in sys.modules if name.startswith("kernels.")]]))
"""
    assert in_fresh_process(code) == [False, []]
    import kernels

    assert kernels.__file__ is None
