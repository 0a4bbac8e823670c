// Portable SIMD: one native vector of floats, how to load and store it as float32, bfloat16 or float16, and exp2.
//
// GCC's vector extension rather than intrinsics: the same source becomes AVX-512, AVX2, SSE or NEON code, whichever
// -march=native names.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Floats __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t Ints __attribute__((vector_size(kLanes * sizeof(int32_t))));
typedef uint32_t Bits __attribute__((vector_size(kLanes * sizeof(uint32_t))));
typedef int8_t SignedBytes __attribute__((vector_size(kLanes)));
typedef uint16_t HalfBits __attribute__((vector_size(kLanes * sizeof(uint16_t))));

// The upper half of a float32.
struct BFloat16 {
    uint16_t bits;
};

// IEEE 754's binary16.
struct Float16 {
    uint16_t bits;
};

inline Floats splat(float value) { return value - Floats{}; }

inline Floats load(const float* from) {
    Floats vector;
    std::memcpy(&vector, from, sizeof vector);
    return vector;
}

inline Floats load(const BFloat16* from) {
    HalfBits halves;
    std::memcpy(&halves, from, sizeof halves);
    return (Floats)(__builtin_convertvector(halves, Bits) << 16);
}

inline void store(float* to, Floats vector) { std::memcpy(to, &vector, sizeof vector); }

// Rounds to the nearest, ties to even, as torch does; any NaN becomes the quiet one.
inline void store(BFloat16* to, Floats vector) {
    const Bits bits = (Bits)vector;
    const Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const Bits is_nan = (Bits)(vector != vector);
    const HalfBits halves = __builtin_convertvector((is_nan & 0x7fc0) | (~is_nan & rounded), HalfBits);
    std::memcpy(to, &halves, sizeof halves);
}

inline Floats widen(HalfBits halves) {
#if defined(__AVX512F__)
    return _mm512_cvtph_ps((__m256i)halves);
#elif defined(__F16C__)
    return _mm256_cvtph_ps((__m128i)halves);
#else
    const Bits bits = __builtin_convertvector(halves, Bits), rest = (bits & 0x7fff) << 13;
    const Bits special = (Bits)(rest >= 0x0f800000u), tiny = (Bits)(rest < 0x00800000u);
    // A larger bias; an infinity's exponent; and for subnormals 2^-14 + themselves, less 2^-14.
    const Bits moved = rest + (112u << 23) + (special & (112u << 23)) + (tiny & (1u << 23));
    const Floats value = (Floats)(tiny & (Bits)((Floats)moved - 0x1p-14f)) + (Floats)(~tiny & moved);
    return (Floats)((Bits)value | (bits & 0x8000) << 16);
#endif
}

// The bits of floats in a smaller format with `kMantissa` explicit bits of mantissa and an exponent bias of `kBias`, in
// the lowest bits, sign apart: to the nearest, ties to even. For finite values that do not round to more than it can hold.
template <int kMantissa, int kBias>
inline Bits shrink(Floats vector) {
    constexpr int kShift = 23 - kMantissa;
    const Bits bits = (Bits)vector & 0x7fffffff;
    const Bits normal = (bits - ((127u - kBias) << 23) + ((1u << (kShift - 1)) - 1) + ((bits >> kShift) & 1)) >> kShift;
    // Adding a number whose last bit is worth as much as that of the format's subnormals rounds to those.
    constexpr uint32_t kAnchor = static_cast<uint32_t>(127 + 1 - kBias + 23 - kMantissa) << 23;
    const Floats anchor = (Floats)(Bits{} + kAnchor);
    const Bits subnormal = (Bits)((Floats)bits + anchor) - kAnchor;
    const Bits is_normal = (Bits)(bits >= static_cast<uint32_t>(127 + 1 - kBias) << 23);
    return (is_normal & normal) | (~is_normal & subnormal);
}

inline Floats load(const Float16* from) {
    HalfBits halves;
    std::memcpy(&halves, from, sizeof halves);
    return widen(halves);
}

