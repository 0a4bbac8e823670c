// The gate of a SwiGLU feed-forward layer (Shazeer 2020, eq. 6): silu(first half of a row) times its second half.
#include "parallel.h"
#include "simd.h"

namespace {

template <class T>
struct Arguments {
    const T* x;
    int64_t row_stride;
    T* out;
    int64_t rows, n;
};

constexpr float kLog2E = 1.44269504088896340736f;

// e^-x is clamped below 2^127, where x·sigmoid(x) is zero to float32's precision anyway.
inline Floats silu(Floats x) {
    const Floats exponent = x * -kLog2E;
    return x / (1.0f + exp2(exponent > 127.0f ? splat(127.0f) : exponent));
}

template <class T>
void silu_and_mul(const Arguments<T>& a) {
    parallel_for(a.rows, 2 * a.rows * a.n, [&](int64_t row) {
        const T *gate = a.x + row * a.row_stride, *up = gate + a.n;
        T* out = a.out + row * a.n;
        for_each_vector(a.n, [&](int64_t i, int count) {
            store(out + i, rounded_to<T>(silu(load(gate + i, count))) * load(up + i, count), count);
        });
    });
}

}  // namespace

extern "C" void octavo_silu_and_mul_f32(const Arguments<float>* arguments) { silu_and_mul(*arguments); }
extern "C" void octavo_silu_and_mul_bf16(const Arguments<BFloat16>* arguments) { silu_and_mul(*arguments); }
