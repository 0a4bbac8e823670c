"""The errors that the engine raises on purpose. Each message is one clear line, fit to show to a user."""


class OctavoError(Exception):
    """Base of every error whose message is meant for the user: shown as it is, without a traceback."""


class ConfigError(OctavoError):
    """A flag, variable or file key has a value that cannot work."""


class CheckpointError(OctavoError):
    """A model's files are missing, truncated, mis-shaped, of an unknown architecture, or ask for remote code."""


class InvalidRequestError(OctavoError):
    """A request that can never be served as asked: HTTP 400.

    ``param`` names the request's field at fault; ``code`` is OpenAI's machine-readable reason, where it has one.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class EngineDeadError(OctavoError):
    """The engine's loop has failed: nothing can be served any more (HTTP 500, and `/health` fails)."""


class NumericalError(OctavoError):
    """The model gave no numbers for this request (HTTP 500); others are served on."""


class OutOfMemoryError(OctavoError):
    """A step did not fit into memory, and what had been computed for this request is lost (HTTP 503)."""


class RequestTimeoutError(OctavoError):
    """A request's time was up before it was complete: HTTP 408, or 503 where it was still waiting to begin."""

    def __init__(self, message: str, *, queued: bool) -> None:
        super().__init__(message)
        self.queued = queued
