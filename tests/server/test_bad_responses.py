"""Responses that cannot be had: a 400 that names the field."""

from typing import Any

import pytest

from tests.server.conftest import Live
from tests.server.refusals import check_error

HI = {"role": "user", "content": "Hi"}
TOOL = {"type": "function", "name": "f"}


def item(**fields: Any) -> dict[str, Any]:
    return {"input": [fields]}


def form(**fields: Any) -> dict[str, Any]:
    return {"text": {"format": fields}}


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"input": None}, "input"),
    ({"input": []}, "input"),
    ({"input": 5}, "input"),
    ({"input": {"role": "user", "content": "Hi"}}, "input"),
    ({"input": ["Hi"]}, "input[0]"),
    ({"input": [HI] * 4097}, "input"),
    ({"input": [HI, {"role": "system", "content": "late"}]}, "input"),
    (item(role="user"), "input[0]"),
    (item(content="x"), "input[0]"),
    (item(role="tool", content="x"), "input[0].role"),
    (item(role="user", content=1), "input[0].content"),
    (item(role="user", content=["x"]), "input[0].content"),
    (item(role="user", content=[{"type": "text", "text": "x"}]), "input[0].content"),
    (item(role="user", content=[{"type": "input_text"}]), "input[0].content"),
    (item(role="user", content=[{"type": "input_image", "image_url": "http://x"}]), "input[0].content"),
    (item(role="user", content=[{"type": "input_file", "file_id": "x"}]), "input[0].content"),
    (item(type="item_reference", id="msg_1"), "input[0].type"),
    (item(type="reasoning", summary=[]), "input[0].type"),
    (item(type="web_search_call"), "input[0].type"),
    (item(type="function_call", call_id="c", name="f"), "input[0]"),
    (item(type="function_call", call_id="c", name="f", arguments={}), "input[0].arguments"),
    (item(type="function_call", call_id=1, name="f", arguments="{}"), "input[0].call_id"),
    (item(type="function_call_output", call_id="c"), "input[0]"),
    (item(type="function_call_output", call_id="c", output={}), "input[0].output"),
    (item(type="function_call_output", output="x"), "input[0]"),
    ({"instructions": 1}, "instructions"),
    ({"instructions": ["x"]}, "instructions"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"max_output_tokens": "5"}, "max_output_tokens"),
    ({"max_output_tokens": True}, "max_output_tokens"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": "1"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"stream": "true"}, "stream"),
    ({"stream_options": {"include_obfuscation": False}}, "stream_options"),
    ({"store": 1}, "store"),
    ({"metadata": {"a": 1}}, "metadata.a"),
    ({"metadata": {"a": "x" * 513}}, "metadata.a"),
    ({"metadata": {str(i): "" for i in range(17)}}, "metadata"),
    ({"metadata": []}, "metadata"),
    ({"text": "x"}, "text"),
    ({"text": {"verbosity": "low"}}, "text.verbosity"),
    (form(type="xml"), "text.format.type"),
    (form(type="json_schema"), "text.format"),
    (form(type="text", schema={}), "text.format"),
    (form(type="json_schema", schema=[]), "text.format.schema"),
    (form(type="json_schema", schema={"type": 1}), "text.format"),
    (form(type="json_schema", schema={"not": {}}, strict=True), "text.format"),
    (form(type="json_schema", schema={"pattern": "a" * 9000}), "text.format"),
    ({**form(type="json_object"), "guided_regex": "a"}, "text.format"),
    ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
    ({"guided_regex": "[a"}, "guided_regex"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"tools": [{"type": "function"}]}, "tools[0].name"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools[0].name"),
    ({"tools": [{"type": "web_search"}]}, "tools[0]"),
    ({"tools": [{"name": "f"}]}, "tools[0]"),
    ({"tools": ["f"]}, "tools[0]"),
    ({"tools": [{**TOOL, "name": "a b"}]}, "tools[0].name"),
    ({"tools": [{**TOOL, "parameters": []}]}, "tools[0].parameters"),
    ({"tools": [TOOL, TOOL]}, "tools"),
    ({"tools": [{**TOOL, "name": f"f{i}"} for i in range(129)]}, "tools"),
    ({"tools": [{**TOOL, "description": "x" * 70_000}]}, "tools"),
    ({"tools": [TOOL], "tool_choice": "sometimes"}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "g"}}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "tools": []}}, "tool_choice"),
    ({"tools": [TOOL], "guided_regex": "a"}, "guided_regex"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"parallel_tool_calls": 1}, "parallel_tool_calls"),
    ({"include": "all"}, "include"),
    ({"include": ["a"] * 33}, "include"),
    ({"include": [1]}, "include[0]"),
    ({"top_logprobs": 21}, "top_logprobs"),
    ({"top_logprobs": True}, "top_logprobs"),
    ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ({"conversation": "conv_1"}, "conversation"),
    ({"background": True}, "background"),
    ({"prompt": {"id": "x"}}, "prompt"),
    ({"reasoning": {"effort": "high"}}, "reasoning"),
    ({"reasoning": "high"}, "reasoning"),
    ({"truncation": "auto"}, "truncation"),
    ({"n": 2}, "n"),
    ({"n": 0}, "n"),
    ({"best_of": 2}, "best_of"),
    ({"use_beam_search": True}, "use_beam_search"),
    ({"stop": ["a"] * 5}, "stop"),
    ({"logit_bias": {"999": 1}}, "logit_bias"),
    ({"min_tokens": 50, "max_output_tokens": 5}, "min_tokens"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    ({"cache_salt": ""}, "cache_salt"),
    ({"kv_policy": "h9"}, "kv_policy"),
    ({"kv_policy": "streaming", "max_output_tokens": 1_000_001}, "max_output_tokens"),
    ({"priority": 1}, "priority"),
    ({"timeout": 0}, "timeout"),
    ({"user": 1}, "user"),
    ({"model": 1}, "model"),
]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(("fields", "param"), REFUSED, ids=lambda value: str(value)[:60])
def test_a_bad_field_is_a_400_that_names_it(live: Live, fields: dict[str, Any], param: str, stream: bool) -> None:
    before = len(live.engine.submitted)
    given = {"stream": True} if stream and not {"stream", "stream_options"} & fields.keys() else {}
    error = check_error(live.http.post("/v1/responses", json={"input": "x", **given, **fields}), 400)
    assert error["param"] == param
    assert param == "response_format" or not error["message"].startswith(("messages", "response_format", "max_tokens"))
    assert len(live.engine.submitted) == before


@pytest.mark.parametrize("body", [{}, [], "x"])
def test_a_body_without_an_input_is_a_400(live: Live, body: object) -> None:
    check_error(live.http.post("/v1/responses", json=body), 400)


@pytest.mark.parametrize("fields", [{"input": "a" * 300}, {"input": "a", "max_output_tokens": 300}])
def test_more_than_the_context_length_is_told_by_its_code(live: Live, fields: dict[str, Any]) -> None:
    error = check_error(live.http.post("/v1/responses", json=fields), 400)
    assert (error["code"], error["param"]) == ("context_length_exceeded", "input")


def test_that_nothing_is_kept_is_said(live: Live) -> None:
    error = check_error(live.http.post("/v1/responses", json={"input": "x", "previous_response_id": "resp_1"}), 400)
    assert "no response is kept here" in error["message"]
    check_error(live.http.get("/v1/responses/resp_1"), 404)
