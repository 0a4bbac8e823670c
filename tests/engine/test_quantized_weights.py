"""A GGUF file's own 4 and 8 bits are what is multiplied, where that is asked for and the machine can."""

import dataclasses
from pathlib import Path

import pytest
import torch

from engine.config import EngineConfig
from engine.launch import LoadedModel, engine_info, keep_quantized, load_model
from engine.layers.linear import Dense, Grouped
from engine.memory import MemoryPlan
from kernels import ops
from tests.engine.checkpoints import random_model, save
from tests.engine.driving import all_logits

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def kept() -> LoadedModel:
    """SmolLM2-135M-Instruct in the 4 bits of its file, computed in float32 otherwise."""
    if not ops.load():
        pytest.skip("no compiler")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.launch.keep_quantized", lambda *_: True)
        return load_model(EngineConfig(model="embedded", dtype="float32"))


def test_every_matrix_of_the_embedded_model_stays_in_its_own_bits(kept: LoadedModel) -> None:
    for block in kept.decoder.blocks:
        parts = block.attention.qkv, block.attention.output, block.mlp.gate_up, block.mlp.down
        assert all(isinstance(part.weight, Grouped) for part in parts)
    assert isinstance(kept.decoder.head.weight, Grouped)
    assert kept.decoder.quantized_bits == (4, 8)
    matrices = kept.decoder.nbytes - kept.decoder.embedding.nbytes
    assert matrices == pytest.approx(kept.checkpoint.tensors.nbytes, rel=0.01)


def test_logits_are_those_of_the_dequantized_weights_but_for_rounded_activations(
    kept: LoadedModel, embedded: LoadedModel
) -> None:
    tokens = kept.checkpoint.tokenizer.encode("The capital of France is Paris, and that of Italy is")
    rounded, exact = all_logits(kept, tokens, [len(tokens)]), all_logits(embedded, tokens, [len(tokens)])
    assert (rounded - exact).norm() < 0.1 * exact.norm()
    assert not torch.equal(rounded, exact)
    assert rounded[-1].argmax() == exact[-1].argmax()


@pytest.mark.parametrize(
    ("settings", "device", "expected"),
    [
        ({}, "cpu", True),
        ({"dtype": "bfloat16"}, "cpu", True),
        ({"dtype": "float32"}, "cpu", False),
        ({"quantization": "none"}, "cpu", False),
        ({}, "cuda", False),
    ],
)
def test_weights_are_kept_on_cpus_unless_told_otherwise(settings: dict[str, str], device: str, expected: bool) -> None:
    assert keep_quantized(dataclasses.replace(EngineConfig(), **settings), torch.device(device)) == expected


def test_weights_of_other_files_are_dense(tmp_path: Path) -> None:
    loaded = load_model(EngineConfig(model=str(save(random_model("llama"), tmp_path)), dtype="bfloat16"))
    assert keep_quantized(EngineConfig(), CPU)
    assert isinstance(loaded.decoder.blocks[0].mlp.down.weight, Dense)
    assert loaded.decoder.quantized_bits == ()


def test_without_a_kernel_for_them_weights_are_dense(embedded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "pack_groups", lambda weight: None)
    monkeypatch.setattr("engine.launch.keep_quantized", lambda *_: True)
    again = load_model(EngineConfig(model="embedded", dtype="float32"))
    assert isinstance(again.decoder.head.weight, Dense)
    assert again.decoder.nbytes == embedded.decoder.nbytes


def test_the_start_log_and_every_report_name_the_bits(kept: LoadedModel) -> None:
    info = engine_info(EngineConfig(), kept, MemoryPlan(num_blocks=4, num_host_blocks=0, max_model_len=64))
    assert info.dtypes == "float32 with 4 and 8-bit weights"
    assert "4 and 8-bit weights 200 MiB" in info.lines()[1]
