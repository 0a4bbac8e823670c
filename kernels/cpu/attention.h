// Causal attention over a paged KV cache (Kwon et al. 2023, §4.1) with an online softmax (Milakov & Gimelshein 2018).
//
// Each item (see attention_plan.h) walks its keys 64 at a time: it packs them and their values straight from their blocks,
// then for 6 query rows at a time computes scores, probabilities and the weighted sum of values.
#pragma once

#include <omp.h>

#include "attention_plan.h"

namespace {

constexpr int64_t kTilesWorthThreads = 8;  // 64 keys take one thread about 0.7 µs, a team's start and join 2 µs
constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kNothing = std::numeric_limits<float>::lowest();  // the maximum of no scores

// Where a tile's keys and values lie in the cache.
struct KeyRows {
    Row rows[2 * kKeys];
    Row* keys() { return rows; }
    Row* values() { return rows + kKeys; }
};

// Points at an item's keys and values from position `begin` on, or at zeros past the item's end: a slot outside its range
// may hold anything, NaN too, and NaN times a probability of zero is NaN. Bytes of zero are zeros in every format. False
// if the table names no existing block.
template <class T>
bool find_rows(const Call<T>& call, const Item& item, int64_t begin, Row zeros, KeyRows& rows) {
    const int32_t* table = call.block_tables + item.tile->sequence * call.table_stride;
    const int64_t block_bytes = call.block_size * call.row_bytes;
    const int count = static_cast<int>(std::clamp<int64_t>(item.key_end - begin, 0, kKeys));
    int64_t index = begin / call.block_size, slot = begin % call.block_size;
    for (int key = 0; key < count; ++index, slot = 0) {
        if (index >= call.table_blocks || table[index] < 0 || table[index] >= call.num_blocks) return false;
        int64_t at = (table[index] * call.kv_heads + item.tile->head) * block_bytes + slot * call.row_bytes;
        for (; key < count && slot < call.block_size; ++key, ++slot, at += call.row_bytes) {
            rows.keys()[key] = call.key_cache + at;
            rows.values()[key] = call.value_cache + at;
        }
    }
    for (int key = count; key < kKeys; ++key) rows.keys()[key] = rows.values()[key] = zeros;
    return true;
}

// A tile's packed keys and values.
template <class Math>
struct PackedTile {
    std::vector<typename Math::Factor> keys, values;
    DecodedRows<Math, kKeys> decoded;

    void reserve(int64_t padded) {
        if (static_cast<int64_t>(keys.size()) < kKeys * padded) keys.resize(kKeys * padded), values.resize(kKeys * padded);
    }

    void pack_keys_of(KVFormat format, const Row* rows, int count, int dims, int padded) {
        if (format == kAsQueries) return pack_keys<Math>(keys.data(), rows, count, dims, padded);
        rows = decoded.of(format, rows, count, dims, padded);
        pack_keys<typename Math::Decoded>(keys.data(), rows, count, dims, padded);
    }

    void pack_values_of(KVFormat format, const Row* rows, int count, int dims, int padded) {
        if (format == kAsQueries) return pack_values<Math>(values.data(), rows, count, dims, padded);
        rows = decoded.of(format, rows, count, dims, padded);
        pack_values<typename Math::Decoded>(values.data(), rows, count, dims, padded);
    }
};

// Memory of one thread, kept between calls so that decoding allocates nothing.
template <class Math>
struct Scratch {
    std::vector<typename Math::Factor> queries;
    PackedTile<Math> packed;
    std::vector<uint8_t> zeros;
    std::vector<float> sums;    // [rows, padded dims]: probabilities times values, not yet normalised
    std::vector<float> maxima;  // [rows]: of the scores so far, times log2(e)
    std::vector<float> totals;  // [rows, kLanes]: of the probabilities so far, lane by lane
    float scores[kRows][kKeys];
    typename Math::Factor probabilities[kRows][kKeys];
    KeyRows key_rows[2];  // of the present 64 keys and of the next

    static Scratch& of_this_thread(int64_t rows, int64_t padded, int64_t row_bytes) {
        thread_local Scratch scratch;
        scratch.packed.reserve(padded);
        grow(scratch.queries, rows * padded);
        grow(scratch.zeros, row_bytes);
        grow(scratch.sums, rows * padded);
        grow(scratch.maxima, rows);
        grow(scratch.totals, rows * kLanes);
        return scratch;
    }

  private:
    template <class Element>
    static void grow(std::vector<Element>& memory, int64_t size) {
        if (static_cast<int64_t>(memory.size()) < size) memory.resize(size);
    }
};

// Computes one item.
template <class Math>
class Attention {
    using T = typename Math::Stored;

