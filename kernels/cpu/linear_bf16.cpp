// y = x Wᵀ + b in bfloat16, for CPUs with AVX-512-BF16.
//
// The weight is packed once into panels of 32 outputs; in a panel, the inputs come in pairs, as vdpbf16ps multiplies them:
// [panel][K / 2][32 outputs][2 inputs]. A tile of up to 12 rows times a panel has its 24 sums in registers over all of K.
// So a panel is read from memory once, and for the tiles after the first from cache, while the next panel is fetched.
//
// A row's result does not depend on the rows beside it: each sum adds the same products in the same order in any tile.
//
// On other CPUs this file is empty, and the library without these two functions.
#if defined(__AVX512BF16__)
#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

#include "parallel.h"

namespace {

constexpr int kPanel = 32;      // outputs in a panel: two vectors of sums
constexpr int kTileRows = 12;   // 12 · 2 sums, 2 vectors of weights and a pair of inputs fit into 32 registers

struct Arguments {
    const uint16_t* x;  // [rows, inputs]
    int64_t row_stride;
    const uint16_t* packed;
    const uint16_t* bias;  // [outputs], or null
    uint16_t* out;         // [rows, outputs], contiguous
    int64_t rows, inputs, outputs;

    int64_t pairs() const { return (inputs + 1) / 2; }
    int64_t panels() const { return (outputs + kPanel - 1) / kPanel; }
    int64_t panel_size() const { return pairs() * kPanel * 2; }
};

inline __m512 widen(__m256i halves) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16)); }

inline __mmask16 lanes(int64_t count) {
    return static_cast<__mmask16>((1u << std::clamp<int64_t>(count, 0, 16)) - 1);
}

// The sums of kRows rows for one panel.
template <int kRows>
struct Tile {
    __m512 sums[kRows][2];

    Tile() {
        for (auto& sum : sums) sum[0] = sum[1] = _mm512_setzero_ps();
    }

    // Adds one pair of inputs: `inputs_of(row)` has both in its 32 bits.
    template <class InputsOf>
    void add(const uint16_t* weights, InputsOf inputs_of) {
        const __m512bh first = (__m512bh)_mm512_loadu_si512(weights);
        const __m512bh second = (__m512bh)_mm512_loadu_si512(weights + kPanel);
#pragma GCC unroll 12
        for (int row = 0; row < kRows; ++row) {
            const __m512bh inputs = (__m512bh)_mm512_set1_epi32(inputs_of(row));
            sums[row][0] = _mm512_dpbf16_ps(sums[row][0], first, inputs);
            sums[row][1] = _mm512_dpbf16_ps(sums[row][1], second, inputs);
        }
    }

    void store(const Arguments& a, int64_t first_row, int64_t panel) const {
        for (int half = 0; half < 2; ++half) {
            const int64_t column = panel * kPanel + half * 16;
            const __mmask16 mask = lanes(a.outputs - column);
            const __m512 bias = a.bias ? widen(_mm256_maskz_loadu_epi16(mask, a.bias + column)) : _mm512_setzero_ps();
            for (int row = 0; row < kRows; ++row) {
                const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_add_ps(sums[row][half], bias));
                _mm256_mask_storeu_epi16(a.out + (first_row + row) * a.outputs + column, mask, (__m256i)rounded);
            }
        }
    }
};

// Memory to bring near while something else is computed.
struct Fetch {
    const char *at, *end;

    void next(int64_t bytes) {
        for (const char* stop = std::min(at + bytes, end); at < stop; at += 64) _mm_prefetch(at, _MM_HINT_T1);
    }
};

template <int kRows>
void multiply_tile(const Arguments& a, int64_t row, int64_t panel, Fetch fetch) {
    Tile<kRows> tile;
    const uint16_t* x = a.x + row * a.row_stride;
    const uint16_t* weights = a.packed + panel * a.panel_size();
    const int64_t whole = a.inputs / 2;
    const int64_t fetched_per_pair = (fetch.end - fetch.at) / std::max<int64_t>(whole, 1) + 64;
    for (int64_t pair = 0; pair < whole; ++pair, weights += 2 * kPanel) {
        fetch.next(fetched_per_pair);
        tile.add(weights, [&](int r) {
            int32_t both;
            std::memcpy(&both, x + r * a.row_stride + 2 * pair, sizeof both);
            return both;
        });
    }
    if (a.inputs % 2) tile.add(weights, [&](int r) { return int32_t{x[r * a.row_stride + 2 * whole]}; });
    tile.store(a, row, panel);
}

using MultiplyTile = void (*)(const Arguments&, int64_t, int64_t, Fetch);

template <int... kRows>
constexpr MultiplyTile tile_function(int rows, std::integer_sequence<int, kRows...>) {
    constexpr MultiplyTile functions[] = {multiply_tile<kRows + 1>...};
    return functions[rows - 1];
}

// Rows [begin, end) times one panel, in tiles of nearly equal size; each fetches its share of the panel that comes next.
void multiply_panel(const Arguments& a, int64_t begin, int64_t end, int64_t panel) {
    const int64_t rows = end - begin, tiles = (rows + kTileRows - 1) / kTileRows;
    const char* next_panel = reinterpret_cast<const char*>(a.packed + (panel + 1) * a.panel_size());
    const int64_t bytes = panel + 1 < a.panels() ? a.panel_size() * 2 : 0;
    for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t row = rows * tile / tiles, next_row = rows * (tile + 1) / tiles;
        const auto multiply = tile_function(static_cast<int>(next_row - row), std::make_integer_sequence<int, kTileRows>());
        multiply(a, begin + row, panel, {next_panel + bytes * tile / tiles, next_panel + bytes * (tile + 1) / tiles});
    }
}

}  // namespace

extern "C" void octavo_linear_bf16(const Arguments* arguments) {
    const Arguments& a = *arguments;
    parallel_for_panels(a.rows, 2 * a.inputs, kTileRows, a.panels(),
                        [&](int64_t begin, int64_t end, int64_t panel) { multiply_panel(a, begin, end, panel); });
}

struct Packing {
    const uint16_t* weight;  // [outputs, inputs], contiguous
    uint16_t* packed;        // panels · pairs · 64 elements; what pads it is zero
    int64_t inputs, outputs;
};

extern "C" void octavo_pack_linear_bf16(const Packing* packing) {
    const auto [weight, packed, inputs, outputs] = *packing;
    const Arguments a{nullptr, 0, nullptr, nullptr, nullptr, 0, inputs, outputs};
#pragma omp parallel for
    for (int64_t panel = 0; panel < a.panels(); ++panel) {
        uint16_t* to = packed + panel * a.panel_size();
        for (int64_t k = 0; k < a.pairs(); ++k)
            for (int64_t output = panel * kPanel; output < (panel + 1) * kPanel; ++output)
                for (int64_t input = 2 * k; input < 2 * k + 2; ++input)
                    *to++ = output < outputs && input < inputs ? weight[output * inputs + input] : 0;
    }
}
#endif
