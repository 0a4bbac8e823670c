// Scatters this step's keys and values to their slots of the paged cache [num_blocks, heads, block_size, dim].
// It moves bytes, whatever the dtype: strides and sizes below are in bytes.
#include <atomic>
#include <cstdint>
#include <cstring>

#include "parallel.h"

namespace {

struct Source {
    const char* data;
    int64_t token_stride, head_stride;
    const char* head(int64_t token, int64_t h) const { return data + token * token_stride + h * head_stride; }
};

struct Arguments {
    Source k, v;
    char *key_cache, *value_cache;
    const int64_t* slots;  // negative: write nowhere
    int64_t tokens, heads, head_bytes, block_size, num_blocks;
};

void write_token(const Arguments& a, int64_t token, int64_t slot) {
    const int64_t block = slot / a.block_size, offset = slot % a.block_size;
    for (int64_t h = 0; h < a.heads; ++h) {
        const int64_t to = ((block * a.heads + h) * a.block_size + offset) * a.head_bytes;
        std::memcpy(a.key_cache + to, a.k.head(token, h), a.head_bytes);
        std::memcpy(a.value_cache + to, a.v.head(token, h), a.head_bytes);
    }
}

}  // namespace

// Returns how many slots lie past the cache's end; those are not written.
extern "C" int64_t octavo_kv_write(const Arguments* arguments) {
    const Arguments& a = *arguments;
    std::atomic<int64_t> outside = 0;
    parallel_for(a.tokens, a.tokens * a.heads * a.head_bytes / 2, [&](int64_t token) {
        const int64_t slot = a.slots[token];
        if (slot >= a.num_blocks * a.block_size) ++outside;
        else if (slot >= 0) write_token(a, token, slot);
    });
    return outside;
}
