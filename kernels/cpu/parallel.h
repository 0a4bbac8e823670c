// When to use threads: waking OpenMP's team costs microseconds, which a small operation does not repay.
#pragma once

#include <algorithm>
#include <cstdint>

// Elements that one thread handles in about the time that the team takes to start and join.
constexpr int64_t kWorthThreads = 1 << 16;

// Multiplying a matrix with panels of a weight: calls body(begin, end, panel) for blocks of rows [begin, end) and each panel,
// on all threads. A block of rows stays in the L2 cache while the panels pass by.
template <class Body>
void parallel_for_panels(int64_t rows, int64_t row_bytes, int64_t tile_rows, int64_t panels, Body body) {
    constexpr int64_t kBlockBytes = 256 << 10;
    constexpr int64_t kChunksPerPass = 16;  // pieces that a thread takes at a time: few, yet enough to even out a slow one
    const int64_t block = std::max(tile_rows, kBlockBytes / row_bytes / tile_rows * tile_rows);
    const int64_t blocks = (rows + block - 1) / block, chunk = std::max<int64_t>(1, panels / kChunksPerPass);
#pragma omp parallel for schedule(dynamic, chunk)
    for (int64_t item = 0; item < blocks * panels; ++item) {
        const int64_t begin = item / panels * block;
        body(begin, std::min(begin + block, rows), item % panels);
    }
}

// Calls body(i) for i in [0, n), on all threads if the elements are many. Elements are those of all calls together.
template <class Body>
void parallel_for(int64_t n, int64_t elements, Body body) {
    if (elements < kWorthThreads) {  // even a team of one costs OpenMP 0.3 µs, hence no `if` clause below
        for (int64_t i = 0; i < n; ++i) body(i);
        return;
    }
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < n; ++i) body(i);
}
