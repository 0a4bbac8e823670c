"""Models that several test modules share, each loaded once."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from engine.config import EngineConfig
from engine.launch import LoadedModel, load_model
from tests.engine.checkpoints import random_model, save


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """All that is computed here is so small, or the machine so busy, that threads would wait for each other.

    A forward pass of three tokens of SmolLM2 in transformers took 5 s with two threads on two busy cores, 0.2 with one.
    """
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.launch.available_cores", lambda: 1)
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def embedded() -> LoadedModel:
    """SmolLM2-135M-Instruct in float32."""
    return load_model(EngineConfig(model="embedded", dtype="float32"))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """A random Llama of three layers in float32: what does not depend on sense is tested on it in milliseconds."""
    folder: Path = save(random_model("llama"), tmp_path_factory.mktemp("tiny"))
    return load_model(EngineConfig(model=str(folder), dtype="float32"))


@pytest.fixture(scope="session")
def oracle(embedded: LoadedModel) -> Any:
    """Transformers' Llama with the embedded checkpoint's tensors (that these are right is tests/engine/test_gguf…)."""
    checkpoint = embedded.checkpoint
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**checkpoint.config))
    state = {name: checkpoint.tensors[name].float() for name in checkpoint.tensors.names()}
    model.to_empty(device="cpu")
    model.load_state_dict(state, strict=False)
    model.tie_weights()
    model.model.rotary_emb.__init__(model.config)
    return model.eval()
