// y = x Wᵀ + b for weights of 4- or 8-bit codes with a scale, and perhaps a minimum, for each 32 inputs (GGUF's Q4_0,
// Q4_1 and Q8_0). The rows of x are quantized to int8 first, with a scale for each 32 inputs too, and codes are multiplied
// with codes in integers:
//
//     y = sum over groups of  s_x · (s_w · (sum of c_w·c_x  -  zero · sum of c_x)  +  m_w · sum of c_x)
//
// The weight is packed once into panels of 16 outputs, one lane of a vector each: [panel][group][codes, scales, minimums].
// A vector of codes holds four inputs of each output, as vpdpbusd multiplies them; of 4 bits, the next four in its high
// halves. A tile of a few rows times a panel keeps its sums in registers over all of K.
//
// A row's result does not depend on the rows beside it: each sum adds the same products in the same order in any tile.
//
// On CPUs without AVX2 this file is empty, and the library without these two functions.
#if defined(__AVX2__)
#include <algorithm>
#include <memory>
#include <utility>

#include "dot4.h"
#include "parallel.h"
#include "simd.h"

namespace {

constexpr int kGroup = 32;     // inputs that share a scale
constexpr int kPanel = kOutputs;
#if defined(__AVX512F__)
constexpr int kTileRows = 12;  // 12 integer and 12 float sums, codes and scales fit into 32 registers
#else
constexpr int kTileRows = 3;
#endif

template <class T>
struct Arguments {
    const T* x;  // [rows, inputs]
    int64_t row_stride;
    const uint8_t* packed;
    const T* bias;  // [outputs], or null
    T* out;         // [rows, outputs], contiguous
    int64_t rows, inputs, outputs, bits, has_minimum;

    int64_t groups() const { return inputs / kGroup; }
    int64_t panels() const { return (outputs + kPanel - 1) / kPanel; }
};

// What the rows of x became.
struct Rows {
    int64_t inputs;
    std::unique_ptr<int8_t[]> codes;     // [rows, inputs]
    std::unique_ptr<float[]> scale;      // [rows, groups]
    std::unique_ptr<float[]> total;      // [rows, groups]: sums of the codes, times the scale
    std::unique_ptr<int32_t[]> at_zero;  // [rows, groups]: sums of the codes, times minus the weight's zero

