"""Runs llama.cpp's own tests of its server (tools/server/tests) against ours, which has OpenAI's URLs only.

A plugin for pytest in the folder of those tests, with DEBUG_EXTERNAL and PORT set as their README says:
`python -m pytest -p llama_cpp_plugin unit/test_chat_completion.py`, with this file's folder in PYTHONPATH.
"""

import os
import sys
from typing import Any

import pytest

_OPENAI = ("/chat/completions", "/completions", "/models", "/embeddings", "/responses")


@pytest.hookimpl(trylast=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    """Ask for /v1/… where llama.cpp also answers without it, and show the key that ours wants."""
    server = sys.modules["utils"].ServerProcess
    make_url, make_request, make_stream = server.make_url, server.make_request, server.make_stream_request

    def our_url(self: Any, path: str, *rest: Any, **named: Any) -> str:
        return str(make_url(self, f"/v1{path}" if path.startswith(_OPENAI) else path, *rest, **named))

    def with_key(send: Any) -> Any:
        def sent(self: Any, *arguments: Any, headers: Any = None, **named: Any) -> Any:
            key = {"Authorization": f"Bearer {os.environ['OPENAI_API_KEY']}"}
            return send(self, *arguments, headers=key if headers is None else headers, **named)

        return sent

    server.make_url = our_url
    server.make_request, server.make_stream_request = with_key(make_request), with_key(make_stream)
