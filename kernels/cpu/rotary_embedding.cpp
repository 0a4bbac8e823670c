// Rotary position embedding (Su et al. 2021, §3.4.2), half-split, in place.
#include "parallel.h"
#include "simd.h"

namespace {

template <class T>
struct Heads {
    T* data;
    int64_t token_stride, head_stride, count;
};

struct Angles {
    const float* data;
    int64_t token_stride;
};

template <class T>
struct Arguments {
    Heads<T> q, k;
    Angles cos, sin;
    int64_t tokens, half;  // half the number of rotated dimensions
};

template <class T>
void rotate_head(T* first, const float* cos, const float* sin, int64_t half) {
    T* second = first + half;
    for_each_vector(half, [&](int64_t i, int count) {
        const Floats x1 = load(first + i, count), x2 = load(second + i, count);
        const Floats c = load(cos + i, count), s = load(sin + i, count);
        store(first + i, x1 * c - x2 * s, count);
        store(second + i, x2 * c + x1 * s, count);
    });
}

template <class T>
void rotate_token(Heads<T> heads, int64_t token, const float* cos, const float* sin, int64_t half) {
    T* head = heads.data + token * heads.token_stride;
    for (int64_t h = 0; h < heads.count; ++h, head += heads.head_stride) rotate_head(head, cos, sin, half);
}

template <class T>
void rotary_embedding(const Arguments<T>& a) {
    parallel_for(a.tokens, a.tokens * (a.q.count + a.k.count) * a.half * 2, [&](int64_t token) {
        const float* cos = a.cos.data + token * a.cos.token_stride;
        const float* sin = a.sin.data + token * a.sin.token_stride;
        rotate_token(a.q, token, cos, sin, a.half);
        rotate_token(a.k, token, cos, sin, a.half);
    });
}

}  // namespace

extern "C" void octavo_rotary_embedding_f32(const Arguments<float>* arguments) { rotary_embedding(*arguments); }
extern "C" void octavo_rotary_embedding_bf16(const Arguments<BFloat16>* arguments) { rotary_embedding(*arguments); }
