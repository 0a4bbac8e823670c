"""What a checkpoint recommends for sampling, and which device and dtype are taken."""

from typing import Any

import pytest
import torch

from engine.errors import ConfigError
from engine.launch import default_sampling, pick_device, pick_dtype


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ({"do_sample": True, "temperature": 0.6, "top_k": 20}, {"temperature": 0.6, "top_k": 20}),
        ({"temperature": 0.6}, {}),
        ({"do_sample": True, "top_k": 5000.0, "temperature": float("nan"), "min_p": True}, {}),
        ({"do_sample": True, "top_p": 0.0, "repetition_penalty": 0, "temperature": -1}, {}),
        ({"do_sample": True, "top_k": 10**30, "repetition_penalty": float("inf"), "temperature": "1"}, {}),
    ],
)  # fmt: skip
def test_recommendations_that_make_sense_are_taken_where_the_model_samples(
    given: dict[str, Any], taken: dict[str, float]
) -> None:
    assert default_sampling(given) == taken


def test_a_dtype_is_the_one_asked_for_or_one_that_the_cpu_multiplies_natively() -> None:
    cpu = torch.device("cpu")
    assert pick_dtype("float16", cpu) is torch.float16
    assert pick_dtype("auto", cpu) in (torch.bfloat16, torch.float32)


def test_cuda_where_there_is_none_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="torch sees no CUDA device"):
        pick_device("cuda")
    assert pick_device("auto").type == "cpu"