// For NaN, and values that float16 has room for.
inline void store(Float16* to, Floats vector) {
#if defined(__AVX512F__)
    const HalfBits halves = (HalfBits)_mm512_cvtps_ph(vector, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__F16C__)
    const HalfBits halves = (HalfBits)_mm256_cvtps_ph(vector, _MM_FROUND_TO_NEAREST_INT);
#else
    const Bits is_nan = (Bits)(vector != vector), sign = ((Bits)vector >> 16) & 0x8000;
    const HalfBits halves =
        __builtin_convertvector(sign | (is_nan & 0x7e00) | (~is_nan & shrink<10, 15>(vector)), HalfBits);
#endif
    std::memcpy(to, &halves, sizeof halves);
}

// The same for the first `count` lanes only: the others are zero when loaded, and left alone when stored.
template <class T>
inline Floats load(const T* from, int count) {
    if (count == kLanes) return load(from);
    T padded[kLanes] = {};
    std::memcpy(padded, from, count * sizeof(T));
    return load(padded);
}

template <class T>
inline void store(T* to, Floats vector, int count) {
    if (count == kLanes) return store(to, vector);
    T padded[kLanes];
    store(padded, vector);
    std::memcpy(to, padded, count * sizeof(T));
}

// What a value is after having been stored as T and loaded again.
template <class T>
inline Floats rounded_to(Floats vector) {
    T stored[kLanes];
    store(stored, vector);
    return load(stored);
}

// Calls body(i, count) for each vector's worth of [0, n): count is kLanes, but for the last.
template <class Body>
inline void for_each_vector(int64_t n, Body body) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) body(i, kLanes);
    if (i < n) body(i, static_cast<int>(n - i));
}

// To the nearest whole number, ties to even; what does not fit, or is NaN, gives the smallest of all.
inline Ints to_nearest(Floats vector) {
#if defined(__AVX512F__)
    return (Ints)_mm512_cvtps_epi32(vector);
#elif defined(__AVX__)
    return (Ints)_mm256_cvtps_epi32(vector);
#elif defined(__SSE2__)
    return (Ints)_mm_cvtps_epi32(vector);
#else
    Ints whole;
    for (int lane = 0; lane < kLanes; ++lane) whole[lane] = static_cast<int32_t>(std::lrint(vector[lane]));
    return whole;
#endif
}

inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }
inline Floats smaller(Floats a, Floats b) { return a < b ? a : b; }

#if defined(__AVX512F__)
inline float sum_of(Floats vector) { return _mm512_reduce_add_ps(vector); }
inline float max_of(Floats vector) { return _mm512_reduce_max_ps(vector); }
#else
inline float sum_of(Floats vector) {
    float total = 0;
    for (int lane = 0; lane < kLanes; ++lane) total += vector[lane];
    return total;
}

inline float max_of(Floats vector) {
    float most = vector[0];
    for (int lane = 1; lane < kLanes; ++lane) most = vector[lane] > most ? vector[lane] : most;
    return most;
}
#endif

// 2^x within 2e-7 relative for x in [-126, 127]; zero below, NaN for NaN; not for use above.
//
// x = n + f with n whole and |f| <= 1/2. Adding 1.5·2^23 + 127 leaves n + 127, the biased exponent of 2^n, in the low
// bits of the sum; 2^f is its Taylor polynomial of degree 6.
inline Floats exp2(Floats x) {
    constexpr float kShift = 12582912.0f + 127.0f;
    const Floats shifted = x + kShift;
    const Floats f = x - (shifted - kShift);
    Floats power = f * 1.5403530e-4f + 1.3333558e-3f;
    power = power * f + 9.6181291e-3f;
    power = power * f + 5.5504109e-2f;
    power = power * f + 2.4022651e-1f;
    power = power * f + 6.9314718e-1f;
    power = power * f + 1.0f;
    const Floats scale = (Floats)((Bits)shifted << 23);
    return x < -126.0f ? Floats{} : power * scale;
}
