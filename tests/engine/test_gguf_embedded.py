"""The embedded model: every tensor and token id, against what `gguf` and transformers make of the same file."""

import time
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers

from engine.weights.checkpoint import Checkpoint, open_checkpoint
from tests.engine.test_gguf_tokenizer import SPELLED, TEXTS


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return open_checkpoint("embedded")


def file_of(checkpoint: Checkpoint) -> Path:
    return checkpoint.tensors.path  # type: ignore[attr-defined]  # a GGUF source has one


def test_its_config_is_that_of_smollm2_135m(checkpoint: Checkpoint) -> None:
    config = checkpoint.config
    assert checkpoint.name == "SmolLM2-135M-Instruct"
    assert config["architectures"] == ["LlamaForCausalLM"]
    sizes = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    assert [config[size] for size in sizes] == [30, 576, 1536, 9, 3]
    assert (config["head_dim"], config["vocab_size"], config["max_position_embeddings"]) == (64, 49152, 8192)
    assert (config["rope_theta"], config["rms_norm_eps"], config["rope_scaling"]) == (100000.0, 1e-5, None)
    assert config["tie_word_embeddings"] is True


def test_all_of_its_tensors_are_what_gguf_and_transformers_make_of_them(checkpoint: Checkpoint) -> None:
    from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

    processor = LlamaTensorProcessor(config=dict(checkpoint.config))
    stored = gguf.GGUFReader(file_of(checkpoint)).tensors
    compared = 0
    # Both list the tensors in the file's order.
    for theirs, name in zip(stored, checkpoint.tensors.names(), strict=True):
        values = gguf.quants.dequantize(theirs.data, theirs.tensor_type)
        expected = processor.process(weights=values, name=theirs.name).weights
        assert np.array_equal(checkpoint.tensors[name].numpy(), expected), name
        compared += 1
    assert compared == 272


def test_it_tokenizes_as_transformers_does_but_for_digits_which_smollm_splits_first(checkpoint: Checkpoint) -> None:
    from transformers import AutoTokenizer

    file = file_of(checkpoint)
    theirs = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    ours = checkpoint.tokenizer
    without_digits = [text for text in TEXTS + SPELLED if not any(char.isnumeric() for char in text)]
    assert len(without_digits) > 6
    for text in without_digits:
        assert ours.encode(text) == theirs.encode(text)
    # Transformers gives a GGUF file GPT-2's rule; SmolLM's own tokenizer.json has these two steps.
    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    for text in [*TEXTS, *SPELLED, "<|im_start|>user\nhi 12<|im_end|>\n"]:
        ids = ours.encode(text)
        assert ids == theirs.encode(text)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert ours.decode(ids, skip_special_tokens=False) == text
    assert ours.chat_template == theirs.chat_template
    assert (ours.bos_token, ours.eos_token) == (theirs.bos_token, theirs.eos_token)


def test_known_ids(checkpoint: Checkpoint) -> None:
    tokenizer = checkpoint.tokenizer
    assert tokenizer.encode("Hello") == [19556]
    assert tokenizer.encode("<|im_start|>user\n") == [1, 4093, 198]
    assert tokenizer.encode("<|endoftext|><|im_end|>") == [0, 2]
    assert tokenizer.encode("42") == [36, 34]
    assert tokenizer.eos_token_ids == {2}
    assert tokenizer.bos_token_id == 1
    assert tokenizer.vocab_size == 49152


def test_it_opens_and_loads_within_a_start_of_seconds() -> None:
    """Measured: 0.08 s to open, 0.2 s to load as bfloat16. The bounds leave room for a busy machine."""
    start = time.perf_counter()
    checkpoint = open_checkpoint("embedded")
    opened = time.perf_counter()
    for name in checkpoint.tensors.names():
        checkpoint.tensors.copy_into(name, torch.empty(checkpoint.tensors.shape(name), dtype=torch.bfloat16))
    assert opened - start < 2.0
    assert time.perf_counter() - opened < 6.0
