// Rows of the KV cache in a format other than the queries' dtype: what `kernels/kv_format.py` describes, byte for byte.
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "simd.h"

using Row = const uint8_t*;  // a token's key or value of one head, as it lies in the cache

// kernels/cpu/native.py knows these numbers.
enum KVFormat : int64_t { kAsQueries, kBFloat16, kFloat16, kFloat8, kInt8, kInt4 };

constexpr float kLargestHalf = 65504.0f, kLargestFloat8 = 448.0f;

typedef uint8_t Bytes __attribute__((vector_size(kLanes)));

// The first `count` bytes, and zeros, each in a lane of Wide.
template <class Wide>
inline Wide load_bytes(Row from, int count) {
    Bytes bytes{};
    if (count == kLanes) std::memcpy(&bytes, from, kLanes);
    else std::memcpy(&bytes, from, count);
#if defined(__AVX512BW__)
    if constexpr (std::is_same_v<Wide, HalfBits>) return (Wide)_mm256_cvtepu8_epi16((__m128i)bytes);
    else return (Wide)_mm512_cvtepu8_epi32((__m128i)bytes);
#elif defined(__AVX2__)  // of which GCC 12 makes scalar code
    const __m128i low = _mm_cvtsi64_si128((int64_t)bytes);
    if constexpr (std::is_same_v<Wide, HalfBits>) return (Wide)_mm_cvtepu8_epi16(low);
    else return (Wide)_mm256_cvtepu8_epi32(low);
#else
    return __builtin_convertvector(bytes, Wide);
#endif
}

inline void store_bytes(uint8_t* to, Bits values, int count) {
    const Bytes bytes = __builtin_convertvector(values, Bytes);
    std::memcpy(to, &bytes, count);
}

inline Floats to_floats(Bits small) { return __builtin_convertvector((Ints)small, Floats); }

// A row's scale or least value, in all lanes.
inline Floats broadcast_half(Row from) {
    uint16_t half;
    std::memcpy(&half, from, sizeof half);
    return widen(HalfBits{} + half);
}

// --- decoding -----------------------------------------------------------------------------------------------------
// Each of these writes a row's `dims` values as Math's factors. They write whole vectors: `to` has room for `dims` rounded
// up to 32.

// `values(d, count)` are the row's from d on.
template <class Math, class Values>
inline void write_factors(typename Math::Factor* to, int dims, Values values) {
    int d = 0;
    for (; d + 2 * kLanes <= dims; d += 2 * kLanes)
        Math::store_factors(to + d, values(d, kLanes), values(d + kLanes, kLanes));
    for (; d < dims; d += kLanes) Math::store_factors(to + d, values(d, std::min(kLanes, dims - d)));
}

template <class Math, class Stored>
inline void decode_plain(Row row, typename Math::Factor* to, int dims) {
    const Stored* from = reinterpret_cast<const Stored*>(row);
    write_factors<Math>(to, dims, [&](int d, int count) { return load(from + d, count); });
}

// A float8 with its bits moved to where a float16 has them is 2^-8 of what it was.
template <class Math>
inline void decode_float8(Row row, typename Math::Factor* to, int dims) {
    const Floats scale = broadcast_half(row + dims) * 0x1p8f;
    write_factors<Math>(to, dims, [&](int d, int count) {
        const HalfBits codes = load_bytes<HalfBits>(row + d, count);
        return widen((codes & 0x80) << 8 | (codes & 0x7f) << 7) * scale;
    });
}

template <class Math>
inline void decode_int8(Row row, typename Math::Factor* to, int dims) {
    const Floats scale = broadcast_half(row + dims), least = broadcast_half(row + dims + 2);
    write_factors<Math>(to, dims, [&](int d, int count) {
        return to_floats(load_bytes<Bits>(row + d, count)) * scale + least;
    });
}

template <class Math>
inline void decode_int4(Row row, typename Math::Factor* to, int dims) {
    const int half = dims / 2;
    const Floats scale = broadcast_half(row + half), least = broadcast_half(row + half + 2);
    const auto values = [&](Bits codes) { return to_floats(codes) * scale + least; };
    write_factors<Math>(to, half, [&](int d, int count) { return values(load_bytes<Bits>(row + d, count) & 15); });
    // After all of the first half, whose last vector reaches into the second.
    write_factors<Math>(to + half, half, [&](int d, int count) { return values(load_bytes<Bits>(row + d, count) >> 4); });
}

// Rows of floats or bfloat16, as Math multiplies them, decoded from a tile's rows of another format.
template <class Math, int kRows>
class DecodedRows {
  public:
    // Decodes `count` rows of `dims` values; they stay until the next call.
    const Row* of(KVFormat format, const Row* from, int count, int dims, int padded) {
        if (static_cast<int64_t>(values_.size()) < kRows * padded) values_.resize(kRows * padded);
        switch (format) {
            case kBFloat16: return each<decode_plain<Math, BFloat16>>(from, count, dims, padded);
            case kFloat16: return each<decode_plain<Math, Float16>>(from, count, dims, padded);
            case kFloat8: return each<decode_float8<Math>>(from, count, dims, padded);
            case kInt8: return each<decode_int8<Math>>(from, count, dims, padded);
            case kInt4: return each<decode_int4<Math>>(from, count, dims, padded);
            default: return from;
        }
    }

