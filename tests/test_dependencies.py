"""Who may import whom (docs/adr/0001): server → engine → {scheduler, kernels}, read off every file's syntax tree."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = {"server", "engine", "scheduler", "kernels", "bench", "tests"}

MAY_IMPORT = {
    "scheduler": set(),
    "kernels": set(),
    "engine": {"scheduler", "kernels"},
    "server": {"engine"},
    "bench": {"server", "engine", "scheduler", "kernels"},
    "tests": ROOMS,
}
"""Rooms that a room may import, beside itself."""

THIRD_PARTY = {"scheduler": set(), "kernels": {"torch", "triton"}}
"""What a room may import from elsewhere than the standard library; rooms not named here may import anything."""

WEB = {"fastapi", "starlette", "uvicorn", "pydantic", "prometheus_client"}
"""Of the server alone: the engine runs without HTTP."""


def _files(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


def _imports(file: Path) -> Iterator[tuple[int, str]]:
    """(line, top-level package) of every import, wherever in the file it stands."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.partition(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno} imports relatively: rooms are import roots"
            yield node.lineno, (node.module or "").partition(".")[0]


def _breaches(room: str, file: Path) -> Iterator[str]:
    for line, package in _imports(file):
        where = f"{file.relative_to(ROOT)}:{line} imports {package}"
        if package in ROOMS:
            if package != room and package not in MAY_IMPORT[room]:
                yield where
        elif package not in sys.stdlib_module_names and (
            (room in THIRD_PARTY and package not in THIRD_PARTY[room]) or (room == "engine" and package in WEB)
        ):
            yield where


@pytest.mark.parametrize("room", sorted(MAY_IMPORT))
def test_a_room_imports_only_what_it_may(room: str) -> None:
    assert _files(room), f"{room} has no files"
    assert [breach for file in _files(room) for breach in _breaches(room, file)] == []


def test_the_check_sees_a_forbidden_import_inside_a_function(tmp_path: Path) -> None:
    file = tmp_path / "x.py"
    file.write_text("def f():\n    import torch\n    from engine.config import load\n")
    assert list(_imports(file)) == [(2, "torch"), (3, "engine")]


def test_kernels_is_a_namespace_so_that_it_shadows_no_other_package_of_that_name() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_only_the_configuration_reads_the_environment() -> None:
    readers = {
        str(file.relative_to(ROOT))
        for room in ("server", "engine", "scheduler", "kernels")
        for file in _files(room)
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv")
    }
    assert readers == {"engine/config.py"}


def test_no_module_keeps_mutable_state() -> None:
    """A `global` statement is how a module's state changes; there is none."""
    users = [
        str(file.relative_to(ROOT))
        for room in ("server", "engine", "scheduler", "kernels", "bench")
        for file in _files(room)
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Global)
    ]
    assert users == []
