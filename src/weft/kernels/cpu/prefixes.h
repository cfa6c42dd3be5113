// Finds the sequences of a step that begin with the same blocks, so that attention reads these once for all of them.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"

namespace weft {

// How many sequences are computed together: as many as fit, as long as there is work for every thread.
struct CommonLimits {
  int64_t most;    // sequences
  int64_t wanted;  // common parts, each of them work for all key heads
};

// Looks at sequences of one row, which decode. Kept for a step: `order` points into it.
class PrefixFinder {
 public:
  PrefixFinder(const int32_t* query_starts, const int32_t* context_lens, const int32_t* block_tables,
               int64_t table_stride, int64_t sequences, int64_t block_size, const CommonLimits& limits);

  // nullptr when nobody shares enough of the context.
  const PrefixOrder* order() const { return parts_.empty() ? nullptr : &order_; }

 private:
  void sort_sequences(const int32_t* query_starts, const int32_t* block_tables, int64_t table_stride,
                      int64_t sequences, int64_t block_size);
  void share_out_parts(const CommonLimits& limits);
  void add_part(int32_t first, int32_t count, int32_t part);
  void add_segments(int32_t first_of_part, int32_t first, int32_t count, int32_t begin, int32_t end_of_part);

  const int32_t* context_lens_;
  std::vector<int32_t> sequences_;
  std::vector<int32_t> shared_with_next_;  // positions, whole tiles
  std::vector<int32_t> shared_parts_;
  std::vector<CommonPart> parts_;
  std::vector<PrefixSegment> segments_;
  PrefixOrder order_{};
};

}  // namespace weft