    Rows(int64_t rows, int64_t inputs)
        : inputs(inputs),
          codes(new int8_t[rows * inputs]),
          scale(new float[rows * inputs / kGroup]),
          total(new float[rows * inputs / kGroup]),
          at_zero(new int32_t[rows * inputs / kGroup]) {}
};

template <class T>
void quantize(const T* x, int8_t* codes, float* scale, float* total, int32_t* at_zero, int zero) {
    Floats largest{}, not_a_number{};
    for (int i = 0; i < kGroup; i += kLanes) {
        const Floats value = load(x + i);
        largest = larger(largest, larger(value, -value));
        not_a_number += value * 0.0f;  // codes cannot be NaN, so the scale has to be
    }
    const float most = max_of(largest), inverse = most > 0 ? 127.0f / most : 0.0f;
    Ints sums{};
    for (int i = 0; i < kGroup; i += kLanes) {
        const Ints rounded = to_nearest(load(x + i) * inverse);
        const auto narrow = __builtin_convertvector(rounded, SignedBytes);
        std::memcpy(codes + i, &narrow, sizeof narrow);
        sums += rounded;
    }
    int32_t sum = 0;
    for (int lane = 0; lane < kLanes; ++lane) sum += sums[lane];
    *scale = most / 127.0f + sum_of(not_a_number);
    *total = *scale * static_cast<float>(sum);
    *at_zero = -zero * sum;
}

template <int kBits, bool kMinimum>
struct Layout {
    static constexpr int kCodes = kPanel * kGroup * kBits / 8;
    static constexpr int kGroupBytes = kCodes + kPanel * 2 * (1 + kMinimum);
    static constexpr int kZero = kMinimum ? 0 : 1 << (kBits - 1);
};

inline int32_t four(const int8_t* codes) {
    int32_t bytes;
    std::memcpy(&bytes, codes, sizeof bytes);
    return bytes;
}

// Rows [row, row + kRows) of x times one panel, in float32.
template <int kBits, bool kMinimum, int kRows>
void multiply_tile(const Rows& x, int64_t row, const uint8_t* weight, float* out) {
    using Format = Layout<kBits, kMinimum>;
    const int64_t groups = x.inputs / kGroup;
    PanelFloats sums[kRows] = {};
    for (int64_t group = 0; group < groups; ++group, weight += Format::kGroupBytes) {
        PanelInts dots[kRows];
#pragma GCC unroll 12
        for (int r = 0; r < kRows; ++r)
            dots[r] = kMinimum ? PanelInts{} : PanelInts{} + x.at_zero[(row + r) * groups + group];
#pragma GCC unroll 8
        for (int k = 0; k < kGroup; k += 32 / kBits) {
            const Codes both = load_codes(weight + kPanel * k * kBits / 8);
            const Codes first = kBits == 4 ? low_halves(both) : both;
#pragma GCC unroll 12
            for (int r = 0; r < kRows; ++r)
                dots[r] = dot4<kBits>(dots[r], first, four(&x.codes[(row + r) * x.inputs + group * kGroup + k]));
            if constexpr (kBits == 4) {
                const Codes second = high_halves(both);
#pragma GCC unroll 12
                for (int r = 0; r < kRows; ++r)
                    dots[r] = dot4<kBits>(dots[r], second, four(&x.codes[(row + r) * x.inputs + group * kGroup + k + 4]));
            }
        }
        const auto* scales = reinterpret_cast<const Float16*>(weight + Format::kCodes);
        const PanelFloats scale = load_halves(scales);
        const PanelFloats minimum = kMinimum ? load_halves(scales + kPanel) : PanelFloats{};
#pragma GCC unroll 12
        for (int r = 0; r < kRows; ++r) {
            const int64_t at = (row + r) * groups + group;
            sums[r] += to_floats(dots[r]) * (scale * x.scale[at]);
            if constexpr (kMinimum) sums[r] += minimum * x.total[at];
        }
    }
    std::memcpy(out, sums, sizeof sums);
}

using MultiplyTile = void (*)(const Rows&, int64_t, const uint8_t*, float*);

template <int kBits, bool kMinimum, int... kRows>
MultiplyTile tile_function(int64_t rows, std::integer_sequence<int, kRows...>) {
    static constexpr MultiplyTile functions[] = {multiply_tile<kBits, kMinimum, kRows + 1>...};
    return functions[rows - 1];
}

template <class T>
void store_tile(const Arguments<T>& a, int64_t row, int64_t rows, int64_t panel, const float* sums) {
    const int64_t column = panel * kPanel;
    const int count = static_cast<int>(std::min<int64_t>(kPanel, a.outputs - column));
    for (int64_t r = row; r < row + rows; ++r, sums += kPanel) {
        for_each_vector(count, [&](int64_t lane, int width) {
            Floats value = load(sums + lane);
            if (a.bias) value += load(a.bias + column + lane, width);
            store(a.out + r * a.outputs + column + lane, value, width);
        });
    }
}

template <class T, int kBits, bool kMinimum>
void multiply(const Arguments<T>& a) {
    using Format = Layout<kBits, kMinimum>;
    const int64_t groups = a.groups();
    const Rows x(a.rows, a.inputs);
    parallel_for(a.rows, a.rows * a.inputs, [&](int64_t row) {
        for (int64_t g = 0; g < groups; ++g)
            quantize(a.x + row * a.row_stride + g * kGroup, &x.codes[row * a.inputs + g * kGroup],
                     &x.scale[row * groups + g], &x.total[row * groups + g], &x.at_zero[row * groups + g],
                     Format::kZero);
    });
    parallel_for_panels(a.rows, a.inputs, kTileRows, a.panels(), [&](int64_t begin, int64_t end, int64_t panel) {
        const int64_t rows = end - begin, tiles = (rows + kTileRows - 1) / kTileRows;
        const uint8_t* weight = a.packed + panel * groups * Format::kGroupBytes;
        for (int64_t tile = 0; tile < tiles; ++tile) {
            const int64_t row = begin + rows * tile / tiles, count = begin + rows * (tile + 1) / tiles - row;
            alignas(64) float sums[kTileRows * kPanel];
            tile_function<kBits, kMinimum>(count, std::make_integer_sequence<int, kTileRows>())(x, row, weight, sums);
            store_tile(a, row, count, panel, sums);
        }
    });
}

template <class T>
void linear(const Arguments<T>& a) {
    if (a.bits == 4) return a.has_minimum ? multiply<T, 4, true>(a) : multiply<T, 4, false>(a);
    return a.has_minimum ? multiply<T, 8, true>(a) : multiply<T, 8, false>(a);
}

}  // namespace

extern "C" void octavo_linear_groups_f32(const Arguments<float>* arguments) { linear(*arguments); }
extern "C" void octavo_linear_groups_bf16(const Arguments<BFloat16>* arguments) { linear(*arguments); }
#endif
