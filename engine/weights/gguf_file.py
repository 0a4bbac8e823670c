"""A GGUF file as a checkpoint: its tensors under Hugging Face's names, dequantized when asked for."""

import math
import mmap
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.errors import CheckpointError
from engine.tokenizer import Tokenizer
from engine.weights.checkpoint import Checkpoint, check_shape
from engine.weights.config_checks import check_tensors
from engine.weights.gguf_config import ROPE_FACTORS, config_of, hf_name
from engine.weights.gguf_header import GGUFHeader, TensorInfo, read_header
from engine.weights.gguf_quants import dequantize_into, group_quantized, stored_dtype
from engine.weights.gguf_tokenizer import build_tokenizer, token_at
from kernels.ops import GroupQuantized


@dataclass(frozen=True, eq=False)
class GGUFTensors:
    """A TensorSource over a mapped GGUF file.

    ``heads`` gives, for a projection that llama.cpp stores with its rows permuted (q and k of its llama
    architecture), the number of heads that its rows divide into.
    """

    path: Path
    file: Tensor  # uint8, the whole file, mapped
    infos: Mapping[str, TensorInfo]  # by HF name
    heads: Mapping[str, int]

    @property
    def nbytes(self) -> int:
        """Bytes that the tensors take in the file."""
        return sum(info.nbytes for info in self.infos.values())

    def names(self) -> tuple[str, ...]:
        return tuple(self.infos)

    def __contains__(self, name: object) -> bool:
        return name in self.infos

    def shape(self, name: str) -> tuple[int, ...]:
        return self._info(name).shape

    def __getitem__(self, name: str) -> Tensor:
        """The tensor, exactly: float32 if it is quantized, else in its stored dtype."""
        info = self._info(name)
        values = torch.empty(info.shape, dtype=stored_dtype(info.type))
        self.copy_into(name, values)
        return values

    def copy_into(self, name: str, out: Tensor) -> None:
        info = self._info(name)
        check_shape(self.path.name, name, info.shape, out)
        raw = self._rows(info, self.heads.get(name))
        if out.is_contiguous() and out.device.type == "cpu":
            dequantize_into(raw, info.type, out.view(raw.shape[0], -1))
        else:
            out.copy_(self[name])

    def group_quantized(self, name: str) -> GroupQuantized | None:
        info = self._info(name)
        return group_quantized(self._rows(info, self.heads.get(name)), info.type)

    def _info(self, name: str) -> TensorInfo:
        if name not in self.infos:
            raise CheckpointError(f"{self.path}: there is no tensor {name!r}")
        return self.infos[name]

    def _rows(self, info: TensorInfo, heads: int | None) -> Tensor:
        """The stored bytes, uint8 [rows, bytes per row]; a permuted projection's rows are put back in HF's order.

        llama.cpp interleaves the two halves of each head: row 2i is HF's i, row 2i + 1 its i + D/2. It is bytes that
        move here, not floats: four to eight times less.
        """
        raw = self.file[info.offset : info.offset + info.nbytes]
        if heads is None:
            return raw.view(math.prod(info.shape[:-1]), -1)
        rows = info.shape[0]
        return raw.view(heads, rows // heads // 2, 2, -1).transpose(1, 2).reshape(rows, -1)


def open_gguf(path: Path, name: str | None = None) -> Checkpoint:
    """Opens a .gguf file; its tensors stay on disk until asked for.

    Raises CheckpointError, in one line, for whatever is wrong with the file.
    """
    where = path.name
    file, header = _map(path)
    if header.metadata.get("split.count", 1) not in (0, 1):
        raise CheckpointError(f"{where}: one of several parts of a model; join them with llama-gguf-split --merge")
    config = config_of(header, where)
    tensors = _tensors(path, file, header, config)
    check_tensors(config, tensors, where)
    tokenizer = _tokenizer(header.metadata, where)
    if tokenizer.vocab_size > config["vocab_size"]:
        raise CheckpointError(
            f"{where}: {tokenizer.vocab_size} tokens, but token_embd.weight has {config['vocab_size']} rows"
        )
    if ROPE_FACTORS in tensors:
        _check_rope_factors(tensors, config, where)
    return Checkpoint(
        name=name or path.stem,
        config=config,
        generation_config={},
        tokenizer=tokenizer,
        tensors=tensors,
    )


def _map(path: Path) -> tuple[Tensor, GGUFHeader]:
    try:
        with path.open("rb") as handle:
            data = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
    except ValueError:  # an empty file cannot be mapped
        raise CheckpointError(f"{path}: the file is empty") from None
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    header = read_header(data, path)
    with warnings.catch_warnings():
        # Torch warns that the buffer is read-only; nothing here writes to it.
        warnings.simplefilter("ignore", UserWarning)
        return torch.frombuffer(data, dtype=torch.uint8), header


def _tensors(path: Path, file: Tensor, header: GGUFHeader, config: Mapping[str, Any]) -> GGUFTensors:
    permuted = header.metadata["general.architecture"] == "llama"
    heads_of = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    infos, heads = {}, {}
    for info in header.tensors.values():
        name = hf_name(info.name)
        if name is None:
            raise CheckpointError(f"{path.name}: tensor {info.name!r} is not one of a {config['model_type']} model")
        infos[name] = info
        count = heads_of.get(name.split(".")[-2]) if permuted else None
        if count is not None:
            if info.shape[0] != count * config["head_dim"]:
                raise CheckpointError(
                    f"{path.name}: {info.name} has {info.shape[0]} rows, not {count} x {config['head_dim']}"
                )
            heads[name] = count
    return GGUFTensors(path, file, infos, heads)


def _check_rope_factors(tensors: GGUFTensors, config: Mapping[str, Any], where: str) -> None:
    """Llama 3's rope scaling as a file has it: what each frequency is divided by, [head_dim / 2]."""
    if tensors.shape(ROPE_FACTORS) != (config["head_dim"] // 2,):
        raise CheckpointError(f"{where}: {ROPE_FACTORS} is not {config['head_dim'] // 2} numbers")
    factors = tensors[ROPE_FACTORS]
    if not bool((factors.isfinite() & (factors > 0)).all()):
        raise CheckpointError(f"{where}: {ROPE_FACTORS} holds a number that is not positive")


def _tokenizer(metadata: Mapping[str, Any], where: str) -> Tokenizer:
    backend = build_tokenizer(metadata, where)
    tokens = metadata["tokenizer.ggml.tokens"]
    ends = [metadata.get(f"tokenizer.ggml.{key}_token_id", -1) for key in ("eos", "eot", "eom")]
    template = metadata.get("tokenizer.chat_template")
    return Tokenizer(
        backend=backend,
        bos_token=token_at(tokens, metadata.get("tokenizer.ggml.bos_token_id")),
        eos_token=token_at(tokens, ends[0]),
        eos_token_ids=frozenset(end for end in ends if token_at(tokens, end) is not None),
        chat_template=template if isinstance(template, str) else None,
    )
