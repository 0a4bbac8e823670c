// How a call to paged attention is cut into items that threads take one by one.
//
// An item is one sequence, one KV head, a tile of its query rows (tokens × the query heads that share the KV head) and a
// range of keys. Where items would be too few to occupy every thread (decoding few sequences), key ranges are split, and
// the parts merged by their log-sum-exp (Flash-Decoding, Dao et al. 2023). Attention sinks are met by other queries than
// the rest of the keys, so they are a part of their own.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "attention_math.h"

namespace {

constexpr int kTileRows = 96;       // enough rows to make packing keys cheap; their sums stay in cache
constexpr int64_t kAll = std::numeric_limits<int64_t>::max();
constexpr int kItemsPerThread = 4;  // fewer than that, and key ranges are split

int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// Query tokens [first, last) of a sequence at one KV head: their result comes from one item, or from several parts.
struct QueryTile {
    int64_t sequence, head, first, last;
    int64_t sinks;               // keys [0, sinks) are met by the sinks' queries,
    int64_t key_begin, key_end;  // and these by the others
    int64_t keys() const { return key_end - key_begin; }
};

// What one thread computes at a time: a tile over part of its keys.
struct Item {
    const QueryTile* tile;
    int64_t key_begin, key_end;
    float* part;  // where to leave an unfinished result, or null if this is the tile's only item
    bool at_sinks;
};

// The arguments; kernels/cpu/native.py packs them in this order. Strides are in elements.
template <class T>
struct Call {
    const T* q;
    int64_t q_token_stride, q_head_stride;
    Row key_cache, value_cache;
    const int32_t* block_tables;
    int64_t table_stride;
    const int32_t *query_start, *seq_lens;
    T* out;
    int64_t sequences, q_heads, kv_heads, dims, block_size, num_blocks, table_blocks;
    double scale;
    int64_t window;  // 0: none
    const int32_t *windows, *sinks;  // of each sequence, or null
    const T* sink_q;
    int64_t sink_q_token_stride, sink_q_head_stride;
    const int32_t* hidden;  // [sequences, kv_heads] first slots that nobody sees, or null
    KVFormat format;
    int64_t row_bytes;  // of the caches

    int64_t group() const { return q_heads / kv_heads; }
    int64_t padded_dims() const { return round_up(dims, kGranule); }
    int64_t rows(const QueryTile& tile) const { return (tile.last - tile.first) * group(); }
    // A part of a tile holds for each of its rows: sums, maximum and total, in float32 (see attention.h).
    int64_t part_size(const QueryTile& tile) const { return rows(tile) * (padded_dims() + 2); }
    // Position in its sequence of the query that is row `token` of the batch.
    int64_t position(int64_t sequence, int64_t token) const {
        return seq_lens[sequence] - query_start[sequence + 1] + token;
    }
    // The first key that a query at this position sees, sinks apart.
    int64_t first_visible(int64_t sequence, int64_t position) const {
        int64_t seen = window ? window : kAll;
        if (windows && windows[sequence] > 0) seen = std::min<int64_t>(seen, windows[sequence]);
        return seen <= position ? position - seen + 1 : 0;
    }
    int64_t num_hidden(int64_t sequence, int64_t head) const { return hidden ? hidden[sequence * kv_heads + head] : 0; }
};

// All tiles of a call, the longest first so that no thread is left with a long one at the end.
template <class T>
std::vector<QueryTile> make_tiles(const Call<T>& call) {
    const int64_t tile_tokens = std::max<int64_t>(1, kTileRows / call.group());
    std::vector<QueryTile> tiles;
    for (int64_t s = 0; s < call.sequences; ++s) {
        const int64_t end = call.query_start[s + 1];
        for (int64_t first = call.query_start[s]; first < end; first += tile_tokens) {
            const int64_t last = std::min(first + tile_tokens, end);
            const int64_t key_end = call.position(s, last);
            const int64_t sinks = call.sinks ? std::clamp<int64_t>(call.sinks[s], 0, key_end) : 0;
            const int64_t visible = call.first_visible(s, call.position(s, first));
            for (int64_t head = 0; head < call.kv_heads; ++head) {
                const int64_t key_begin = std::clamp(std::max(visible, call.num_hidden(s, head)), sinks, key_end);
                tiles.push_back({s, head, first, last, sinks, key_begin, key_end});
            }
        }
    }
    std::stable_sort(tiles.begin(), tiles.end(), [](const QueryTile& a, const QueryTile& b) { return a.keys() > b.keys(); });
    return tiles;
}

// How many keys an item may take: all, unless that would leave threads without work.
int64_t keys_per_item(const std::vector<QueryTile>& tiles, int64_t threads) {
    if (threads == 1 || static_cast<int64_t>(tiles.size()) >= threads * kItemsPerThread) return kAll;
    int64_t keys = 0;
    for (const QueryTile& tile : tiles) keys += tile.keys();
    const int64_t share = keys / (threads * kItemsPerThread) + 1;
    return round_up(share, kKeys);
}

// A tile whose keys were split: `count` parts of it lie from `parts` on.
struct Merge {
    const QueryTile* tile;
    const float* parts;
    int64_t count;
};

template <class T>
struct Plan {
    std::vector<Item> items;
    std::vector<Merge> merges;
    std::vector<float> parts;

    // Items of at most `share` keys.
    Plan(const Call<T>& call, const std::vector<QueryTile>& tiles, int64_t share) {
        int64_t size = 0;
        for (const QueryTile& tile : tiles)
            if (const int64_t count = parts_of(tile, share); count > 1) size += count * call.part_size(tile);
        parts.resize(size);
        float* next = parts.data();
        for (const QueryTile& tile : tiles) {
            const int64_t count = parts_of(tile, share), step = count > 1 ? call.part_size(tile) : 0;
            if (count > 1) merges.push_back({&tile, next, count});
            const auto add = [&](int64_t begin, int64_t end, bool at_sinks) {
                items.push_back({&tile, begin, end, count > 1 ? next : nullptr, at_sinks});
                next += step;
            };
            if (tile.sinks) add(0, tile.sinks, true);
            for (int64_t begin = tile.key_begin; begin < tile.key_end; begin += std::min(share, tile.key_end - begin))
                add(begin, std::min(share, tile.key_end - begin) + begin, false);
            if (count == 0) items.push_back({&tile, tile.key_end, tile.key_end, nullptr, false});  // leaves zeros
        }
    }

    // How many items make up a tile: its sinks, and its other keys, `share` at a time.
    static int64_t parts_of(const QueryTile& tile, int64_t share) {
        return (tile.sinks > 0) + tile.keys() / share + (tile.keys() % share > 0);
    }
};

}  // namespace
