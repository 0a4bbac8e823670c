// Root-mean-square layer norm (Zhang & Sennrich 2019, eq. 4), optionally with the residual addition before it.
#include "parallel.h"
#include "simd.h"

namespace {

// The rows of a matrix (outer = 1) or of a stack of matrices, at any strides.
template <class T>
struct Rows {
    T* data;
    int64_t outer_stride, inner_stride;
    T* row(int64_t i, int64_t inner) const { return data + i / inner * outer_stride + i % inner * inner_stride; }
};

template <class T>
struct Arguments {
    Rows<const T> x;
    Rows<T> residual;  // data may be null
    const T* weight;
    T* out;
    int64_t outer, inner, n;
    double eps;
};

// With a residual: residual += x, and the norm is the updated residual's. Rounds where Hugging Face's Llama does.
template <class T>
void norm_row(const T* x, T* residual, const T* weight, T* out, int64_t n, float eps) {
    Floats squares{};
    for_each_vector(n, [&](int64_t i, int count) {
        Floats value = load(x + i, count);
        if (residual) {
            value = rounded_to<T>(value + load(residual + i, count));
            store(residual + i, value, count);
        }
        squares += value * value;
    });
    const float scale = 1.0f / std::sqrt(sum_of(squares) / n + eps);
    const T* source = residual ? residual : x;
    for_each_vector(n, [&](int64_t i, int count) {
        store(out + i, rounded_to<T>(load(source + i, count) * scale) * load(weight + i, count), count);
    });
}

template <class T>
void rms_norm(const Arguments<T>& a) {
    const int64_t rows = a.outer * a.inner;
    parallel_for(rows, rows * a.n, [&](int64_t i) {
        T* residual = a.residual.data ? a.residual.row(i, a.inner) : nullptr;
        norm_row(a.x.row(i, a.inner), residual, a.weight, a.out + i * a.n, a.n, static_cast<float>(a.eps));
    });
}

}  // namespace

extern "C" void octavo_rms_norm_f32(const Arguments<float>* arguments) { rms_norm(*arguments); }
extern "C" void octavo_rms_norm_bf16(const Arguments<BFloat16>* arguments) { rms_norm(*arguments); }
