"""`octavo bench ceiling`: what the load-test client itself can receive, so that its figures can be trusted below that.

A server that does nothing but write ready-made chunks, in a process of its own, is load-tested by the same
code as any other. A bare asyncio protocol keeps it cheaper than the client it must saturate.
"""

import argparse
import asyncio
import multiprocessing
from multiprocessing.connection import Connection
from typing import cast

from bench import loop
from bench.extras import require

_EVENT = (
    b'data: {"id":"cmpl-0123456789abcdef0123456789abcdef","object":"text_completion","created":1700000000,'
    b'"model":"ceiling","choices":[{"index":0,"text":" token","logprobs":null,"finish_reason":%b}],'
    b'"usage":null}\n\n'
)
_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    parser.add_argument("--concurrency", default="1,32,128", help="levels to measure (default: %(default)s)")
    parser.add_argument("--output-len", type=int, default=512, help="tokens per answer (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=1, help="default: %(default)s")
    parser.add_argument(
        "--interval",
        type=float,
        default=1.0,
        metavar="MS",
        help="time between an answer's tokens, so that each costs a read of its own (default: %(default)g); "
        "0: as fast as the client reads, many tokens at a time",
    )


def run(args: argparse.Namespace) -> int:
    """Start the server, load-test it, stop it; the same exit codes as `octavo bench serve`."""
    from bench import serve

    require("aiohttp")  # before the process that could only die of it
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, args.output_len, args.interval / 1e3), daemon=True)
    process.start()
    try:
        parser = argparse.ArgumentParser()
        serve.add_arguments(parser)
        address = ["--base-url", f"http://127.0.0.1:{ours.recv()}", "--label", "the client's ceiling"]
        load = ["--concurrency", args.concurrency, "--output-len", str(args.output_len)]
        return serve.run(parser.parse_args([*address, *load, "--repeats", str(args.repeats), "--input-len", "16"]))
    finally:
        process.terminate()
        process.join()


def _framed(payload: bytes) -> bytes:
    """One piece of HTTP's chunked transfer encoding."""
    return b"%x\r\n%b\r\n" % (len(payload), payload)


class _Answering(asyncio.Protocol):
    """Answers each POST with ``tokens`` chunks, one write each, and each GET with a list of one model."""

    def __init__(self, tokens: int, interval: float) -> None:
        self._tokens, self._interval = tokens, interval
        self._received = b""
        self._ready = asyncio.Event()
        self._ready.set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass of it

    def pause_writing(self) -> None:
        self._ready.clear()

    def resume_writing(self) -> None:
        self._ready.set()

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, found, body = self._received.partition(b"\r\n\r\n")
        length = next(
            (int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")), 0
        )
        if not found or len(body) < length:
            return
        self._received = b""
        if head.startswith(b"POST"):
            self._answer = asyncio.ensure_future(self._stream())
        else:
            page = b'{"data":[{"id":"ceiling"}]}'
            self._transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(page), page))

    async def _stream(self) -> None:
        self._transport.write(_HEAD)
        token = _framed(_EVENT % b"null")
        for _ in range(self._tokens - 1):
            await asyncio.sleep(self._interval)
            await self._ready.wait()
            if self._transport.is_closing():
                return
            self._transport.write(token)
        usage = b'data: {"choices":[],"usage":{"completion_tokens":%d}}\n\ndata: [DONE]\n\n' % self._tokens
        self._transport.write(_framed(_EVENT % b'"length"') + _framed(usage) + b"0\r\n\r\n")


def _serve(pipe: Connection, tokens: int, interval: float) -> None:
    """The server process: sends its port, then serves until it is terminated."""

    async def main() -> None:
        server = await asyncio.get_running_loop().create_server(lambda: _Answering(tokens, interval), "127.0.0.1", 0)
        pipe.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    loop.run(main())
