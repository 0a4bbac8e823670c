"""Embeddings that cannot be had: a 400 that names the field."""

from typing import Any

import pytest

from tests.server.conftest import Live
from tests.server.fakes import HIDDEN_SIZE
from tests.server.refusals import check_error

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"input": None}, "input"),
    ({"input": []}, "input"),
    ({"input": [[]]}, "input"),
    ({"input": ["a", 1]}, "input"),
    ({"input": [1, True]}, "input"),
    ({"input": [1.0]}, "input"),
    ({"input": [[1], "a"]}, "input"),
    ({"input": [-1]}, "input"),
    ({"input": [[1], [258]]}, "input"),
    ({"input": [2**70]}, "input"),
    ({"input": {"a": 1}}, "input"),
    ({"input": ["a"] * 2049}, "input"),
    ({"input": [[1]] * 2049}, "input"),
    ({"input": "", "add_special_tokens": False}, "input"),
    ({"input": ["a", ""], "add_special_tokens": False}, "input"),
    ({"encoding_format": "int8"}, "encoding_format"),
    ({"encoding_format": 1}, "encoding_format"),
    ({"dimensions": 0}, "dimensions"),
    ({"dimensions": "8"}, "dimensions"),
    ({"dimensions": True}, "dimensions"),
    ({"dimensions": HIDDEN_SIZE - 1}, "dimensions"),
    ({"dimensions": HIDDEN_SIZE + 1}, "dimensions"),
    ({"dimensions": 2**40}, "dimensions"),
    ({"pooling": "max"}, "pooling"),
    ({"pooling": ["mean"]}, "pooling"),
    ({"normalize": 1}, "normalize"),
    ({"normalize": "yes"}, "normalize"),
    ({"add_special_tokens": 0}, "add_special_tokens"),
    ({"model": 1}, "model"),
    ({"user": 1}, "user"),
    ({"user": "u" * 1025}, "user"),
    ({"cache_salt": ""}, "cache_salt"),
    ({"priority": 1.5}, "priority"),
    ({"priority": 1}, "priority"),
    ({"timeout": 0}, "timeout"),
    ({"kv_policy": "h9"}, "kv_policy"),
    ({"kv_policy": {"type": "window", "window": 0}}, "kv_policy"),
]


@pytest.mark.parametrize(("fields", "param"), REFUSED, ids=lambda value: str(value)[:60])
def test_a_bad_field_is_a_400_that_names_it(live: Live, fields: dict[str, Any], param: str) -> None:
    before = len(live.engine.submitted)
    assert check_error(live.http.post("/v1/embeddings", json={"input": "x", **fields}), 400)["param"] == param
    assert len(live.engine.submitted) == before


def test_a_body_without_an_input_is_a_400(live: Live) -> None:
    assert check_error(live.http.post("/v1/embeddings", json={}), 400)["param"] == "input"
    check_error(live.http.post("/v1/embeddings", json=[]), 400)


def test_why_an_embedding_is_not_cut_short_is_said(live: Live) -> None:
    error = check_error(live.http.post("/v1/embeddings", json={"input": "x", "dimensions": 4}), 400)
    assert f"have {HIDDEN_SIZE} numbers" in error["message"]
