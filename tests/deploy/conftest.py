"""The server's own fixture, here too."""

from tests.server.conftest import start

__all__ = ["start"]
