// How much attention each slot of a paged cache gets, summed up over queries (H2O, Zhang et al. 2023, §4).
//
// Flash attention never has a row's probabilities at hand, for their total is known only at the end; so they are computed
// once more, for the sequences that ask for it, a whole row of scores at a time.
#pragma once

#include "attention.h"

namespace {

// The arguments; kernels/cpu/native.py packs them in this order. Strides are in elements.
template <class T>
struct MassCall {
    const T* q;
    int64_t q_token_stride, q_head_stride;
    Row key_cache;
    const int32_t* block_tables;
    int64_t table_stride;
    const int32_t *query_start, *seq_lens;
    float* mass;  // [blocks, kv_heads, block_size]
    const int32_t* counted_from;  // of each sequence, the row of q from which on queries count,
    const int32_t* kept;          // and how many first slots keep what they have; negative: it counts nothing
    int64_t sequences, q_heads, kv_heads, dims, block_size, num_blocks, table_blocks;
    double scale;
    const int32_t* hidden;
    KVFormat format;
    int64_t row_bytes;  // of the cache

    Call<T> attention() const {
        return {q,       q_token_stride, q_head_stride, key_cache, key_cache,  block_tables, table_stride, query_start,
                seq_lens, nullptr,       sequences,     q_heads,   kv_heads,   dims,         block_size,   num_blocks,
                table_blocks, scale,     0,             nullptr,   nullptr,    nullptr,      0,            0,
                hidden,
                format,   row_bytes};
    }
};

// One sequence at one KV head.
template <class Math>
class Mass {
    using T = typename Math::Stored;

  public:
    Mass(const MassCall<T>& call, int64_t sequence, int64_t head)
        : call_(call), attention_(call.attention()), sequence_(sequence), head_(head), padded_(attention_.padded_dims()),
          length_(call.seq_lens[sequence]), hidden_(std::min(attention_.num_hidden(sequence, head), length_)),
          stride_(round_up(length_, kKeys)), zeros_(call.row_bytes), sums_(stride_) {
        packed_.reserve(padded_);
    }

    // False if the block table names a block that does not exist.
    bool run() {
        const int64_t begin = call_.counted_from[sequence_], end = call_.query_start[sequence_ + 1];
        const int64_t kept = call_.kept[sequence_];
        const int64_t step = std::max<int64_t>(1, kTileRows / attention_.group());
        for (int64_t first = begin; first < end; first += step)
            if (!add_tile({sequence_, head_, first, std::min(first + step, end), 0, 0, 0})) return false;
        for (int64_t slot = 0; slot < length_; ++slot) {
            const int64_t block = call_.block_tables[sequence_ * call_.table_stride + slot / call_.block_size];
            float& mass = call_.mass[(block * call_.kv_heads + head_) * call_.block_size + slot % call_.block_size];
            mass = (slot < kept ? mass : 0.0f) + sums_[slot];
        }
        return true;
    }

  private:
    bool add_tile(QueryTile tile) {
        const int64_t rows = attention_.rows(tile), group = attention_.group();
        tile.key_end = attention_.position(sequence_, tile.last);
        const Item item{&tile, 0, tile.key_end, nullptr, false};
        queries_.resize(rows * padded_);
        scores_.resize(rows * stride_);
        for (int64_t row = 0; row < rows; ++row)
            Math::copy_row(queries_.data() + row * padded_,
                           call_.q + (tile.first + row / group) * call_.q_token_stride +
                               (head_ * group + row % group) * call_.q_head_stride,
                           call_.dims, padded_);
        for (int64_t begin = hidden_ / kKeys * kKeys; begin < tile.key_end; begin += kKeys)
            if (!score_keys(item, begin, rows)) return false;
        for (int64_t row = 0; row < rows; ++row)
            add_row(scores_.data() + row * stride_, attention_.position(sequence_, tile.first + row / group) + 1);
        return true;
    }

    bool score_keys(const Item& item, int64_t begin, int64_t rows) {
        KeyRows key_rows;
        if (!find_rows(attention_, item, begin, zeros_.data(), key_rows)) return false;
        const int keys = static_cast<int>(round_up(std::min<int64_t>(kKeys, item.key_end - begin), kGranule));
        const int dims = static_cast<int>(padded_);
        packed_.pack_keys_of(call_.format, key_rows.keys(), keys, call_.dims, padded_);
        Fetcher nothing{nullptr, nullptr, 0};
        for (int64_t row = 0; row < rows; row += kRows)
            multiply<Math, false>({queries_.data() + row * padded_, dims, packed_.keys.data(), kKeys, keys, dims,
                                   scores_.data() + row * stride_ + begin, static_cast<int>(stride_)},
                                  static_cast<int>(std::min<int64_t>(kRows, rows - row)), nothing);
        return true;
    }

    // Adds a row's probabilities, of those of its first `visible` scores that are not hidden.
    void add_row(float* scores, int64_t visible) {
        const float scale = static_cast<float>(call_.scale) * kLog2E;
        float maximum = kNothing, total = 0;
        for (int64_t j = hidden_; j < visible; ++j) maximum = std::max(maximum, scores[j]);
        for_each_vector(visible - hidden_, [&](int64_t j, int count) {
            float* at = scores + hidden_ + j;
            store(at, exp2((load(at, count) - maximum) * scale), count);
        });
        for (int64_t j = hidden_; j < visible; ++j) total += scores[j];
        for (int64_t j = hidden_; j < visible; ++j) sums_[j] += scores[j] / total;
    }

    const MassCall<T>& call_;
    const Call<T> attention_;
    const int64_t sequence_, head_, padded_, length_, hidden_, stride_;
    std::vector<uint8_t> zeros_;
    std::vector<typename Math::Factor> queries_;
    PackedTile<Math> packed_;
    std::vector<float> scores_, sums_;
};

// False if a sequence that counts needs a block that its table lacks or that does not exist.
template <class Math>
bool attention_mass(const MassCall<typename Math::Stored>& call) {
    bool sound = true;
#pragma omp parallel for schedule(dynamic, 1) reduction(&& : sound)
    for (int64_t i = 0; i < call.sequences * call.kv_heads; ++i) {
        const int64_t sequence = i / call.kv_heads;
        if (call.kept[sequence] >= 0 && call.query_start[sequence + 1] > call.query_start[sequence])
            sound = Mass<Math>(call, sequence, i % call.kv_heads).run() && sound;
    }
    return sound;
}

}  // namespace
