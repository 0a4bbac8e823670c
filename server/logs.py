"""What `octavo serve` writes to its log: lines of text or of JSON; those about a request carry its id.

A line's structured part is the dictionary ``fields`` that its caller gives as ``extra``.
"""

import json
import logging
import re
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TextIO

from server.config import ServerConfig

if TYPE_CHECKING:
    from server.exchange import Exchange

requests = logging.getLogger("octavo.requests")

_PLAIN = re.compile(r"[^\s\"'=\\\x00-\x1f\x7f]+")
"""A value that reads well without quotes, and cannot be taken for more than one."""


def about(request_id: str) -> dict[str, Any]:
    """For ``extra``: that a line is about a request."""
    return {"fields": {"request_id": request_id}}


class TextFormatter(logging.Formatter):
    """`12:34:56 INFO message key=value …`, values in JSON where they are not plain."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 — logging's name
        """The line, without a traceback."""
        pairs = [f"{name}={_shown(value)}" for name, value in _fields(record).items()]
        return " ".join([super().formatMessage(record), *pairs])


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (UTC), level, logger, message, the fields, and the traceback if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        content = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            content["traceback"] = self.formatException(record.exc_info)
        return json.dumps(content, default=str)


def install(config: ServerConfig, stream: TextIO | None = None) -> None:
    """Make the process log as the settings say, to standard error; what others log from warnings on."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if config.log_format == "json" else TextFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.captureWarnings(True)
    logging.getLogger("octavo").setLevel(config.log_level.upper())
    requests.setLevel(logging.INFO)  # they are asked for by a flag of their own


def log_request(exchange: "Exchange") -> None:
    """One line about a request whose answer has ended; none about probes that went well."""
    if not exchange.is_good_probe:
        requests.info("request", extra={"fields": exchange.fields()})


def _fields(record: logging.LogRecord) -> Mapping[str, Any]:
    fields: Mapping[str, Any] = getattr(record, "fields", {})
    return fields


def _shown(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(value)
