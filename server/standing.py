"""Where a request stands among others: its priority, whose it is, and how long it may take."""

import hashlib
import secrets
import time
from dataclasses import dataclass

from starlette.types import Scope

from engine.errors import InvalidRequestError
from server.auth import presented_key
from server.body import QueuedBody
from server.config import ServerConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """What orders a request; see `AsyncEngine.submit`."""

    priority: int = 0
    tenant: str = ""
    deadline: float | None = None
    """On the monotonic clock, in seconds."""

    @property
    def timeout(self) -> float | None:
        """The seconds that are left; 0 when there are none."""
        return None if self.deadline is None else max(self.deadline - time.monotonic(), 0.0)


class Tenants:
    """Names those who share the engine, by what a request shows of them.

    A name is a digest that means something in this process only, so that neither a key nor a user's name is ever
    found in a log or a dump; and keys are told apart from users of the same text.
    """

    def __init__(self, config: ServerConfig) -> None:
        several = len(set(config.api_key)) > 1
        self._by_key = config.tenant == "api-key" or (config.tenant == "auto" and several)
        self._secret = secrets.token_bytes(32)

    def name(self, scope: Scope, user: str | None) -> str:
        """Whose a request is; all that show nothing are one tenant."""
        shown = presented_key(scope) if self._by_key else (user or "").encode()
        if not shown:
            return ""
        kind = b"key" if self._by_key else b"user"
        return hashlib.blake2b(shown, key=self._secret, person=kind, digest_size=16).hexdigest()


def standing_of(body: QueuedBody, tenant: str, *, scheduling: str, arrival: float) -> Standing:
    """Where a request stands that came at ``arrival``, on the monotonic clock.

    Raises:
        InvalidRequestError: it has a priority, which the order of service, ``scheduling``, does not know.
    """
    if body.priority and scheduling == "fcfs":
        raise InvalidRequestError(
            "priority: requests are served first come, first served here; the server knows priorities when it is "
            "started with --scheduling priority, or fair",
            param="priority",
        )
    return Standing(
        priority=body.priority or 0,
        tenant=tenant,
        deadline=None if body.timeout is None else arrival + body.timeout,
    )
