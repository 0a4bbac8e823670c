// The two arithmetics of attention: float32 multiply-adds anywhere, bfloat16 pair dot products where the CPU has them.
//
// Both multiply a row-major left matrix by a packed right matrix and accumulate in float32. They differ in `kPack`, how
// many neighbours along the summed dimension one instruction takes: a packed matrix [depth, columns] is laid out as
// [depth / kPack][columns][kPack], so that one vector holds kPack summands for each of kLanes columns.
#pragma once

#include "kv_rows.h"

constexpr int kKeys = 64;       // keys at a time: columns of the scores, depth of the weighted sum of values
constexpr int kCacheLine = 64;  // bytes
constexpr int kGranule = 32;    // head dimensions, and keys at the end, are padded with zeros to a multiple of this
#if defined(__AVX512F__)
constexpr int kRows = 6, kWide = 4;  // 24 accumulators, 4 right vectors and 1 broadcast fill 29 of 32 registers
#else
constexpr int kRows = 6, kWide = 2;  // 12 + 2 + 1 of 16
#endif

// Two vectors holding a0 b0 a1 b1 …
template <class Vector, class Element, int kCount>
inline void interleave(Vector a, Vector b, Vector& low, Vector& high) {
#if defined(__clang__)
    for (int i = 0; i < kCount / 2; ++i) {
        low[2 * i] = a[i], low[2 * i + 1] = b[i];
        high[2 * i] = a[kCount / 2 + i], high[2 * i + 1] = b[kCount / 2 + i];
    }
#else
    typedef Element Indices __attribute__((vector_size(sizeof(Vector))));
    Indices first;
    for (int i = 0; i < kCount; ++i) first[i] = i / 2 + i % 2 * kCount;
    low = __builtin_shuffle(a, b, first);
    high = __builtin_shuffle(a, b, first + kCount / 2);
#endif
}

// Transposes a kLanes × kLanes matrix: interleaving rows i and i + kLanes/2 for all i is one step of a perfect shuffle,
// and log2(kLanes) such steps exchange rows and columns.
inline void transpose(Floats (&rows)[kLanes]) {
    for (int step = 1; step < kLanes; step *= 2) {
        Floats shuffled[kLanes];
        for (int i = 0; i < kLanes / 2; ++i)
            interleave<Floats, int32_t, kLanes>(rows[i], rows[i + kLanes / 2], shuffled[2 * i], shuffled[2 * i + 1]);
        for (int i = 0; i < kLanes; ++i) rows[i] = shuffled[i];
    }
}

// Widens everything to float32.
template <class T>
struct FloatMath {
    using Stored = T;      // as in the cache
    using Factor = float;  // as multiplied
    using Vector = Floats;
    using Decoded = FloatMath<float>;  // packs rows that were decoded to factors
    static constexpr int kPack = 1;

    static Vector load_right(const Factor* from) { return load(from); }
    static Vector broadcast_left(const Factor* from) { return splat(*from); }
    static Floats multiply_add(Floats sum, Vector left, Vector right) { return sum + left * right; }

    static Floats load_units(const Stored* from, int count) { return load(from, count); }
    static void store_factors(Factor* to, Floats vector) { store(to, vector); }
    static void store_factors(Factor* to, Floats low, Floats high) { store(to, low), store(to + kLanes, high); }
    static void copy_row(Factor* to, const Stored* from, int dims, int padded) {
        for (int d = 0; d < padded; d += kLanes) store(to + d, tail(from, d, dims));
    }
    static void pack_value_rows(Factor* to, const Row* row, int dims, int padded) {
        copy_row(to, reinterpret_cast<const Stored*>(*row), dims, padded);
    }

  private:
    static Floats tail(const Stored* from, int d, int dims) {
        return d < dims ? load(from + d, dims - d < kLanes ? dims - d : kLanes) : Floats{};
    }
};

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
// Multiplies bfloat16 pairs exactly and adds both products to a float32 lane: 32 multiply-adds per instruction.
struct PairMath {
    using Stored = BFloat16;
    using Factor = BFloat16;
    using Vector = __m512bh;
    using Decoded = PairMath;
    static constexpr int kPack = 2;

    static Vector load_right(const Factor* from) { return (Vector)_mm512_loadu_si512(from); }
    static Vector broadcast_left(const Factor* from) {
        int pair;
        std::memcpy(&pair, from, sizeof pair);
        return (Vector)_mm512_set1_epi32(pair);
    }
    static Floats multiply_add(Floats sum, Vector left, Vector right) { return _mm512_dpbf16_ps(sum, left, right); }

