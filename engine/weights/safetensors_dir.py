"""A directory of Hugging Face files as a checkpoint. Only safetensors: a pickle can run code, and is refused."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.errors import CheckpointError
from engine.weights.checkpoint import Checkpoint, check_shape
from engine.weights.config_checks import check_config, check_tensors, read_json
from engine.weights.hf_tokenizer import read_tokenizer

_INDEX: Final = "model.safetensors.index.json"
_PICKLES: Final = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True, eq=False)
class SafetensorsFiles:
    """A TensorSource over mapped safetensors files."""

    folder: Path
    files: Mapping[str, Any]  # open files by name (safetensors has no public type for them)
    file_of: Mapping[str, str]  # the file of each tensor
    nbytes: int

    def names(self) -> tuple[str, ...]:
        return tuple(self.file_of)

    def __contains__(self, name: object) -> bool:
        return name in self.file_of

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file(name).get_slice(name).get_shape())

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._file(name).get_tensor(name)
        return tensor

    def copy_into(self, name: str, out: Tensor) -> None:
        where = str(self.folder / self.file_of.get(name, ""))
        check_shape(where, name, self.shape(name), out)
        tensor = self[name]
        if not tensor.is_floating_point():
            raise CheckpointError(f"{where}: tensor {name!r} is of {tensor.dtype}, not of a float type")
        out.copy_(tensor)

    def group_quantized(self, name: str) -> None:
        return None

    def _file(self, name: str) -> Any:
        if name not in self.file_of:
            raise CheckpointError(f"{self.folder}: there is no tensor {name!r}")
        return self.files[self.file_of[name]]


def open_directory(folder: Path, name: str | None = None) -> Checkpoint:
    """Opens a directory with config.json, a tokenizer and safetensors files; tensors stay on disk until asked for.

    Raises CheckpointError, in one line that names the file, for whatever is missing, damaged or asks for remote code.
    """
    config_file = folder / "config.json"
    config = read_json(config_file)
    _refuse(config, config_file)
    check_config(config, str(config_file))
    generation_file = folder / "generation_config.json"
    generation = read_json(generation_file) if generation_file.is_file() else {}
    tensors = _open_tensors(folder)
    check_tensors(config, tensors, str(folder))
    return Checkpoint(
        name=name or folder.resolve().name,
        config=config,
        generation_config=generation,
        tokenizer=read_tokenizer(folder, config, generation),
        tensors=tensors,
    )


def _refuse(config: Mapping[str, Any], where: Path) -> None:
    if config.get("auto_map") or config.get("trust_remote_code"):
        raise CheckpointError(f"{where}: the model asks for remote code (auto_map), which Octavo never runs")
    if config.get("quantization_config"):
        method = (
            config["quantization_config"].get("quant_method")
            if isinstance(config["quantization_config"], dict)
            else None
        )
        raise CheckpointError(f"{where}: weights quantized by {method!r} are not supported")


def _open_tensors(folder: Path) -> SafetensorsFiles:
    index = folder / _INDEX
    if index.is_file():
        named = _shards_of(index)
        files = {file: _open(folder / file) for file in sorted(set(named.values()))}
        held = {file: set(handle.keys()) for file, handle in files.items()}
        for tensor, file in named.items():
            if tensor not in held[file]:
                raise CheckpointError(f"{folder / file}: there is no tensor {tensor!r}, though {_INDEX} says so")
    else:
        files = {file: _open(folder / file) for file in _files_without_index(folder)}
        named = {tensor: file for file, handle in files.items() for tensor in handle.keys()}  # noqa: SIM118 (not a dict)
    return SafetensorsFiles(folder, files, named, sum(_data_bytes(folder / file) for file in files))


def _shards_of(index: Path) -> dict[str, str]:
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise CheckpointError(f"{index}: there is no weight_map")
    for file in shards.values():
        # A name, not a path: an index must not reach outside its directory.
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise CheckpointError(f"{index}: {file!r} is not the name of a safetensors file")
    return shards


def _files_without_index(folder: Path) -> list[str]:
    if (folder / "model.safetensors").is_file():
        return ["model.safetensors"]
    if shards := sorted(path.name for path in folder.glob("model-*-of-*.safetensors")):
        count = shards[0].removesuffix(".safetensors").rpartition("-of-")[2]
        if not count.isdecimal() or int(count) != len(shards):
            raise CheckpointError(f"{folder}: {len(shards)} of {count} shards are there, and no {_INDEX}")
        return shards
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{folder}: the weights are pickled ({pickles[0]}), which can run code: convert them to safetensors"
        )
    if found := sorted(path.name for path in folder.glob("*.gguf")):
        raise CheckpointError(f"{folder}: no safetensors here; to serve a GGUF file, name it: {folder / found[0]}")
    raise CheckpointError(f"{folder}: there is no model.safetensors and no {_INDEX}")


def _open(path: Path) -> Any:
    """Opens one file. The library checks its header against its size: lengths, offsets, shapes, overlaps."""
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise CheckpointError(f"{path}: the file is missing") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from None
    except SafetensorError as error:
        raise CheckpointError(f"{path}: truncated or damaged ({error})") from None


def _data_bytes(path: Path) -> int:
    """The file's size without its header, whose length is its first eight bytes."""
    with path.open("rb") as file:
        return path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")
