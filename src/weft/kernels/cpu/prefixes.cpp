#include "prefixes.h"

#include <algorithm>

namespace weft {
namespace {

// Fewer positions in common are not worth the way to memory and back of what was gathered over them.
constexpr int32_t kLeastShared = 128;
// So many rows keep the arithmetic busy; more of them save reading.
constexpr int64_t kEnoughTogether = 8;
static_assert(kLeastShared % kTilePositions == 0 && kPartPositions % kTilePositions == 0, "tiles are shared whole");

// Leading parts of a context that two sequences visit together, the last of them perhaps not to its end.
int32_t parts_with(int32_t shared) {
  return shared / kPartPositions + (shared % kPartPositions >= kLeastShared ? 1 : 0);
}

}  // namespace

PrefixFinder::PrefixFinder(const int32_t* query_starts, const int32_t* context_lens, const int32_t* block_tables,
                           int64_t table_stride, int64_t sequences, int64_t block_size,
                           const CommonLimits& limits)
    : context_lens_(context_lens) {
  sort_sequences(query_starts, block_tables, table_stride, sequences, block_size);
  if (sequences_.size() < 2) return;
  shared_parts_.assign(sequences, 0);
  for (size_t i = 0; i + 1 < sequences_.size(); ++i) {
    for (const int32_t sequence : {sequences_[i], sequences_[i + 1]}) {
      shared_parts_[sequence] = std::max(shared_parts_[sequence], parts_with(shared_with_next_[i]));
    }
  }
  share_out_parts(limits);
  order_ = {sequences_.data(), segments_.data(), parts_.data(), static_cast<int64_t>(parts_.size()),
            shared_parts_.data()};
}

// A block belongs to one sequence or to all that share what stands before it, so sequences that differ do so in their
// first block, and most comparisons end there. A block that is not yet full is its sequence's own.
void PrefixFinder::sort_sequences(const int32_t* query_starts, const int32_t* block_tables, int64_t table_stride,
                                  int64_t sequences, int64_t block_size) {
  const auto table = [&](int32_t sequence) { return block_tables + sequence * table_stride; };
  const auto whole_blocks = [&](int32_t sequence) { return context_lens_[sequence] / block_size; };
  for (int32_t sequence = 0; sequence < sequences; ++sequence) {
    const bool decodes = query_starts[sequence + 1] - query_starts[sequence] == 1;
    if (decodes && context_lens_[sequence] >= kLeastShared) sequences_.push_back(sequence);
  }
  std::sort(sequences_.begin(), sequences_.end(), [&](int32_t a, int32_t b) {
    const int32_t* const of_a = table(a);
    const int32_t* const of_b = table(b);
    const int64_t count = std::min(whole_blocks(a), whole_blocks(b));
    const auto [in_a, in_b] = std::mismatch(of_a, of_a + count, of_b);
    if (in_a != of_a + count) return *in_a < *in_b;
    return whole_blocks(a) != whole_blocks(b) ? whole_blocks(a) < whole_blocks(b) : a < b;
  });
  shared_with_next_.assign(sequences_.size(), 0);
  for (size_t i = 0; i + 1 < sequences_.size(); ++i) {
    const int32_t a = sequences_[i], b = sequences_[i + 1];
    const int64_t blocks = std::min(whole_blocks(a), whole_blocks(b));
    const int64_t same = std::mismatch(table(a), table(a) + blocks, table(b)).first - table(a);
    shared_with_next_[i] = static_cast<int32_t>(same * block_size / kTilePositions * kTilePositions);
  }
}

void PrefixFinder::share_out_parts(const CommonLimits& limits) {
  const int32_t count = static_cast<int32_t>(sequences_.size());
  const int32_t deepest = *std::max_element(shared_parts_.begin(), shared_parts_.end());
  const int64_t groups = std::max<int64_t>(1, limits.wanted / std::max(1, deepest));
  const int64_t most = std::min(limits.most, std::max(kEnoughTogether, count / groups));
  for (int32_t part = 0; part < deepest; ++part) {
    int32_t first = 0;
    for (int32_t i = 0; i < count; ++i) {
      const bool goes_on = parts_with(shared_with_next_[i]) > part;
      if (goes_on && i + 1 - first < most) continue;
      // The last of a full group may be left alone with the part; it is still nobody else's to compute.
      if (shared_parts_[sequences_[first]] > part) add_part(first, i + 1 - first, part);
      first = i + 1;
    }
  }
}

void PrefixFinder::add_part(int32_t first, int32_t count, int32_t part) {
  const int32_t first_segment = static_cast<int32_t>(segments_.size());
  const int32_t begin = part * static_cast<int32_t>(kPartPositions);
  add_segments(first, first, count, begin, begin + static_cast<int32_t>(kPartPositions));
  parts_.push_back({first, count, first_segment, static_cast<int32_t>(segments_.size()) - first_segment, part});
}

// Positions from `begin` on that all of them have in common; then those that still go on together, and so on.
void PrefixFinder::add_segments(int32_t first_of_part, int32_t first, int32_t count, int32_t begin,
                                int32_t end_of_part) {
  const auto shared = shared_with_next_.begin() + first;
  const int32_t common = count == 1 ? context_lens_[sequences_[first]] : *std::min_element(shared, shared + count - 1);
  const int32_t end = std::min(common, end_of_part);
  if (end > begin) segments_.push_back({first - first_of_part, count, begin, end});
  if (count == 1 || end == end_of_part) return;
  for (int32_t i = first, next = first; i < first + count; i = next) {
    for (++next; next < first + count && shared_with_next_[next - 1] > end;) ++next;
    add_segments(first_of_part, i, next - i, end, end_of_part);
  }
}

}  // namespace weft