  public:
    Attention(const Call<T>& call, const Item& item)
        : call_(call), item_(item), tile_(*item.tile), group_(call.group()), padded_(call.padded_dims()),
          rows_(call.rows(tile_)), scale_(static_cast<float>(call.scale) * kLog2E),
          scratch_(Scratch<Math>::of_this_thread(rows_, padded_, call.row_bytes)) {}

    // False if the block table names a block that does not exist. `successor` is probably this thread's next item: its
    // first keys are fetched meanwhile.
    bool run(const Item& successor) {
        start();
        Row zeros = scratch_.zeros.data();
        KeyRows *present = &scratch_.key_rows[0], *next = &scratch_.key_rows[1];
        if (!find_rows(call_, item_, item_.key_begin, zeros, *present)) return false;
        for (int64_t begin = item_.key_begin; begin < item_.key_end; begin += kKeys, std::swap(present, next)) {
            const int64_t end = begin + kKeys;
            const bool found = end < item_.key_end ? find_rows(call_, item_, end, zeros, *next)
                                                   : find_rows(call_, successor, successor.key_begin, zeros, *next);
            if (!found) return false;
            const int keys = static_cast<int>(round_up(std::min(end, item_.key_end) - begin, kGranule));
            scratch_.packed.pack_keys_of(call_.format, present->keys(), keys, call_.dims, padded_);
            scratch_.packed.pack_values_of(call_.format, present->values(), keys, call_.dims, padded_);
            Fetcher fetcher{next->rows, next->rows + 2 * kKeys, call_.row_bytes};
            for (int64_t row = 0; row < rows_; row += kRows)
                attend(row, static_cast<int>(std::min<int64_t>(kRows, rows_ - row)), begin, keys, fetcher);
        }
        for (int64_t row = 0; row < rows_; ++row) item_.part ? leave_part(row) : finish(row);
        return true;
    }

  private:
    int64_t token_of(int64_t row) const { return tile_.first + row / group_; }
    int64_t head_of(int64_t row) const { return tile_.head * group_ + row % group_; }
    int64_t first_visible(int64_t position) const {
        return item_.at_sinks ? 0 : call_.first_visible(tile_.sequence, position);
    }

    void start() {
        for (int64_t row = 0; row < rows_; ++row) {
            const T* query = item_.at_sinks
                ? call_.sink_q + token_of(row) * call_.sink_q_token_stride + head_of(row) * call_.sink_q_head_stride
                : call_.q + token_of(row) * call_.q_token_stride + head_of(row) * call_.q_head_stride;
            Math::copy_row(scratch_.queries.data() + row * padded_, query, call_.dims, padded_);
            scratch_.maxima[row] = kNothing;
        }
        std::fill_n(scratch_.totals.data(), rows_ * kLanes, 0.0f);
        std::fill_n(scratch_.sums.data(), rows_ * padded_, 0.0f);
    }

    // Folds the `keys` packed keys from position `begin` on into at most kRows rows.
    void attend(int64_t row, int rows, int64_t begin, int keys, Fetcher& fetcher) {
        const int64_t first = call_.position(tile_.sequence, token_of(row));
        const int64_t last = call_.position(tile_.sequence, token_of(row + rows - 1));
        if (last < begin || first_visible(first) >= begin + kKeys) return;  // all hidden
        const int dims = static_cast<int>(padded_);
        const typename Math::Factor* queries = scratch_.queries.data() + row * dims;
        float *scores = scratch_.scores[0], *sums = scratch_.sums.data() + row * dims;
        multiply<Math, false>({queries, dims, scratch_.packed.keys.data(), kKeys, keys, dims, scores, kKeys}, rows, fetcher);
        for (int r = 0; r < rows; ++r) soften(row + r, r, begin);
        const typename Math::Factor* weights = scratch_.probabilities[0];
        multiply<Math, true>({weights, kKeys, scratch_.packed.values.data(), dims, dims, keys, sums, dims}, rows, fetcher);
    }

    // Turns row r of the scores into probabilities relative to the row's maximum so far; rescales its sums if that rose.
    void soften(int64_t row, int r, int64_t begin) {
        const int64_t position = call_.position(tile_.sequence, token_of(row));
        const int64_t low = std::max(first_visible(position), item_.key_begin) - begin;
        const int64_t high = std::min(position + 1, item_.key_end) - begin;
        constexpr int kVectors = kKeys / kLanes;
        Floats scores[kVectors], most = splat(kNothing);
        for (int i = 0; i < kVectors; ++i) scores[i] = load(&scratch_.scores[r][i * kLanes]) * scale_;
        if (low > 0 || high < kKeys) hide(scores, low, high);
        for (int i = 0; i < kVectors; ++i) most = larger(scores[i], most);
        const float maximum = std::max(max_of(most), scratch_.maxima[row]);
        if (maximum > scratch_.maxima[row]) raise_maximum(row, maximum);
        // Hidden scores are kNothing, and exp2(kNothing - base) is 0; so base must not be kNothing itself.
        const float base = maximum == kNothing ? 0.0f : maximum;
        Floats total = load(&scratch_.totals[row * kLanes]);
        for (int i = 0; i < kVectors; ++i) {
            const Floats probability = exp2(scores[i] - base);
            total += probability;
            Math::store_factors(&scratch_.probabilities[r][i * kLanes], probability);
        }
        store(&scratch_.totals[row * kLanes], total);
    }

