// Finds the sequences of a step that begin with the same blocks, so that attention reads these once for all of them.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"

namespace weft {

// Looks at sequences of one row, which decode. Kept for a step: `order` points into it.
class PrefixFinder {
 public:
  PrefixFinder(const int32_t* query_starts, const int32_t* context_lens, const int32_t* block_tables,
               int64_t table_stride, int64_t sequences, int64_t block_size);

  // nullptr when nobody shares a whole part of the context.
  const PrefixOrder* order() const { return order_.count > 0 ? &order_ : nullptr; }

 private:
  std::vector<int32_t> sequences_;
  std::vector<int32_t> shared_with_next_;
  std::vector<int32_t> shared_parts_;
  PrefixOrder order_{};
};

}  // namespace weft
