// Portable SIMD: one native vector of floats, how to load and store it as float32 or bfloat16, and exp2.
//
// GCC's vector extension rather than intrinsics: the same source becomes AVX-512, AVX2, SSE or NEON code, whichever
// -march=native names.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
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
typedef uint16_t HalfBits __attribute__((vector_size(kLanes * sizeof(uint16_t))));

// The upper half of a float32.
struct BFloat16 {
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

inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

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
