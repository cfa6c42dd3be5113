// How operations are cut into chunks for the pool.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels.h"
#include "thread_pool.h"

namespace weft {

// A chunk shorter than this costs more to hand over than to do.
constexpr double kChunkNanoseconds = 4000.0;
// Enough chunks for a fast thread to take over from a slow one.
constexpr int64_t kChunksPerThread = 4;
// What one thread does at least, whatever the machine: only the order of magnitude matters here.
constexpr double kBytesPerNanosecond = 20.0;
constexpr double kBfloat16OperationsPerNanosecond = 200.0;
constexpr double kInt8OperationsPerNanosecond = 400.0;
// Rows whose activations stay in a core's cache while panels pass by.
constexpr int64_t kRowBlock = 192;

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Runs `work(first, end, thread)` over 0 … count-1 in chunks; `nanoseconds` is a guess of what one element costs. All
// threads get the same number of chunks.
template <typename Work>
void split(int64_t count, double nanoseconds, const Work& work) {
  const int64_t least = static_cast<int64_t>(kChunkNanoseconds / nanoseconds) + 1;
  const int64_t threads = thread_count();
  const int64_t wanted = std::min(divide_up(count, least), threads * kChunksPerThread);
  const int64_t chunks = wanted < 2 ? wanted : std::min(count, divide_up(wanted, threads) * threads);
  parallel_chunks(chunks, [&](int64_t chunk, int thread) {
    work(count * chunk / chunks, count * (chunk + 1) / chunks, thread);
  });
}

// Runs `work(first_row, end_row, first_panel, end_panel)` over a product of `rows` rows with the panels of a matrix.
// All threads get the same number of groups of panels, so none waits long for the last one, and a group meets all
// rows before the next comes from memory.
template <typename Work>
void split_product(int64_t rows, int64_t panels, int64_t bytes_per_panel, int64_t in_features,
                   double operations_per_nanosecond, const Work& work) {
  if (rows == 0) return;
  const int64_t blocks = divide_up(rows, kRowBlock);
  const double operations = 2.0 * kPanelColumns * static_cast<double>(divide_up(rows, blocks) * in_features);
  const double nanoseconds =
      static_cast<double>(bytes_per_panel) / kBytesPerNanosecond + operations / operations_per_nanosecond;
  const int64_t threads = thread_count();
  const int64_t wanted = static_cast<int64_t>(static_cast<double>(panels) * nanoseconds / kChunkNanoseconds);
  const int64_t groups = wanted < 2 ? 1 : std::min(panels, divide_up(wanted, threads) * threads);
  parallel_chunks(groups * blocks, [&](int64_t chunk, int) {
    const int64_t group = chunk / blocks, block = chunk % blocks;
    work(rows * block / blocks, rows * (block + 1) / blocks, panels * group / groups, panels * (group + 1) / groups);
  });
}

}  // namespace weft