    static void hide(Floats* scores, int64_t low, int64_t high) {
        Ints key;
        for (int lane = 0; lane < kLanes; ++lane) key[lane] = lane;
        const int32_t from = static_cast<int32_t>(std::clamp<int64_t>(low, 0, kKeys));
        const int32_t to = static_cast<int32_t>(std::clamp<int64_t>(high, 0, kKeys));
        for (int i = 0; i < kKeys / kLanes; ++i, key += kLanes)
            scores[i] = (key >= from) & (key < to) ? scores[i] : splat(kNothing);
    }

    void raise_maximum(int64_t row, float maximum) {
        const float factor = exp2(splat(scratch_.maxima[row] - maximum))[0];
        scratch_.maxima[row] = maximum;
        float* totals = &scratch_.totals[row * kLanes];
        store(totals, load(totals) * factor);
        float* sums = scratch_.sums.data() + row * padded_;
        for (int64_t d = 0; d < padded_; d += kLanes) store(sums + d, load(sums + d) * factor);
    }

    void finish(int64_t row) {
        const float total = sum_of(load(&scratch_.totals[row * kLanes]));
        const float factor = total > 0 ? 1.0f / total : 0.0f;  // 0: nothing is seen
        const float* sums = scratch_.sums.data() + row * padded_;
        T* out = call_.out + (token_of(row) * call_.q_heads + head_of(row)) * call_.dims;
        for_each_vector(call_.dims, [&](int64_t d, int count) { store(out + d, load(sums + d) * factor, count); });
    }

    // A part is, per row: the sums, the maximum and the total.
    void leave_part(int64_t row) {
        float* part = item_.part + row * (padded_ + 2);
        std::copy_n(scratch_.sums.data() + row * padded_, padded_, part);
        part[padded_] = scratch_.maxima[row];
        part[padded_ + 1] = sum_of(load(&scratch_.totals[row * kLanes]));
    }

    const Call<T>& call_;
    const Item& item_;
    const QueryTile& tile_;
    const int64_t group_, padded_, rows_;
    const float scale_;  // of scores, so that probabilities are powers of 2
    Scratch<Math>& scratch_;
};

// Joins the parts of a tile's row: each weighs 2^(its maximum - the overall maximum).
template <class T>
void merge_row(const Call<T>& call, const Merge& merge, int64_t row) {
    const QueryTile& tile = *merge.tile;
    const int64_t padded = call.padded_dims(), group = call.group();
    const auto part = [&](int64_t i) { return merge.parts + i * call.part_size(tile) + row * (padded + 2); };
    float maximum = kNothing, total = 0;
    for (int64_t i = 0; i < merge.count; ++i) maximum = std::max(maximum, part(i)[padded]);
    std::vector<float> weights(merge.count);
    for (int64_t i = 0; i < merge.count; ++i) {
        weights[i] = exp2(splat(part(i)[padded] - maximum))[0];
        total += weights[i] * part(i)[padded + 1];
    }
    T* out = call.out + ((tile.first + row / group) * call.q_heads + tile.head * group + row % group) * call.dims;
    for_each_vector(call.dims, [&](int64_t d, int lanes) {
        Floats sum{};
        for (int64_t i = 0; i < merge.count; ++i) sum += weights[i] * load(part(i) + d);
        store(out + d, sum * (total > 0 ? 1.0f / total : 0.0f), lanes);
    });
}

// False if a sequence needs a block that its table lacks or that does not exist.
template <class Math>
bool paged_attention(const Call<typename Math::Stored>& call) {
    const std::vector<QueryTile> tiles = make_tiles(call);
    int64_t key_tiles = 0;
    for (const QueryTile& tile : tiles) key_tiles += (tile.keys() + kKeys - 1) / kKeys;
    const int threads = key_tiles < kTilesWorthThreads ? 1 : omp_get_max_threads();
    const Plan<typename Math::Stored> plan(call, tiles, keys_per_item(tiles, threads));
    const int64_t items = plan.items.size(), merges = plan.merges.size();
    bool sound = true;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(dynamic, 1) reduction(&& : sound)
        for (int64_t i = 0; i < items; ++i) {
            const Item& successor = plan.items[std::min(i + threads, items - 1)];
            sound = Attention<Math>(call, plan.items[i]).run(successor) && sound;
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < merges; ++i)
            for (int64_t row = 0; row < call.rows(*plan.merges[i].tile); ++row) merge_row(call, plan.merges[i], row);
    }
    return sound;
}

}  // namespace
