"""A GGUF header is believed only as far as its file's size bears it out."""

import mmap
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.errors import CheckpointError
from engine.weights.gguf_header import GGUFHeader, read_header
from tests.engine.gguf_files import TOKENS, random_tensors, write_gguf


def header_of(path: Path) -> GGUFHeader:
    with path.open("rb") as file:
        return read_header(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), path)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def file_of(tensors: int = 0, values: int = 0, body: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, values) + body


def tensor_entry(name: str = "a", shape: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    sizes = struct.pack(f"<{len(shape)}Q", *shape)
    return text(name) + struct.pack("<I", len(shape)) + sizes + struct.pack("<IQ", kind, offset)


def test_metadata_and_tensors_are_where_the_writer_put_them(tmp_path: Path) -> None:
    tensors = random_tensors()
    path = write_gguf(tmp_path / "a.gguf", values={"x.flag": True, "x.floats": [1.5, 2.5]}, tensors=tensors)
    header = header_of(path)
    assert header.metadata["tokenizer.ggml.tokens"] == TOKENS
    assert header.metadata["x.flag"] is True
    assert header.metadata["x.floats"] == [1.5, 2.5]
    data = path.read_bytes()
    assert set(header.tensors) == set(tensors)
    for name, info in header.tensors.items():
        assert info.shape == tensors[name].shape
        stored = np.frombuffer(data[info.offset : info.offset + info.nbytes], np.float32)
        assert np.array_equal(stored, tensors[name].ravel())


HOSTILE = {
    "not GGUF": b"PK\x03\x04" + b"\0" * 60,
    "too short": b"GGUF\x03",
    "version 1": file_of(version=1),
    "big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "2^60 values": file_of(values=1 << 60),
    "2^60 tensors": file_of(tensors=1 << 60),
    "a key of 2^62 bytes": file_of(values=1, body=struct.pack("<Q", 1 << 62) + b"\0" * 64),
    "a key that is not UTF-8": file_of(values=1, body=struct.pack("<Q", 2) + b"\xff\xfe" + b"\0" * 64),
    "a string of 2^62 bytes": file_of(values=1, body=text("k") + struct.pack("<IQ", 8, 1 << 62)),
    "an unknown type": file_of(values=1, body=text("k") + struct.pack("<IQ", 77, 0)),
    "2^60 numbers": file_of(values=1, body=text("k") + struct.pack("<IIQ", 9, 4, 1 << 60)),
    "2^60 strings": file_of(values=1, body=text("k") + struct.pack("<IIQ", 9, 8, 1 << 60)),
    "2^22 empty strings": file_of(values=1, body=text("k") + struct.pack("<IIQ", 9, 8, 1 << 22)),
    "an array of arrays": file_of(values=1, body=text("k") + struct.pack("<IIQ", 9, 9, 1) + b"\0" * 64),
    "strings past the end": file_of(values=1, body=text("k") + struct.pack("<IIQQ", 9, 8, 1, 1 << 63)),
    "strings that are not UTF-8": file_of(values=1, body=text("k") + struct.pack("<IIQQ", 9, 8, 1, 1) + b"\xff" * 9),
    "a key twice": file_of(values=2, body=(text("k") + struct.pack("<II", 4, 7)) * 2),
    "alignment 3": file_of(values=1, body=text("general.alignment") + struct.pack("<II", 4, 3)),
    "alignment 0": file_of(values=1, body=text("general.alignment") + struct.pack("<II", 4, 0)),
    "alignment in words": file_of(values=1, body=text("general.alignment") + struct.pack("<I", 8) + text("x")),
    "2^31 dimensions": file_of(tensors=1, body=text("a") + struct.pack("<I", 1 << 31) + b"\0" * 64),
    "no dimensions": file_of(tensors=1, body=text("a") + struct.pack("<I", 0) + b"\0" * 64),
    "a size of zero": file_of(tensors=1, body=tensor_entry(shape=(0,)) + b"\0" * 256),
    "sizes that overflow": file_of(tensors=1, body=tensor_entry(shape=(1 << 62, 1 << 62)) + b"\0" * 256),
    "a tensor past the end": file_of(tensors=1, body=tensor_entry(shape=(1 << 20,)) + b"\0" * 256),
    "an offset past the end": file_of(tensors=1, body=tensor_entry(offset=1 << 63) + b"\0" * 256),
    "an offset not aligned": file_of(tensors=1, body=tensor_entry(offset=4) + b"\0" * 256),
    "an unknown quantization": file_of(tensors=1, body=tensor_entry(kind=99) + b"\0" * 256),
    "half a block": file_of(tensors=1, body=tensor_entry(shape=(16,), kind=2) + b"\0" * 256),
    "a tensor twice": file_of(tensors=2, body=tensor_entry() * 2 + b"\0" * 256),
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_header_gives_one_clear_line_at_once(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match=r"bad\.gguf: [^\n]+$"):
        header_of(path)
    assert time.perf_counter() - start < 0.5


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "whole.gguf").read_bytes()
    path = tmp_path / "cut.gguf"
    for length in [1, 4, 8, 23, 24, 25, *range(30, len(whole), len(whole) // 60)]:
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"cut\.gguf"):
            header_of(path)


def test_flipped_bytes_give_an_error_or_a_header_never_anything_else(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "whole.gguf", tensors={"a": np.zeros(32, np.float32)}).read_bytes()
    rng = np.random.default_rng(0)
    path = tmp_path / "flipped.gguf"
    outcomes: dict[Any, int] = {}
    for _ in range(300):
        damaged = bytearray(whole)
        for position in rng.integers(0, len(whole), 3):
            damaged[position] = rng.integers(256)
        path.write_bytes(damaged)
        outcome = attempt(lambda: header_of(path))
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
    assert set(outcomes) == {GGUFHeader, CheckpointError}


def attempt(action: Callable[[], object]) -> type:
    try:
        return type(action())
    except CheckpointError as error:
        return type(error)
