"""Models that several test modules share, each loaded once."""

from pathlib import Path

import pytest

from engine.config import EngineConfig
from engine.launch import LoadedModel, load_model
from tests.engine.checkpoints import random_model, save


@pytest.fixture(scope="session")
def embedded() -> LoadedModel:
    """SmolLM2-135M-Instruct in float32."""
    return load_model(EngineConfig(model="embedded", dtype="float32"))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """A random Llama of three layers in float32: what does not depend on sense is tested on it in milliseconds."""
    folder: Path = save(random_model("llama"), tmp_path_factory.mktemp("tiny"))
    return load_model(EngineConfig(model=str(folder), dtype="float32"))