    // kLanes pairs, as the bits of floats; `count` of them are there.
    static Floats load_units(const Stored* from, int count) {
        return (Floats)_mm512_maskz_loadu_epi32((__mmask16)((1u << count) - 1), from);
    }
    static void store_factors(Factor* to, Floats vector) {
        _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh(vector));
    }
    static void store_factors(Factor* to, Floats low, Floats high) {
        _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
    static void copy_row(Factor* to, const Stored* from, int dims, int padded) {
        for (int d = 0; d < padded; d += 32) _mm512_storeu_si512(to + d, load_32(from, d, dims));
    }
    static void pack_value_rows(Factor* to, const Row* row, int dims, int padded) {
        typedef uint16_t Words __attribute__((vector_size(64)));
        const auto *first = reinterpret_cast<const Stored*>(row[0]), *second = reinterpret_cast<const Stored*>(row[1]);
        for (int d = 0; d < padded; d += 32) {
            const Words even = (Words)load_32(first, d, dims), odd = (Words)load_32(second, d, dims);
            Words low, high;
            interleave<Words, uint16_t, 32>(even, odd, low, high);
            _mm512_storeu_si512(to + 2 * d, (__m512i)low);
            _mm512_storeu_si512(to + 2 * d + 32, (__m512i)high);
        }
    }

  private:
    static __m512i load_32(const Stored* from, int d, int dims) {
        const int count = dims - d;
        const __mmask32 there = count >= 32 ? ~0u : count > 0 ? (1u << count) - 1 : 0;
        return _mm512_maskz_loadu_epi16(there, from + d);
    }
};
using Bf16Math = PairMath;
#else
using Bf16Math = FloatMath<BFloat16>;
#endif

// Fetches rows into the cache little by little, while something else is computed: memory then works all the time, and the
// hardware's prefetchers do not see from one cache block to the next.
struct Fetcher {
    const Row* next;
    const Row* end;
    int64_t row_bytes;

    void fetch_some() {
        for (int i = 0; i < 2 && next < end; ++i, ++next)
            for (int64_t byte = 0; byte < row_bytes; byte += kCacheLine)
                __builtin_prefetch(*next + byte, 0, 2);
    }
};

// Packs `keys` rows, a multiple of kGranule, of `dims` elements, transposed, into the right matrix [padded dims, kKeys].
template <class Math>
void pack_keys(typename Math::Factor* to, const Row* rows, int keys, int dims, int padded) {
    using Stored = typename Math::Stored;
    constexpr int kStep = kLanes * Math::kPack;  // elements of a row that fill a vector of units
    for (int key = 0; key < keys; key += kLanes)
        for (int d = 0; d < padded; d += kStep) {
            const int left = dims - d, units = left >= kStep ? kLanes : left > 0 ? left / Math::kPack : 0;
            Floats square[kLanes];
            for (int i = 0; i < kLanes; ++i)
                square[i] = units ? Math::load_units(reinterpret_cast<const Stored*>(rows[key + i]) + d, units) : Floats{};
            transpose(square);
            for (int i = 0; i < kLanes; ++i)
                std::memcpy(to + (d * kKeys) + (i * kKeys + key) * Math::kPack, &square[i], sizeof(Floats));
        }
}

// Packs `keys` rows of `dims` elements into the right matrix [keys, padded dims].
template <class Math>
void pack_values(typename Math::Factor* to, const Row* rows, int keys, int dims, int padded) {
    for (int key = 0; key < keys; key += Math::kPack) Math::pack_value_rows(to + key * padded, rows + key, dims, padded);
}

// A left matrix [rows, depth], a packed right one [depth, columns], and what their product goes to or is added to.
template <class Math>
struct Product {
    const typename Math::Factor* left;
    int left_stride;
    const typename Math::Factor* right;
    int right_stride, columns, depth;  // the stride in columns
    float* out;
    int out_stride;
};

// One register block of a product: R rows and N vectors of columns, from `column` on.
template <class Math, bool kAdd, int R, int N>
inline void multiply_block(const Product<Math>& p, int column, Fetcher& fetcher) {
    Floats sums[R][N];  // kept in registers only if every loop over it is unrolled
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n)
            sums[r][n] = kAdd ? load(p.out + r * p.out_stride + column + n * kLanes) : Floats{};
    const typename Math::Factor* right = p.right + column * Math::kPack;
    for (int k = 0; k < p.depth; k += Math::kPack, right += p.right_stride * Math::kPack) {
        fetcher.fetch_some();
        typename Math::Vector columns[N];
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) columns[n] = Math::load_right(right + n * kLanes * Math::kPack);
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) {
            const typename Math::Vector row = Math::broadcast_left(p.left + r * p.left_stride + k);
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n) sums[r][n] = Math::multiply_add(sums[r][n], row, columns[n]);
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) store(p.out + r * p.out_stride + column + n * kLanes, sums[r][n]);
}

// The product of at most kRows rows; the number of columns is a multiple of kGranule.
template <class Math, bool kAdd, int R = kRows>
inline void multiply(const Product<Math>& p, int rows, Fetcher& fetcher) {
    if constexpr (R > 1)
        if (rows < R) return multiply<Math, kAdd, R - 1>(p, rows, fetcher);
    int column = 0;
    for (; column + kWide * kLanes <= p.columns; column += kWide * kLanes)
        multiply_block<Math, kAdd, R, kWide>(p, column, fetcher);
    for (; column < p.columns; column += 2 * kLanes) multiply_block<Math, kAdd, R, 2>(p, column, fetcher);
}