  private:
    template <void (*kDecode)(Row, typename Math::Factor*, int)>
    const Row* each(const Row* from, int count, int dims, int padded) {
        for (int i = 0; i < count; ++i) {
            typename Math::Factor* to = values_.data() + i * padded;
            kDecode(from[i], to, dims);
            rows_[i] = reinterpret_cast<Row>(to);
        }
        return rows_;
    }

    std::vector<typename Math::Factor> values_;
    Row rows_[kRows];
};

// --- encoding -----------------------------------------------------------------------------------------------------

// NaN stays NaN.
inline Floats clamp_to_half(Floats x) {
    x = x > kLargestHalf ? splat(kLargestHalf) : x;
    return x < -kLargestHalf ? splat(-kLargestHalf) : x;
}

// The smallest and the largest value of a head, clamped; both NaN if any value is.
struct Range {
    float least, most;

    template <class T>
    static Range of(const T* from, int64_t dims) {
        Floats least = splat(kLargestHalf), most = -least;
        Ints unordered{};
        for_each_vector(dims, [&](int64_t d, int count) {
            Floats x = clamp_to_half(load(from + d, count));
            for (int lane = count; lane < kLanes; ++lane) x[lane] = x[0];
            unordered |= x != x;
            least = smaller(x, least);
            most = larger(x, most);
        });
        for (int lane = 0; lane < kLanes; ++lane)
            if (unordered[lane]) return {NAN, NAN};
        return {-max_of(-least), max_of(most)};
    }
};

// Rounds to a half, writes it, and returns what it became.
inline float put_half(uint8_t* to, float value) {
    Float16 halves[kLanes];
    store(halves, splat(value));
    std::memcpy(to, halves, sizeof *halves);
    return load(halves)[0];
}

inline float divisor(float scale) { return scale > 0 ? scale : 1.0f; }

template <class T, class Stored>
inline void encode_plain(const T* from, int64_t dims, uint8_t* row) {
    Stored* to = reinterpret_cast<Stored*>(row);
    for_each_vector(dims, [&](int64_t d, int count) {
        const Floats x = load(from + d, count);
        store(to + d, std::is_same_v<Stored, Float16> ? clamp_to_half(x) : x, count);
    });
}

template <class T>
inline void encode_float8(const T* from, int64_t dims, uint8_t* row) {
    const Range range = Range::of(from, dims);
    const float absmax = std::max(-range.least, range.most);
    const float step = divisor(put_half(row + dims, absmax / kLargestFloat8));
    for_each_vector(dims, [&](int64_t d, int count) {
        Floats x = clamp_to_half(load(from + d, count)) / step;
        x = smaller(larger(x, splat(-kLargestFloat8)), splat(kLargestFloat8));
        store_bytes(row + d, ((Bits)x >> 24 & 0x80) | shrink<3, 7>(x), count);
    });
}

// Codes of 0 to `most`; the scale and the least value go to `end`.
template <class T>
class IntegerCodes {
  public:
    IntegerCodes(const T* from, int64_t dims, uint8_t* end, float most) : from_(from), most_(most) {
        const Range range = Range::of(from, dims);
        least_ = put_half(end + 2, range.least);
        const float scale = (range.most - least_) / most;
        step_ = divisor(put_half(end, scale < 0 ? 0 : scale));
    }

    Bits at(int64_t d, int count) const {
        constexpr float kWhole = 12582912.0f;  // 1.5 · 2^23: added and taken away again, it rounds ties to even
        Floats code = (clamp_to_half(load(from_ + d, count)) - least_) / step_;
        code = code > 0.0f ? code : Floats{};  // NaN too
        code = smaller(code, splat(most_));
        code = (code + kWhole) - kWhole;
        return (Bits)__builtin_convertvector(code, Ints);
    }

  private:
    const T* from_;
    float most_, least_, step_;
};

template <class T>
inline void encode_int8(const T* from, int64_t dims, uint8_t* row) {
    const IntegerCodes<T> codes(from, dims, row + dims, 255.0f);
    for_each_vector(dims, [&](int64_t d, int count) { store_bytes(row + d, codes.at(d, count), count); });
}

template <class T>
inline void encode_int4(const T* from, int64_t dims, uint8_t* row) {
    const int64_t half = dims / 2;
    const IntegerCodes<T> codes(from, dims, row + half, 15.0f);
    for_each_vector(half, [&](int64_t d, int count) {
        store_bytes(row + d, codes.at(d, count) | codes.at(half + d, count) << 4, count);
    });
}

// Writes one head of `dims` values.
template <class T>
using EncodeRow = void (*)(const T* from, int64_t dims, uint8_t* row);

template <class T>
EncodeRow<T> encoder(KVFormat format) {
    switch (format) {
        case kBFloat16: return encode_plain<T, BFloat16>;
        case kFloat16: return encode_plain<T, Float16>;
        case kFloat8: return encode_float8<T>;
        case kInt8: return encode_int8<T>;
        case kInt4: return encode_int4<T>;
        default: return nullptr;
    }
}
