// When to use threads: waking OpenMP's team costs microseconds, which a small operation does not repay.
#pragma once

#include <cstdint>

// Elements that one thread handles in about the time that the team takes to start and join.
constexpr int64_t kWorthThreads = 1 << 16;

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
