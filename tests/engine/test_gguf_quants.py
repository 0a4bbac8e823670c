"""Dequantization is exact: bit for bit what the `gguf` package computes."""

import gguf
import numpy as np
import pytest
import torch

from engine.weights.gguf_header import QUANT_TYPES, QuantType
from engine.weights.gguf_quants import _CHUNK_BLOCKS, dequantize_into, group_quantized, stored_dtype

PLAIN = {"F32", "F16", "BF16"}
QUANTIZED = [kind for kind in QUANT_TYPES.values() if kind.name not in PLAIN]


# Where a block's float16 scales lie. All else in a block may be any bytes.
SCALES = {
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0"), (0,)),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q6_K": (208,),
}


def random_blocks(kind: QuantType, rows: int, columns: int) -> np.ndarray:
    """Random blocks, uint8 [rows, bytes per row], with finite scales."""
    rng = np.random.default_rng(1)
    raw = rng.integers(0, 256, (rows * columns // kind.block, kind.nbytes), dtype=np.uint8)
    for position in SCALES[kind.name]:
        raw[:, position + 1] &= 0b1011_1111  # the exponent's highest bit: |scale| < 2
    return raw.reshape(rows, -1)


def dequantized(raw: np.ndarray, kind: QuantType, columns: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    out = torch.full((raw.shape[0], columns), torch.nan, dtype=dtype)
    dequantize_into(torch.from_numpy(raw), kind, out)
    return out


@pytest.mark.parametrize("kind", QUANT_TYPES.items(), ids=lambda item: item[1].name)
def test_block_sizes_are_those_of_the_gguf_package(kind: tuple[int, QuantType]) -> None:
    number, ours = kind
    theirs = gguf.GGMLQuantizationType(number)
    assert theirs.name == ours.name
    assert gguf.GGML_QUANT_SIZES[theirs] == (ours.block, ours.nbytes)


@pytest.mark.parametrize("kind", QUANTIZED, ids=lambda kind: kind.name)
def test_random_blocks_unpack_to_the_same_bits_as_in_the_gguf_package(kind: QuantType) -> None:
    raw = random_blocks(kind, 6, 512)
    expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind.name])
    assert np.array_equal(dequantized(raw, kind, 512).numpy().view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("kind", QUANTIZED, ids=lambda kind: kind.name)
def test_a_narrow_output_is_the_exact_value_rounded_once(kind: QuantType) -> None:
    raw = random_blocks(kind, 2, 256)
    exact = dequantized(raw, kind, 256)
    assert torch.equal(dequantized(raw, kind, 256, torch.bfloat16), exact.bfloat16())


def test_weights_survive_quantization_about_as_well_as_their_bits_allow() -> None:
    weights = np.random.default_rng(2).standard_normal((8, 256), dtype=np.float32)
    for kind, most in (("Q8_0", 0.02), ("Q5_1", 0.12), ("Q5_0", 0.15), ("Q4_1", 0.25), ("Q4_0", 0.35)):
        known = gguf.GGMLQuantizationType[kind]
        ours = QUANT_TYPES[known.value]
        restored = dequantized(gguf.quants.quantize(weights, known), ours, 256).numpy()
        assert np.abs(restored - weights).max() < most


@pytest.mark.parametrize("blocks", [_CHUNK_BLOCKS - 1, _CHUNK_BLOCKS, _CHUNK_BLOCKS + 1, 2 * _CHUNK_BLOCKS + 5])
def test_no_block_is_lost_where_chunks_meet(blocks: int) -> None:
    kind = QUANT_TYPES[gguf.GGMLQuantizationType.Q8_0.value]
    raw = random_blocks(kind, blocks, 32)
    expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType.Q8_0)
    assert np.array_equal(dequantized(raw, kind, 32).numpy(), expected)


@pytest.mark.parametrize(("name", "dtype"), [("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16)])
def test_plain_types_keep_their_dtype_and_bits(name: str, dtype: torch.dtype) -> None:
    kind = next(kind for kind in QUANT_TYPES.values() if kind.name == name)
    values = torch.randn(3, 40).to(dtype)
    assert stored_dtype(kind) == dtype
    raw = values.view(torch.uint8).numpy()
    assert torch.equal(dequantized(raw, kind, 40, dtype), values)


@pytest.mark.parametrize("kind", QUANTIZED, ids=lambda kind: kind.name)
def test_codes_and_scales_of_the_types_that_have_them_stand_for_the_same_bits(kind: QuantType) -> None:
    raw = random_blocks(kind, 6, 512)
    kept = group_quantized(torch.from_numpy(raw), kind)
    if kind.name in ("Q4_0", "Q4_1", "Q8_0"):
        assert kept is not None
        assert torch.equal(kept.dequantize().view(torch.int32), dequantized(raw, kind, 512).view(torch.int32))
    else:
        assert kept is None
