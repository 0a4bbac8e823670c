"""How the server listens, and what it lets one client take."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from engine.config import check, setting
from engine.errors import ConfigError
from engine.kv_policies.registry import POLICIES
from engine.setting_values import boolean, choice, integer, memory, number, path, text, texts

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s*]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class LogConfig:
    """What is logged; a class of its own because it also decides how every command shows its failure."""

    log_level: Literal["debug", "info", "warning", "error"] = setting(
        "info", choice("debug", "info", "warning", "error"), "what to log", metavar="LEVEL"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig(LogConfig):
    """Settings of `octavo serve` beside those of the engine; given by the mechanism of `engine.config`."""

    log_format: Literal["text", "json"] = setting(
        "text", choice("text", "json"), "how lines of the log are written", metavar="FORMAT"
    )
    log_requests: bool = setting(False, boolean, "log a line about each request that has been answered")
    log_request_content: int | None = setting(
        None,
        integer(0),
        "log requests with their prompts and answers: the first N characters of either; none by default",
        metavar="N",
    )
    otlp_endpoint: str | None = setting(
        None,
        text,
        "send a trace of each request to this OpenTelemetry collector, such as http://127.0.0.1:4318; needs the extra "
        "'otel'",
        metavar="URL",
    )
    host: str = setting("127.0.0.1", text, "address to listen on; 0.0.0.0 for every one", metavar="HOST")
    port: int = setting(8000, integer(0, 65535), "port to listen on; 0 for any free one", metavar="N")
    api_key: tuple[str, ...] = setting(
        (), texts, "key that clients must send; may be given more than once", metavar="KEY", secret=True
    )
    cors_origins: tuple[str, ...] = setting(
        (),
        texts,
        "origin, such as https://chat.example.com, whose pages may use the server from a browser; * for all; may be "
        "given more than once; none by default",
        metavar="ORIGIN",
    )
    served_model_name: tuple[str, ...] = setting(
        (), texts, "name of the model to clients; may be given more than once", metavar="NAME"
    )
    chat_template: Path | None = setting(  # noqa: RUF009 — immutable
        None, path, "file with a Jinja chat template to use instead of the model's", metavar="FILE"
    )
    tool_parser: Literal["auto", "hermes", "llama3", "mistral"] = setting(
        "auto",
        choice("auto", "hermes", "llama3", "mistral"),
        "how the model writes calls of tools; auto finds it in the chat template, and takes hermes where there is none",
        metavar="FORMAT",
    )
    metrics_compat: bool = setting(False, boolean, "repeat /metrics under vLLM's names, for its dashboards")
    max_queue: int = setting(
        1024, integer(1), "prompts that wait to begin, at most; a request that would be more gets a 429", metavar="N"
    )
    max_queue_tokens: int | None = setting(
        None, integer(1), "the same in tokens of those prompts; no limit by default", metavar="N"
    )
    tenant: Literal["auto", "api-key", "user"] = setting(
        "auto",
        choice("auto", "api-key", "user"),
        "whose requests count together under --scheduling fair: those with one API key, or with one 'user' field; "
        "auto takes the key where there is more than one",
        metavar="WHICH",
    )
    kv_policy_allow: tuple[str, ...] = setting(
        (),
        texts,
        "KV policy that requests may name, beside the default; may be given more than once; all by default",
        metavar="NAME",
    )
    max_stream_tokens: int = setting(
        1_000_000,
        integer(1),
        "output tokens of a request whose KV policy lets it run past the context length, at most, all choices together",
        metavar="N",
    )
    max_body_size: int = setting(8 * 2**20, memory, "size of a request's body, at most", metavar="SIZE")
    drain_timeout: float = setting(
        30.0, number(0, 86400), "seconds that running requests get to finish on SIGTERM", metavar="S"
    )
    receive_timeout: float = setting(
        60.0, number(0.1, 86400), "seconds within which a request must have come, its body included", metavar="S"
    )
    send_timeout: float = setting(
        60.0, number(0.1, 86400), "seconds after which a client that does not read is cut off", metavar="S"
    )

    def __post_init__(self) -> None:
        check(self)
        for origin in self.cors_origins:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ConfigError(
                    f"--cors-origins: {origin!r} is neither * nor an origin such as https://example.com:8443"
                )
        for name in self.kv_policy_allow:
            if name not in POLICIES:
                raise ConfigError(
                    f"--kv-policy-allow: there is no policy {name!r}, but {', '.join(map(repr, POLICIES))}"
                )
