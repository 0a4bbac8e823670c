"""A Hugging Face directory opens as it is, and says in one line what is wrong with it when something is."""

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from engine.errors import CheckpointError
from engine.weights.checkpoint import Checkpoint, open_checkpoint
from engine.weights.gguf_tokenizer import build_tokenizer
from tests.engine.gguf_files import BOS, EOS, TOKENS, tokenizer_values

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": len(TOKENS),
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "eos_token_id": EOS,
}


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    made = {"model.embed_tokens.weight": torch.randn(len(TOKENS), 16), "model.norm.weight": torch.ones(16)}
    for layer in range(2):
        made[f"model.layers.{layer}.self_attn.q_proj.weight"] = torch.randn(16, 16)
        made[f"model.layers.{layer}.self_attn.k_proj.weight"] = torch.randn(8, 16)
        made[f"model.layers.{layer}.mlp.down_proj.weight"] = torch.randn(16, 32).bfloat16()
    return made


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A complete directory with one file of weights."""
    made = tmp_path / "tiny"
    made.mkdir()
    write_json(made / "config.json", CONFIG)
    write_json(made / "tokenizer_config.json", {"bos_token": "<s>", "eos_token": {"content": "</s>"}})
    build_tokenizer(tokenizer_values(), "test").save(str(made / "tokenizer.json"))
    save_file(tensors(), made / "model.safetensors")
    return made


@pytest.fixture
def sharded(folder: Path) -> Path:
    """The same, its weights in two files with an index."""
    (folder / "model.safetensors").unlink()
    names = sorted(tensors())
    files = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: tensors()[name] for name in names if files[name] == file}, folder / file)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": files})
    return folder


def opened(folder: Path) -> Checkpoint:
    return open_checkpoint(str(folder))


def assert_holds_the_tensors(checkpoint: Checkpoint) -> None:
    expected = tensors()
    assert set(checkpoint.tensors.names()) == set(expected)
    assert checkpoint.tensors.nbytes == sum(tensor.nbytes for tensor in expected.values())
    for name, tensor in expected.items():
        assert name in checkpoint.tensors
        assert checkpoint.tensors.shape(name) == tuple(tensor.shape)
        assert checkpoint.tensors[name].dtype == tensor.dtype
        assert torch.equal(checkpoint.tensors[name], tensor)
        copy = torch.empty_like(tensor, dtype=torch.float64)
        checkpoint.tensors.copy_into(name, copy)
        assert torch.equal(copy, tensor.double())


def test_a_directory_opens_whole(folder: Path) -> None:
    checkpoint = opened(folder)
    assert checkpoint.name == "tiny"
    assert checkpoint.config == CONFIG
    assert checkpoint.generation_config == {}
    assert_holds_the_tensors(checkpoint)


def test_shards_open_by_their_index(sharded: Path) -> None:
    assert_holds_the_tensors(opened(sharded))


def test_shards_open_without_an_index_if_all_are_there(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").unlink()
    assert_holds_the_tensors(opened(sharded))
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="1 of 00002 shards"):
        opened(sharded)


def test_a_tensor_of_another_shape_or_name_is_refused(folder: Path) -> None:
    source = opened(folder).tensors
    with pytest.raises(CheckpointError, match="has shape"):
        source.copy_into("model.norm.weight", torch.empty(17))
    for use in (source.__getitem__, source.shape, lambda name: source.copy_into(name, torch.empty(1))):
        with pytest.raises(CheckpointError, match="no tensor 'x'"):
            use("x")


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64])
def test_a_tensor_that_is_not_of_floats_is_no_weight(dtype: torch.dtype, folder: Path) -> None:
    save_file({**tensors(), "model.norm.weight": torch.ones(16, dtype=dtype)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"model.safetensors: tensor 'model.norm.weight' is of {dtype}"):
        opened(folder).tensors.copy_into("model.norm.weight", torch.empty(16))


def test_ends_are_gathered_from_all_files(folder: Path) -> None:
    write_json(folder / "config.json", CONFIG | {"eos_token_id": [7, 8]})
    write_json(folder / "generation_config.json", {"eos_token_id": 9, "temperature": 0.6})
    checkpoint = opened(folder)
    assert checkpoint.tokenizer.eos_token_ids == {EOS, 7, 8, 9}
    assert checkpoint.generation_config["temperature"] == 0.6
    assert (checkpoint.tokenizer.bos_token_id, checkpoint.tokenizer.eos_token) == (BOS, "</s>")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, []),
        ({"add_bos_token": True}, [BOS]),
        ({"add_bos_token": False}, []),
        ({"add_bos_token": True, "add_eos_token": True}, [BOS, EOS]),
        ({"add_bos_token": True, "bos_token": None}, []),
    ],
)
def test_what_goes_around_text_follows_tokenizer_config(
    flags: dict[str, Any], expected: list[int], folder: Path
) -> None:
    write_json(folder / "tokenizer_config.json", {"bos_token": {"content": "<s>"}, "eos_token": "</s>"} | flags)
    assert opened(folder).tokenizer.encode("") == expected


def test_tokens_named_only_in_tokenizer_config_are_added(folder: Path) -> None:
    new = {"content": "<|tool|>", "special": True, "normalized": False}
    write_json(folder / "tokenizer_config.json", {"added_tokens_decoder": {str(len(TOKENS)): new}})
    assert opened(folder).tokenizer.encode("<|tool|>") == [len(TOKENS)]
    write_json(folder / "tokenizer_config.json", {"added_tokens_decoder": {"9999": new}})
    with pytest.raises(CheckpointError, match="cannot have the id 9999"):
        opened(folder)


def test_limits_of_training_are_not_limits_of_serving(folder: Path) -> None:
    backend = build_tokenizer(tokenizer_values(), "test")
    backend.enable_truncation(4)
    backend.enable_padding(length=8)
    backend.save(str(folder / "tokenizer.json"))
    assert len(opened(folder).tokenizer.encode("x" * 20)) == 20
    assert len(opened(folder).tokenizer.encode("x")) == 1


def test_the_chat_template_is_found_wherever_it_is(folder: Path) -> None:
    assert opened(folder).tokenizer.chat_template is None
    write_json(folder / "tokenizer_config.json", {"chat_template": "one"})
    assert opened(folder).tokenizer.chat_template == "one"
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "two"}]
    write_json(folder / "tokenizer_config.json", {"chat_template": named})
    assert opened(folder).tokenizer.chat_template == "two"
    (folder / "chat_template.jinja").write_text("three")
    assert opened(folder).tokenizer.chat_template == "three"


def test_a_directory_without_tokenizer_json_has_its_tokenizer_converted(folder: Path) -> None:
    before = opened(folder).tokenizer
    (folder / "tokenizer.json").unlink()
    metadata = tokenizer_values()
    write_json(folder / "vocab.json", {token: index for index, token in enumerate(TOKENS)})
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *metadata["tokenizer.ggml.merges"]]) + "\n")
    settings = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "</s>"}
    write_json(folder / "tokenizer_config.json", settings)
    for text in ("hello world 12", "<s>hello</s>"):
        assert opened(folder).tokenizer.encode(text) == before.encode(text)


def with_config(**values: Any) -> Callable[[Path], None]:
    return lambda folder: write_json(folder / "config.json", CONFIG | values)


def with_file(name: str, data: bytes) -> Callable[[Path], None]:
    return lambda folder: _replace(folder / name, data)


def _replace(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def cut(name: str, by: int) -> Callable[[Path], None]:
    return lambda folder: _replace(folder / name, (folder / name).read_bytes()[:-by])


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def only_pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({}))


def header(value: object, data: bytes = b"\0" * 16) -> bytes:
    text = json.dumps(value).encode()
    return struct.pack("<Q", len(text)) + text + data


FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "no config": (without("config.json"), "config.json: No such file"),
    "config cut": (cut("config.json", 5), "config.json: not valid JSON"),
    "config a list": (with_file("config.json", b"[1]"), "config.json: not a JSON object"),
    "config not text": (with_file("config.json", b"\xff\xfe\x00"), "config.json: not valid JSON"),
    "config nested": (with_file("config.json", b'{"a":' + b"[" * 10**5), "config.json: not valid JSON"),
    "remote code": (with_config(auto_map={"AutoModel": "x.Y"}), "asks for remote code"),
    "remote code, asked": (with_config(trust_remote_code=True), "asks for remote code"),
    "quantized": (with_config(quantization_config={"quant_method": "gptq"}), "quantized by 'gptq'"),
    "no architecture": (with_config(architectures=None), "architectures is None"),
    "other layers": (with_config(architectures=["GPT2LMHeadModel"], hidden_size=None), "this is GPT2LMHeadModel"),
    "no layers": (with_config(num_hidden_layers=0), "num_hidden_layers is 0"),
    "endless layers": (with_config(num_hidden_layers=10**9), "num_hidden_layers is 1000000000"),
    "too many layers": (with_config(num_hidden_layers=3), "no tensor 'model.layers.2"),
    "size in words": (with_config(hidden_size="wide"), "hidden_size is 'wide'"),
    "negative size": (with_config(vocab_size=-1), "vocab_size is -1"),
    "a fraction": (with_config(num_attention_heads=2.5), "num_attention_heads is 2.5"),
    "true": (with_config(num_attention_heads=True), "num_attention_heads is True"),
    "too wide": (with_config(hidden_size=1 << 19), "the config implies"),
    "vocabulary": (with_config(vocab_size=1 << 20), "the config implies"),
    "heads": (with_config(num_key_value_heads=3), "cannot share"),
    "head size": (with_config(num_attention_heads=3, num_key_value_heads=3), "cannot be divided"),
    "epsilon": (with_config(rms_norm_eps=float("nan")), "rms_norm_eps is nan"),
    "theta": (with_config(rope_theta=0), "rope_theta is 0"),
    "no tokenizer": (without("tokenizer.json"), "there is no tokenizer.json"),
    "tokenizer cut": (cut("tokenizer.json", 9), "tokenizer.json: not a tokenizer"),
    "tokenizer config cut": (cut("tokenizer_config.json", 2), "tokenizer_config.json: not valid JSON"),
    "added token a text": (
        with_file("tokenizer_config.json", b'{"added_tokens_decoder": {"5": "abc"}}'),
        "tokenizer_config.json: added_tokens_decoder describes token 5 by no object",
    ),
    "added token far away": (
        with_file("tokenizer_config.json", b'{"added_tokens_decoder": {"%b": {}}}' % (b"9" * 5000)),
        "tokenizer_config.json: added_tokens_decoder has an id of more than 9 digits",
    ),
    "template named by a list": (
        with_file("tokenizer_config.json", b'{"chat_template": [{"name": ["default"], "template": "x"}]}'),
        "tokenizer_config.json: chat_template has an entry without a name",
    ),
    "generation config": (with_file("generation_config.json", b"{"), "generation_config.json: not valid JSON"),
    "template": (with_file("chat_template.jinja", b"\xff"), "chat_template.jinja: cannot be read"),
    "no weights": (without("model.safetensors"), "no model.safetensors and no"),
    "only pickles": (only_pickled, r"pickled \(pytorch_model.bin\)"),
    "weights cut": (cut("model.safetensors", 4), "model.safetensors: truncated or damaged"),
    "weights empty": (with_file("model.safetensors", b""), "model.safetensors: truncated or damaged"),
    "header past the end": (
        with_file("model.safetensors", struct.pack("<Q", 10**6) + b"{}"),
        "model.safetensors: truncated or damaged",
    ),
    "header of 2^62 bytes": (
        with_file("model.safetensors", struct.pack("<Q", 1 << 62) + b"{}"),
        "model.safetensors: truncated or damaged",
    ),
    "shape against offsets": (
        with_file("model.safetensors", header({"a": {"dtype": "F32", "shape": [5], "data_offsets": [0, 16]}})),
        "model.safetensors: truncated or damaged",
    ),
    "overlap": (
        with_file(
            "model.safetensors",
            header({key: {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} for key in "ab"}),
        ),
        "model.safetensors: truncated or damaged",
    ),
}


@pytest.mark.parametrize(("damage", "message"), FAULTS.values(), ids=FAULTS.keys())
def test_a_fault_gives_one_line_that_names_the_file(damage: Callable[[Path], None], message: str, folder: Path) -> None:
    damage(folder)
    with pytest.raises(CheckpointError, match=rf"^[^\n]*{message}[^\n]*$"):
        opened(folder)


INDEX = "model.safetensors.index.json"
INDEX_FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing shard": (
        without("model-00002-of-00002.safetensors"),
        "model-00002-of-00002.safetensors: the file is missing",
    ),
    "shard cut": (cut("model-00001-of-00002.safetensors", 1), "model-00001-of-00002.safetensors: truncated"),
    "index cut": (cut(INDEX, 1), f"{INDEX}: not valid JSON"),
    "no map": (with_file(INDEX, b"{}"), "no weight_map"),
    "outside": (with_file(INDEX, b'{"weight_map": {"a": "../b.safetensors"}}'), "not the name of a safetensors file"),
    "a pickle": (with_file(INDEX, b'{"weight_map": {"a": "b.bin"}}'), "not the name of a safetensors file"),
    "a number": (with_file(INDEX, b'{"weight_map": {"a": 1}}'), "not the name of a safetensors file"),
    "stranger": (
        with_file(INDEX, b'{"weight_map": {"nobody": "model-00001-of-00002.safetensors"}}'),
        "no tensor 'nobody', though",
    ),
}


@pytest.mark.parametrize(("damage", "message"), INDEX_FAULTS.values(), ids=INDEX_FAULTS.keys())
def test_a_faulty_index_gives_one_line_too(damage: Callable[[Path], None], message: str, sharded: Path) -> None:
    damage(sharded)
    with pytest.raises(CheckpointError, match=rf"^[^\n]*{message}[^\n]*$"):
        opened(sharded)
