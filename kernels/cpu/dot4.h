// Integer products of a panel of 16 outputs: four unsigned codes of each, times the same four signed ones. For CPUs with
// AVX2 at least.
#pragma once

#include <cstdint>
#include <cstring>

#include "simd.h"

constexpr int kOutputs = 16;

typedef int32_t PanelInts __attribute__((vector_size(kOutputs * sizeof(int32_t))));
typedef uint32_t PanelBits __attribute__((vector_size(kOutputs * sizeof(uint32_t))));
typedef float PanelFloats __attribute__((vector_size(kOutputs * sizeof(float))));
typedef uint8_t Codes __attribute__((vector_size(kOutputs * 4)));

inline Codes load_codes(const uint8_t* from) {
    Codes codes;
    std::memcpy(&codes, from, sizeof codes);
    return codes;
}

inline Codes low_halves(Codes codes) { return codes & 15; }
inline Codes high_halves(Codes codes) { return (Codes)((PanelBits)codes >> 4) & 15; }

inline PanelFloats to_floats(PanelInts values) { return __builtin_convertvector(values, PanelFloats); }

inline PanelFloats load_halves(const Float16* from) {
    PanelFloats values;
    for (int lane = 0; lane < kOutputs; lane += kLanes) {
        const Floats part = load(from + lane);
        std::memcpy(reinterpret_cast<char*>(&values) + lane * sizeof(float), &part, sizeof part);
    }
    return values;
}

// sums[output] += the four codes of that output times the four bytes of `inputs`; codes are below 2^kBits.
#if defined(__AVX512VNNI__)
template <int kBits>
inline PanelInts dot4(PanelInts sums, Codes codes, int32_t inputs) {
    return (PanelInts)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)codes, _mm512_set1_epi32(inputs));
}
#elif defined(__AVX2__)
// vpmaddubsw adds two products in 16 bits: room for codes below 128, so an eighth bit is multiplied apart.
inline __m256i dot4_below_128(__m256i codes, __m256i inputs) {
    return _mm256_madd_epi16(_mm256_maddubs_epi16(codes, inputs), _mm256_set1_epi16(1));
}

template <int kBits>
inline PanelInts dot4(PanelInts sums, Codes codes, int32_t inputs) {
    __m256i halves[2], totals[2];
    std::memcpy(halves, &codes, sizeof codes);
    std::memcpy(totals, &sums, sizeof sums);
    const __m256i x = _mm256_set1_epi32(inputs);
    for (int half = 0; half < 2; ++half) {
        const __m256i c = halves[half];
        totals[half] = _mm256_add_epi32(totals[half], dot4_below_128(_mm256_and_si256(c, _mm256_set1_epi8(127)), x));
        if constexpr (kBits == 8) {
            const __m256i top = _mm256_and_si256(_mm256_srli_epi16(c, 1), _mm256_set1_epi8(64));
            totals[half] = _mm256_add_epi32(totals[half], _mm256_slli_epi32(dot4_below_128(top, x), 1));
        }
    }
    std::memcpy(&sums, totals, sizeof sums);
    return sums;
}
#endif
