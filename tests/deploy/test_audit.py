"""What `make audit` makes of pip-audit's answers."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SOUND = {"name": "sound", "version": "1", "vulns": []}
HURT = {"name": "hurt", "version": "2", "vulns": [{"id": "CVE-1", "fix_versions": ["3"]}]}
SKIPPED = {"name": "own", "skip_reason": "not in the index"}


@pytest.fixture
def audit() -> ModuleType:
    spec = importlib.util.spec_from_file_location("audit", Path(__file__).parents[2] / ".ci" / "audit.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("probed", "found", "code", "line"),
    [
        ([SOUND], [SOUND, SKIPPED], 0, "audit: 1 packages, 0 of them with known vulnerabilities"),
        ([SOUND], [SOUND, HURT], 1, "audit: 2 packages, 1 of them with known vulnerabilities"),
        ([HURT], [SOUND], 0, "audit: 1 packages, 0 of them with known vulnerabilities"),
        ([SOUND], [], 1, "audit: 0 packages, 0 of them with known vulnerabilities"),
        ([SKIPPED], [], 0, "audit: no vulnerability service answers from here: nothing was audited"),
        ([], [], 0, "audit: no vulnerability service answers from here: nothing was audited"),
    ],
)
def test_only_what_was_audited_can_pass(
    audit: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    probed: list[Any],
    found: list[Any],
    code: int,
    line: str,
) -> None:
    monkeypatch.setattr(audit, "ask", lambda *arguments: probed if "--requirement" in arguments else found)
    assert audit.main(["--if-reachable"]) == code
    assert capsys.readouterr().out.splitlines()[-1] == line


def test_asked_for_alone_it_fails_where_no_service_answers(audit: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "ask", lambda *_: [])
    assert audit.main([]) == 1


def test_a_vulnerable_package_is_named_with_its_cure(
    audit: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(audit, "ask", lambda *_: [HURT, SKIPPED])
    assert audit.main([]) == 1
    assert capsys.readouterr().out.splitlines()[:2] == [
        "audit: own: not audited: not in the index",
        "audit: hurt 2: CVE-1, fixed in 3",
    ]
