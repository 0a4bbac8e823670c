// Scatters this step's keys and values to their slots of the paged cache [num_blocks, heads, block_size, dim].
// As they are, it moves bytes, whatever the dtype; into a format of the cache's own it encodes them row by row.
#include <atomic>
#include <cstdint>
#include <cstring>

#include "kv_rows.h"
#include "parallel.h"

namespace {

struct Source {
    const char* data;
    int64_t token_stride, head_stride;
    const char* head(int64_t token, int64_t h) const { return data + token * token_stride + h * head_stride; }
};

// Strides and sizes are in bytes.
struct Arguments {
    Source k, v;
    char *key_cache, *value_cache;
    const int64_t* slots;  // negative: write nowhere
    int64_t tokens, heads, dims, row_bytes, block_size, num_blocks;
    KVFormat format;
};

// `put(to, from)` writes one head. Returns how many slots lie past the cache's end; those are not written.
template <class Put>
int64_t kv_write(const Arguments& a, Put put) {
    std::atomic<int64_t> outside = 0;
    parallel_for(a.tokens, a.tokens * a.heads * a.row_bytes / 2, [&](int64_t token) {
        const int64_t slot = a.slots[token];
        if (slot < 0) return;
        const int64_t block = slot / a.block_size, offset = slot % a.block_size;
        if (block >= a.num_blocks) {
            ++outside;
            return;
        }
        for (int64_t h = 0; h < a.heads; ++h) {
            const int64_t to = ((block * a.heads + h) * a.block_size + offset) * a.row_bytes;
            put(a.key_cache + to, a.k.head(token, h));
            put(a.value_cache + to, a.v.head(token, h));
        }
    });
    return outside;
}

template <class T>
int64_t kv_encode(const Arguments& a) {
    const EncodeRow<T> encode = encoder<T>(a.format);
    return kv_write(a, [&](char* to, const char* from) {
        encode(reinterpret_cast<const T*>(from), a.dims, reinterpret_cast<uint8_t*>(to));
    });
}

}  // namespace

extern "C" int64_t octavo_kv_write(const Arguments* arguments) {
    return kv_write(*arguments, [&](char* to, const char* from) { std::memcpy(to, from, arguments->row_bytes); });
}
extern "C" int64_t octavo_kv_encode_f32(const Arguments* arguments) { return kv_encode<float>(*arguments); }
extern "C" int64_t octavo_kv_encode_bf16(const Arguments* arguments) { return kv_encode<BFloat16>(*arguments); }
