"""Ask pip-audit whether an installed package has a known vulnerability; `make audit`, and part of `make check`.

That needs a vulnerability service. Where none answers nothing is audited, and the last line says so: with
`--if-reachable`, as in `make check`, that is no failure. pip-audit itself succeeds where an index answers without
knowing of vulnerabilities, as mirrors do; so one package is asked about first.
"""

import importlib.metadata
import json
import subprocess
import sys
import tempfile
from typing import Any

_PROBE = "fastapi"
"""One of our dependencies, in every index."""


def ask(*arguments: str) -> list[dict[str, Any]]:
    """What pip-audit found for each package; nothing at all if it could not ask."""
    command = [sys.executable, "-m", "pip_audit", "--format", "json", "--progress-spinner", "off", "--timeout", "10"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
    try:
        found = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        return []
    assert isinstance(found, list)
    return found


def is_reachable() -> bool:
    """Whether a service knows of vulnerabilities, even if it is of none."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as requirements:
        requirements.write(f"{_PROBE}=={importlib.metadata.version(_PROBE)}\n")
        requirements.flush()
        found = ask("--no-deps", "--disable-pip", "--requirement", requirements.name)
    return any("vulns" in package for package in found)


def main(argv: list[str]) -> int:
    """Returns the exit code."""
    if not is_reachable():
        print("audit: no vulnerability service answers from here: nothing was audited")
        return 0 if "--if-reachable" in argv else 1
    found = ask("--local", "--skip-editable")
    audited = [package for package in found if "vulns" in package]
    for package in found:
        if package not in audited:
            print(f"audit: {package['name']}: not audited: {package['skip_reason']}")
    for package in audited:
        for one in package["vulns"]:
            fixed = ", ".join(one["fix_versions"]) or "no version yet"
            print(f"audit: {package['name']} {package['version']}: {one['id']}, fixed in {fixed}")
    vulnerable = sum(bool(package["vulns"]) for package in audited)
    print(f"audit: {len(audited)} packages, {vulnerable} of them with known vulnerabilities")
    return 1 if vulnerable or not audited else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
