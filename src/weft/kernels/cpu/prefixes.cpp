#include "prefixes.h"

#include <algorithm>

namespace weft {

PrefixFinder::PrefixFinder(const int32_t* query_starts, const int32_t* context_lens, const int32_t* block_tables,
                           int64_t table_stride, int64_t sequences, int64_t block_size) {
  if (block_size > kPartPositions || kPartPositions % block_size != 0) return;
  const int64_t blocks_per_part = kPartPositions / block_size;
  const auto table = [&](int32_t sequence) { return block_tables + sequence * table_stride; };
  const auto whole_blocks = [&](int32_t sequence) {
    return context_lens[sequence] / kPartPositions * blocks_per_part;
  };

  for (int32_t sequence = 0; sequence < sequences; ++sequence) {
    const bool decodes = query_starts[sequence + 1] - query_starts[sequence] == 1;
    if (decodes && context_lens[sequence] >= kPartPositions) sequences_.push_back(sequence);
  }
  if (sequences_.size() < 2) return;
  // A block belongs to one sequence or to all that share what stands before it, so sequences that differ do so in
  // their first block, and most comparisons end there.
  std::sort(sequences_.begin(), sequences_.end(), [&](int32_t a, int32_t b) {
    const int32_t* const of_a = table(a);
    const int32_t* const of_b = table(b);
    const int64_t count = std::min(whole_blocks(a), whole_blocks(b));
    const auto [in_a, in_b] = std::mismatch(of_a, of_a + count, of_b);
    if (in_a != of_a + count) return *in_a < *in_b;
    return whole_blocks(a) != whole_blocks(b) ? whole_blocks(a) < whole_blocks(b) : a < b;
  });

  const int64_t count = static_cast<int64_t>(sequences_.size());
  shared_with_next_.assign(count, 0);
  shared_parts_.assign(sequences, 0);
  bool is_any = false;
  for (int64_t i = 0; i + 1 < count; ++i) {
    const int32_t a = sequences_[i], b = sequences_[i + 1];
    const int64_t blocks = std::min(whole_blocks(a), whole_blocks(b));
    const int64_t same = std::mismatch(table(a), table(a) + blocks, table(b)).first - table(a);
    const int32_t parts = static_cast<int32_t>(same / blocks_per_part);
    shared_with_next_[i] = parts;
    shared_parts_[a] = std::max(shared_parts_[a], parts);
    shared_parts_[b] = std::max(shared_parts_[b], parts);
    is_any = is_any || parts > 0;
  }
  if (is_any) order_ = {sequences_.data(), shared_with_next_.data(), count, shared_parts_.data()};
}

}  // namespace weft
