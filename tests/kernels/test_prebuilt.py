"""Libraries compiled ahead: which one a CPU gets, and that it needs no compiler then."""

import logging
import shutil
from pathlib import Path

import pytest

from kernels.cpu import library
from kernels.cpu.levels import LEVELS, find, location
from kernels.cpu.native import NativeOps
from kernels.cpu.prebuilt import prebuild

HASWELL = "flags : fpu sse4_2 avx avx2 bmi1 bmi2 f16c fma abm movbe xsave"
SKYLAKE = f"{HASWELL} avx512f avx512bw avx512cd avx512dq avx512vl"
ICE_LAKE = f"{SKYLAKE} avx512_vnni"
ZEN4 = f"{ICE_LAKE} avx512_bf16"

COMPILER = """#!/bin/sh
echo "$@" >> {log}
while [ $# -gt 1 ]; do shift; [ "$last" = -o ] && echo lib > "$1"; last=$1; done
"""


@pytest.mark.parametrize(
    ("flags", "level"),
    [
        (ZEN4, "x86-64-v4-bf16"),
        (ICE_LAKE, "x86-64-v4-vnni"),
        (SKYLAKE, "x86-64-v4"),
        (HASWELL, "x86-64-v3"),
        (f"{HASWELL} avx512f avx512_bf16", "x86-64-v3"),
        ("flags : fpu sse4_2 avx", "x86-64"),
    ],
)
def test_a_cpu_gets_the_fastest_library_that_it_can_run(tmp_path: Path, flags: str, level: str) -> None:
    for one in LEVELS:
        location(tmp_path, one, "digest").touch()
    assert find(tmp_path, "digest", flags) == tmp_path / f"{level}-digest.so"


def test_a_library_of_other_sources_is_not_found(tmp_path: Path) -> None:
    for one in LEVELS:
        location(tmp_path, one, "before").touch()
    assert find(tmp_path, "after", ZEN4) is None
    assert find(tmp_path / "nowhere", "after", ZEN4) is None


def test_every_level_is_compiled_for_its_own_cpus(tmp_path: Path) -> None:
    log, compiler = tmp_path / "log", tmp_path / "c++"
    compiler.write_text(COMPILER.format(log=log))
    compiler.chmod(0o755)
    built = prebuild(tmp_path / "out", str(compiler))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(path.name for path in built)
    linked = [line for line in log.read_text().splitlines() if "-shared" in line]
    assert ["-mavx512bf16" in line for line in linked] == [True, False, False, False, False]
    marches = [line.partition("-march=")[2].split()[0] for line in linked]
    assert marches == ["x86-64-v4", "x86-64-v4", "x86-64-v4", "x86-64-v3", "x86-64"]


def test_what_was_built_ahead_needs_no_compiler(
    ops: NativeOps, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ahead = location(tmp_path, LEVELS[-1], library.sources_digest())
    shutil.copy(library.build(library.default_cache_dir()), ahead)
    monkeypatch.setattr(library, "cpu_flags", lambda: HASWELL)
    with caplog.at_level(logging.INFO, "octavo.kernels"):
        assert library.open_library(tmp_path / "cache", "no-such-compiler", prebuilt=tmp_path) is not None
    assert caplog.records == []
    assert not (tmp_path / "cache").exists()
