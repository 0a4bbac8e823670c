"""Packages that only measuring needs, and that a server is installed without."""

import importlib.util

from engine.errors import ConfigError


def require(*packages: str) -> None:
    """Check that packages are installed, without importing them. Raises ConfigError, naming the first that is not."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise ConfigError(f"this needs {package}: pip install 'octavo[bench]'")
