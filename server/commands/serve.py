"""`octavo serve`."""

import argparse
import asyncio
import gc
import logging
import socket
from typing import TYPE_CHECKING

from engine.config import EngineConfig, add_flags, load_all
from server import logs
from server.commands.terminal import TerminalConfig
from server.config import ServerConfig

if TYPE_CHECKING:
    from server.serving import Serving

logger = logging.getLogger("octavo.server")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The engine's settings, the server's, and the file that can hold both."""
    add_flags(parser.add_argument_group("the model"), EngineConfig)
    server = parser.add_argument_group("the server")
    add_flags(server, ServerConfig)
    server.add_argument("--config", metavar="FILE", help="YAML file with any of these settings (OCTAVO_CONFIG)")


def run(args: argparse.Namespace) -> int:
    """Load the model, listen, and serve until told to stop."""
    # TerminalConfig is among them so that one file can serve all commands.
    engine_config, config, _ = load_all((EngineConfig, ServerConfig, TerminalConfig), vars(args))
    logs.install(config)

    from server import listener

    sock = listener.bind(config)
    with sock:
        return _serve(engine_config, config, sock)


def _serve(engine_config: EngineConfig, config: ServerConfig, sock: socket.socket) -> int:
    from engine.launch import load_engine
    from server import listener
    from server.app import create_app, listeners_of
    from server.metrics import Metrics

    metrics, listeners = Metrics(), listeners_of(config)
    engine = load_engine(engine_config, metrics)
    engine.grammars.prepare()  # half a second now, rather than for everybody when the first request needs it
    for line in engine.info.lines():
        logger.info("%s", line)
    app = create_app(engine, config, metrics, listeners)
    # What is loaded stays: a full collection that visits it all holds up a step of 1,024 sequences for 100 ms.
    gc.collect()
    gc.freeze()
    url = _url(config.host, sock.getsockname()[1])
    server = listener.make_server(app, config, lambda: _announce(url, app.state.serving))
    with asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:
        return runner.run(listener.serve(server, sock))


def _announce(url: str, serving: "Serving") -> None:
    """Say that the server is ready, with a request to copy."""
    path, body = "/v1/completions", '{"prompt": "Once upon a time", "max_tokens": 64}'
    if serving.template is not None:
        path = "/v1/chat/completions"
        body = '{"messages": [{"role": "user", "content": "Why is the sky blue?"}], "max_tokens": 64}'
    key = " -H 'Authorization: Bearer <your key>'" if serving.config.api_key else ""
    logger.info(
        "ready on %s; try:\n\n  curl %s%s%s -H 'Content-Type: application/json' -d '%s'\n", url, url, path, key, body
    )


def _url(host: str, port: int) -> str:
    """Where a client on this machine reaches the server."""
    local = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{local}]:{port}" if ":" in local else f"http://{local}:{port}"
