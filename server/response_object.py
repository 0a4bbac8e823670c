"""What OpenAI's Responses API answers with: the response as an object, and the events of its stream."""

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from server.chat_job import ChatJob
from server.errors import ApiError
from server.response_output import Event, ResponseOutput
from server.response_request import ResponseRequest


class ResponseObject:
    """One response, at any moment of its life."""

    def __init__(self, body: ResponseRequest, job: ChatJob, response_id: str, model: str) -> None:
        self._job = job
        self._constant: dict[str, Any] = {
            "id": response_id,
            "object": "response",
            "created_at": int(time.time()),
            "model": model,
            "background": False,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "service_tier": "default",
            "store": False,
            "temperature": job.params.temperature,
            "text": {"format": _text_format(body)},
            "tool_choice": _tool_choice(body),
            "tools": [tool.model_dump() for tool in body.tools or ()],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": job.params.top_p,
            "truncation": "disabled",
            "user": body.user,
        }

    def begun(self) -> dict[str, Any]:
        """Before there is any output."""
        return self._at("in_progress", [])

    def finished(self, output: ResponseOutput) -> dict[str, Any]:
        """With all of its output."""
        if not output.complete:
            details = {"reason": "max_output_tokens"}
            return self._at("incomplete", output.items, incomplete_details=details, usage=self._usage())
        return self._at("completed", output.items, usage=self._usage(), completed_at=int(time.time()))

    def failed(self, output: ResponseOutput, error: ApiError) -> dict[str, Any]:
        """With what came before the failure. The error's code is one of the few that clients know."""
        code = "invalid_prompt" if error.status == 400 else "server_error"
        told = {"code": code, "message": error.message, "param": error.param, "type": error.label}
        return self._at("failed", output.so_far(), error=told)

    def _at(self, status: str, output: Sequence[Mapping[str, Any]], **more: Any) -> dict[str, Any]:
        variable = {"error": None, "incomplete_details": None, "completed_at": None, "usage": None, **more}
        return {**self._constant, "status": status, "output": output, **variable}

    def _usage(self) -> dict[str, Any]:
        usage = dict(self._job.generation.usage)
        details: Any = usage.pop("prompt_tokens_details")
        return {
            "input_tokens": usage.pop("prompt_tokens"),
            "input_tokens_details": {**details, "cache_write_tokens": 0},
            "output_tokens": usage.pop("completion_tokens"),
            "output_tokens_details": {"reasoning_tokens": 0},
            **usage,
        }


class EventWriter:
    """Numbers a stream's events and writes them."""

    def __init__(self) -> None:
        self._number = 0

    def write(self, events: Iterable[Event]) -> bytes:
        """Some events, as they go over the line."""
        text = ""
        for kind, fields in events:
            content = json.dumps({"type": kind, "sequence_number": self._number, **fields})
            text += f"event: {kind}\ndata: {content}\n\n"
            self._number += 1
        return text.encode()


def _text_format(body: ResponseRequest) -> dict[str, Any]:
    form = None if body.text is None else body.text.format
    return {"type": "text"} if form is None else form.model_dump(by_alias=True, exclude_none=True)


def _tool_choice(body: ResponseRequest) -> Any:
    choice = body.tool_choice
    if choice is None:
        return "auto"
    return choice.mode if choice.name is None else {"type": "function", "name": choice.name}
