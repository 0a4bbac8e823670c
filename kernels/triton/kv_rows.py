"""Rows of the KV cache as operands of a matrix product: `kernels/kv_format.py` for Triton.

Quantized rows are not decoded before they are multiplied. Their codes are, which are exact in float16; the row's scale
and least value are applied to what comes out, or to what goes in from the other side (see `paged_attention.py`).

A head's D dimensions come in two parts, since a tile's sides are powers of two: the first D0 of them, and the others,
of which there may be none. 80 is 64 and 16 that way, not 128. An int4 row's halves lie in the same bytes: D0 = D/2.

FORMAT is plain, for any dtype that holds values as they are, fp8, int8 or int4.
"""

import triton
import triton.language as tl


@triton.jit
def load_codes(
    cache, row, inside,
    D: tl.constexpr, D0: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, W: tl.constexpr,
    FORMAT: tl.constexpr, TYPE: tl.constexpr, CAST_FP8: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Both parts of rows [N], N × P0 and N × P1, as TYPE. If MASKED, only what is ``inside`` is read.

    Codes of integers come less the middle of their range, those of fp8 divided by 256 unless CAST_FP8.
    """
    offsets0 = tl.arange(0, P0)
    start = cache + row * W
    raw0 = _load(start[:, None] + offsets0[None, :], inside, offsets0, D0, P0, MASKED)
    if FORMAT == "int4":
        first = _from_bits((raw0 & 15).to(tl.uint16) | 0x6400, 1032.0).to(TYPE)
        second = _from_bits((raw0 & 240).to(tl.uint16) | 0x5400, 72.0).to(TYPE)
    else:
        first = _decode(raw0, FORMAT, TYPE, CAST_FP8)
        if P1 > 0:
            offsets1 = tl.arange(0, P1)
            raw1 = _load(start[:, None] + D0 + offsets1[None, :], inside, offsets1, D - D0, P1, MASKED)
            second = _decode(raw1, FORMAT, TYPE, CAST_FP8)
        else:
            second = first
    return first, second


@triton.jit
def load_scales(
    numbers, row, inside,
    D: tl.constexpr, W: tl.constexpr, FORMAT: tl.constexpr, CAST_FP8: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """What rows' codes are to be multiplied with, and what is then to be added, float32 [N]; zeros outside.

    ``numbers`` is the cache again, as float16 for fp8 and as int32, of which each holds both numbers, for integers.
    """
    if FORMAT == "fp8":
        pointers = numbers + row * (W // 2) + D // 2
        scale = (tl.load(pointers, mask=inside, other=0.0) if MASKED else tl.load(pointers)).to(tl.float32)
        if not CAST_FP8:
            scale *= 256.0
        least = tl.zeros_like(scale)
    else:
        pointers = numbers + row * (W // 4) + (W // 4 - 1)
        both = tl.load(pointers, mask=inside, other=0) if MASKED else tl.load(pointers)
        scale = both.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        least = (both >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        least += scale * (8.0 if FORMAT == "int4" else 128.0)
    return scale, least


@triton.jit
def _load(pointers, inside, offsets, WIDTH: tl.constexpr, P: tl.constexpr, MASKED: tl.constexpr):
    if MASKED:
        mask = inside[:, None] & (offsets < WIDTH)[None, :] if WIDTH < P else inside[:, None]
        x = tl.load(pointers, mask=mask, other=0)
    elif WIDTH < P:
        x = tl.load(pointers, mask=(offsets < WIDTH)[None, :], other=0)
    else:
        x = tl.load(pointers)
    return x


@triton.jit
def _decode(raw, FORMAT: tl.constexpr, TYPE: tl.constexpr, CAST_FP8: tl.constexpr):
    if FORMAT == "plain":
        x = raw
    elif FORMAT == "int8":
        x = _from_bits(raw.to(tl.uint16) | 0x6400, 1152.0)
    elif CAST_FP8:
        x = raw.to(tl.float8e4nv, bitcast=True).to(tl.float16)
    else:  # the bits of e4m3 are those of a float16 256 times smaller, subnormal ones too
        bits = raw.to(tl.uint16)
        x = (((bits & 128) << 8) | ((bits & 127) << 7)).to(tl.float16, bitcast=True)
    return x.to(TYPE)


@triton.jit
def _from_bits(bits, offset):
    """float16 bits less the offset that they carry. Beyond a part's end it is not 0, but there queries are."""
    return bits.to(tl.float16, bitcast=True) - offset
