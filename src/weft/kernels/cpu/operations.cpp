#include "operations.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>

#include "pieces.h"

namespace weft {
namespace {

const KernelTable* best_kernels() {
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return nullptr;
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (!has_avx512) return &kAvx2Kernels;
  const bool has_dots = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
  return has_dots ? &kAvx512Bf16Kernels : &kAvx512Kernels;
}

const KernelTable*& chosen_kernels() {
  static const KernelTable* chosen = best_kernels();
  return chosen;
}

// ---- Attention ----

// What the parts of one piece leave, and how many of them are still to come.
struct PieceParts {
  float* states;
  std::atomic<int64_t>* unfinished;
  int64_t first;
  int64_t count;
};

// One entry of the work list: a whole piece, one part of a piece whose parts are shared out, or one part that several
// sequences have in common.
struct AttentionTask {
  AttentionPiece piece;      // of a common part the head alone
  int64_t part;              // absolute part, or -1 for a whole piece
  PieceParts parts;          // of a piece
  const CommonPart* common;  // nullptr: a piece
};

// Rows of a head whose state and queries stay in the cache while keys and values pass by.
constexpr int64_t kMostRows = 96;

// Queries of one sequence, or sequences of one query each, that meet keys and values together.
int64_t queries_per_piece(int64_t head_size, int64_t group) {
  return std::max<int64_t>(1, (head_size <= 128 ? kMostRows : kMostRows / 2) / group);
}

int64_t query_length(const AttentionArguments& a, int64_t sequence) {
  return a.query_starts[sequence + 1] - a.query_starts[sequence];
}

struct AttentionPlan {
  int64_t pieces = 0;
  int64_t parts = 0;
  int64_t state_floats = 0;
  int64_t most_rows = 0;
};

// Calls `visit(piece)` for every piece of sequences with several queries, or of those with one. Long ones come from
// their ends, where most keys are seen, so that no thread is left with a large piece when the others are done.
template <typename Visit>
void for_each_piece(const AttentionArguments& a, int64_t sequences, bool are_long, const Visit& visit) {
  const int64_t most = queries_per_piece(a.head_size, a.query_heads / a.kv_heads);
  for (int64_t sequence = 0; sequence < sequences; ++sequence) {
    const int64_t length = query_length(a, sequence);
    if (length == 0 || (length > 1) != are_long) continue;
    const int64_t pieces = divide_up(length, most);
    for (int64_t index = pieces - 1; index >= 0; --index) {
      const int64_t first = length * index / pieces, end = length * (index + 1) / pieces;
      for (int64_t head = 0; head < a.kv_heads; ++head) visit(AttentionPiece{sequence, head, first, end - first});
    }
  }
}

AttentionPlan count_pieces(const AttentionArguments& a, int64_t sequences) {
  AttentionPlan plan;
  const int64_t group = a.query_heads / a.kv_heads;
  const auto count = [&](const AttentionPiece& piece) {
    const PartRange range = visible_parts(a, piece);
    const int64_t rows = piece.num_queries * group;
    plan.pieces += 1;
    plan.parts += range.end - range.first;
    plan.state_floats += (range.end - range.first) * kernels().attention_state_floats(a, rows);
    plan.most_rows = std::max(plan.most_rows, rows);
  };
  for (const bool are_long : {true, false}) for_each_piece(a, sequences, are_long, count);
  for (int64_t i = 0; a.prefixes != nullptr && i < a.prefixes->count; ++i) {
    plan.most_rows = std::max(plan.most_rows, a.prefixes->parts[i].count * group);
  }
  return plan;
}

// Whoever finishes the last part merges all of them, in ascending order.
void finish_part(const AttentionArguments& a, const AttentionPiece& piece, const PieceParts& parts) {
  if (parts.unfinished->fetch_sub(1, std::memory_order_acq_rel) == 1) {
    kernels().merge_parts(a, piece, parts.states, parts.count);
  }
}

// `common` holds the parts of every sequence that shares some, by sequence and head.
void run_task(const AttentionArguments& a, const AttentionTask& task, const AttentionTask* next,
              const PieceParts* common, void* scratch) {
  const AttentionPiece& piece = task.piece;
  if (task.part < 0) {
    const bool asks = next != nullptr && next->common == nullptr;
    return kernels().attend(a, piece, asks ? &next->piece : nullptr, scratch);
  }
  const int64_t group = a.query_heads / a.kv_heads;
  if (task.common == nullptr) {
    const int64_t floats = kernels().attention_state_floats(a, piece.num_queries * group);
    kernels().attend_part(a, piece, task.part, task.parts.states + (task.part - task.parts.first) * floats, scratch);
    return finish_part(a, piece, task.parts);
  }
  float* states[kMostRows];
  const int32_t* const sequences = a.prefixes->sequences + task.common->first;
  const int64_t floats = kernels().attention_state_floats(a, group);
  for (int64_t i = 0; i < task.common->count; ++i) {
    states[i] = common[sequences[i] * a.kv_heads + piece.kv_head].states + task.part * floats;
  }
  kernels().attend_common_part(a, *task.common, piece.kv_head, states, scratch);
  for (int64_t i = 0; i < task.common->count; ++i) {
    finish_part(a, {sequences[i], piece.kv_head, 0, 1}, common[sequences[i] * a.kv_heads + piece.kv_head]);
  }
}

// ---- Logits ----

// A row is read in runs of this many logits, so that few rows still keep all threads busy.
constexpr int64_t kRunLogits = 8192;
// Of one run of the race: a key per logit and a place per vector of keys, of whatever length.
constexpr int64_t kRaceScratchBytes = 2 * kRunLogits * static_cast<int64_t>(sizeof(float));

void scan_rows(const float* logits, int64_t stride, int64_t rows, int64_t width, LogitRun* runs) {
  const int64_t per_row = divide_up(width, kRunLogits);
  split(rows * per_row, kRunLogits * 0.2, [&](int64_t first, int64_t end, int) {
    for (int64_t index = first; index < end; ++index) {
      const int64_t start = index % per_row * kRunLogits;
      runs[index] = kernels().scan_logits(logits + index / per_row * stride + start, start,
                                          std::min(kRunLogits, width - start));
    }
  });
}

struct RowSummary {
  float best;
  int64_t best_index;
  double log_sum;  // of exp(logit - best)
  bool is_sound;
};

RowSummary summarize(const LogitRun* runs, int64_t count) {
  RowSummary summary{-std::numeric_limits<float>::infinity(), 0, 0.0, true};
  for (int64_t i = 0; i < count; ++i) {
    if (runs[i].has_nan) summary.is_sound = false;
    if (runs[i].best > summary.best) {
      summary.best = runs[i].best;
      summary.best_index = runs[i].best_index;
    }
  }
  if (!std::isfinite(summary.best)) summary.is_sound = false;
  double sum = 0.0;
  for (int64_t i = 0; i < count; ++i) {
    if (runs[i].sum > 0.0f) sum += runs[i].sum * std::exp(static_cast<double>(runs[i].best) - summary.best);
  }
  summary.log_sum = std::log(sum);
  return summary;
}

// The winner of a row's runs; -1 when the row means nothing.
int64_t winner(const RaceRun* runs, int64_t count) {
  double best = -std::numeric_limits<double>::infinity();
  int64_t id = -1;
  for (int64_t i = 0; i < count; ++i) {
    if (runs[i].has_nan || runs[i].best == std::numeric_limits<double>::infinity()) return -1;
    if (runs[i].best > best) {
      best = runs[i].best;
      id = runs[i].best_index;
    }
  }
  return id;
}

}  // namespace

const KernelTable& kernels() { return *chosen_kernels(); }

bool select_kernels(const char* name) {
  const KernelTable* best = best_kernels();
  if (best == nullptr) return false;
  if (name == nullptr) {
    chosen_kernels() = best;
    return true;
  }
  const KernelTable* const ascending[] = {&kAvx2Kernels, &kAvx512Kernels, &kAvx512Bf16Kernels};
  for (const KernelTable* table : ascending) {
    if (std::strcmp(table->name, name) == 0) {
      chosen_kernels() = table;
      return true;
    }
    if (table == best) return false;
  }
  return false;
}

void pack_panels(const PackArguments& a) {
  const double bytes = static_cast<double>(panel_bytes(a.in_features, a.dtype));
  split(panel_count(a.out_features), bytes / 4.0, [&](int64_t first, int64_t end, int) {
    kernels().pack_panels(a, first, end);
  });
}

void linear(LinearArguments a, const void* x, int64_t x_stride) {
  const bool wants_floats = kernels().linear_wants_float_rows(a.dtype);
  const bool is_odd = a.dtype == kBfloat16 && a.in_features % 2 != 0;
  a.x = x;
  a.x_row_bytes = x_stride * bytes_per_element(a.dtype);
  if (wants_floats || is_odd) {
    const DataType dtype = wants_floats ? kFloat32 : a.dtype;
    const int64_t row_bytes = divide_up(panel_steps(a.in_features, a.dtype) * 2 * bytes_per_element(dtype), 64) * 64;
    uint8_t* const rows = static_cast<uint8_t*>(session_scratch(a.rows * row_bytes));
    split(a.rows, static_cast<double>(a.in_features) * 0.5, [&](int64_t first, int64_t end, int) {
      for (int64_t row = first; row < end; ++row) {
        uint8_t* const out = rows + row * row_bytes;
        kernels().convert_row(static_cast<const uint8_t*>(x) + row * a.x_row_bytes, a.dtype, out, dtype,
                              a.in_features);
        const int64_t written = a.in_features * bytes_per_element(dtype);
        std::memset(out + written, 0, row_bytes - written);
      }
    });
    a.x = rows;
    a.x_row_bytes = row_bytes;
  }
  split_product(a.rows, panel_count(a.out_features), panel_bytes(a.in_features, a.dtype), a.in_features,
                kBfloat16OperationsPerNanosecond,
                [&](int64_t first_row, int64_t end_row, int64_t first_panel, int64_t end_panel) {
                  kernels().linear(a, first_row, end_row, first_panel, end_panel);
                });
}

void embedding(const void* ids, int64_t id_bytes, int64_t count, const uint8_t* panels, int64_t width, DataType dtype,
               void* out) {
  const int64_t bytes = panel_bytes(width, dtype);
  split(count, static_cast<double>(width), [&](int64_t first, int64_t end, int) {
    for (int64_t i = first; i < end; ++i) {
      const int64_t id = id_bytes == 8 ? static_cast<const int64_t*>(ids)[i] : static_cast<const int32_t*>(ids)[i];
      const uint32_t* column = reinterpret_cast<const uint32_t*>(panels + id / kPanelColumns * bytes) + id % kPanelColumns;
      uint8_t* row = static_cast<uint8_t*>(out) + i * width * bytes_per_element(dtype);
      const int64_t row_bytes = width * bytes_per_element(dtype);
      for (int64_t byte = 0; byte < row_bytes; byte += 4, column += kPanelColumns) {
        std::memcpy(row + byte, column, std::min<int64_t>(4, row_bytes - byte));
      }
    }
  });
}

void scale_rows(void* x, DataType dtype, float factor, int64_t rows, int64_t width) {
  if (factor == 1.0f) return;
  const int64_t bytes = width * bytes_per_element(dtype);
  split(rows, static_cast<double>(width) * 0.2, [&](int64_t first, int64_t end, int) {
    for (int64_t row = first; row < end; ++row) {
      kernels().scale_row(static_cast<uint8_t*>(x) + row * bytes, dtype, factor, width);
    }
  });
}

void softcap(float* x, int64_t stride, int64_t rows, int64_t width, float cap) {
  const int64_t per_row = divide_up(width, kRunLogits);
  split(rows * per_row, kRunLogits * 0.6, [&](int64_t first, int64_t end, int) {
    for (int64_t index = first; index < end; ++index) {
      const int64_t start = index % per_row * kRunLogits;
      kernels().softcap_row(x + index / per_row * stride + start, cap, std::min(kRunLogits, width - start));
    }
  });
}

void take_rows(const void* x, int64_t stride, const int32_t* rows, int64_t count, int64_t width, DataType dtype,
               void* out) {
  const int64_t element = bytes_per_element(dtype);
  split(count, static_cast<double>(width) * 0.1, [&](int64_t first, int64_t end, int) {
    for (int64_t i = first; i < end; ++i) {
      std::memcpy(static_cast<uint8_t*>(out) + i * width * element,
                  static_cast<const uint8_t*>(x) + rows[i] * stride * element, width * element);
    }
  });
}

CommonLimits common_limits(int64_t query_heads, int64_t kv_heads, int64_t head_size) {
  return {queries_per_piece(head_size, query_heads / kv_heads), divide_up(2 * thread_count(), kv_heads)};
}

void paged_attention(const AttentionArguments& arguments, int64_t sequences) {
  AttentionArguments a = arguments;
  // A window moves with each sequence, and with it what is common.
  if (a.window > 0) a.prefixes = nullptr;
  const AttentionPlan plan = count_pieces(a, sequences);
  if (plan.pieces == 0) return;
  const auto common_parts = [&](const AttentionPiece& piece) -> int64_t {
    return a.prefixes == nullptr ? 0 : a.prefixes->shared_parts[piece.sequence];
  };
  // With few pieces their parts are shared out; the numbers are the same either way.
  const bool shares_parts = thread_count() > 1 && plan.pieces < thread_count() * kChunksPerThread;
  const bool has_states = shares_parts || a.prefixes != nullptr;
  const int64_t most_tasks = has_states ? plan.parts : plan.pieces;
  const int64_t task_bytes = divide_up(most_tasks * sizeof(AttentionTask), 64) * 64;
  const int64_t counter_bytes = divide_up(plan.pieces * sizeof(std::atomic<int64_t>), 64) * 64;
  const int64_t common_bytes =
      a.prefixes == nullptr ? 0 : divide_up(sequences * a.kv_heads * sizeof(PieceParts), 64) * 64;
  uint8_t* const memory = static_cast<uint8_t*>(
      session_scratch(task_bytes + counter_bytes + common_bytes + (has_states ? plan.state_floats * 4 : 0)));
  AttentionTask* const list = reinterpret_cast<AttentionTask*>(memory);
  std::atomic<int64_t>* counter = reinterpret_cast<std::atomic<int64_t>*>(memory + task_bytes);
  PieceParts* const common = reinterpret_cast<PieceParts*>(memory + task_bytes + counter_bytes);
  float* states = reinterpret_cast<float*>(memory + task_bytes + counter_bytes + common_bytes);
  AttentionTask* next = list;
  const int64_t group = a.query_heads / a.kv_heads;
  const auto add_piece = [&](const AttentionPiece& piece) {
    const PartRange range = visible_parts(a, piece);
    const int64_t parts = range.end - range.first;
    if (common_parts(piece) == 0 && (!shares_parts || parts == 1)) {
      new (next++) AttentionTask{piece, -1, {}, nullptr};
      return;
    }
    new (counter) std::atomic<int64_t>(parts);
    const PieceParts own{states, counter, range.first, parts};
    if (common_parts(piece) > 0) common[piece.sequence * a.kv_heads + piece.kv_head] = own;
    for (int64_t part = range.first + common_parts(piece); part < range.end; ++part) {
      new (next++) AttentionTask{piece, part, own, nullptr};
    }
    ++counter;
    states += parts * kernels().attention_state_floats(a, piece.num_queries * group);
  };
  // What takes longest comes first.
  for_each_piece(a, sequences, true, add_piece);
  for (int64_t i = 0; a.prefixes != nullptr && i < a.prefixes->count; ++i) {
    const CommonPart& part = a.prefixes->parts[i];
    for (int64_t head = 0; head < a.kv_heads; ++head) new (next++) AttentionTask{{0, head, 0, 0}, part.part, {}, &part};
  }
  for_each_piece(a, sequences, false, add_piece);
  const int64_t scratch_bytes = kernels().attention_scratch_bytes(a, plan.most_rows);
  const int64_t count = next - list;
  const int64_t per_chunk = std::max<int64_t>(1, count / (thread_count() * 32));
  parallel_chunks(divide_up(count, per_chunk), [&](int64_t chunk, int thread) {
    void* const scratch = thread_scratch(thread, scratch_bytes);
    const int64_t end = std::min(count, (chunk + 1) * per_chunk);
    for (int64_t task = chunk * per_chunk; task < end; ++task) {
      run_task(a, list[task], task + 1 < end ? &list[task + 1] : nullptr, common, scratch);
    }
  }, Claims::kInOrder);
}

void rotary_and_store(const RotaryArguments& a, int64_t tokens) {
  // Keys and values go to lines that are not in the cache.
  const double nanoseconds = static_cast<double>((a.query_heads + 15 * a.kv_heads) * a.head_size) * 0.2;
  split(tokens, nanoseconds, [&](int64_t first, int64_t end, int) { kernels().rotary_and_store(a, first, end); });
}

void rms_norm(const NormArguments& a, int64_t rows, const Afterwards& afterwards) {
  split(rows, static_cast<double>(a.width) * 0.2, [&](int64_t first, int64_t end, int) {
    kernels().rms_norm(a, first, end);
    if (afterwards.work != nullptr) afterwards.work(afterwards.context, first, end);
  });
}

void gated_activation(const GateArguments& a, int64_t rows, const Afterwards& afterwards) {
  split(rows, static_cast<double>(a.width) * 0.5, [&](int64_t first, int64_t end, int) {
    kernels().gate(a, first, end);
    if (afterwards.work != nullptr) afterwards.work(afterwards.context, first, end);
  });
}

void greedy(const float* logits, int64_t stride, int64_t rows, int64_t width, int64_t* ids, float* logprobs) {
  const int64_t per_row = divide_up(width, kRunLogits);
  LogitRun* const runs = static_cast<LogitRun*>(session_scratch(rows * per_row * sizeof(LogitRun)));
  scan_rows(logits, stride, rows, width, runs);
  for (int64_t row = 0; row < rows; ++row) {
    const RowSummary summary = summarize(runs + row * per_row, per_row);
    ids[row] = summary.is_sound ? summary.best_index : -1;
    // As `token_logprobs` of the best id has it, to the sign of a zero: a certain token has +0.
    logprobs[row] = summary.is_sound ? static_cast<float>(0.0 - summary.log_sum)
                                     : std::numeric_limits<float>::quiet_NaN();
  }
}

void token_logprobs(const float* logits, int64_t stride, int64_t rows, int64_t width, const int64_t* ids,
                    float* logprobs) {
  const int64_t per_row = divide_up(width, kRunLogits);
  LogitRun* const runs = static_cast<LogitRun*>(session_scratch(rows * per_row * sizeof(LogitRun)));
  scan_rows(logits, stride, rows, width, runs);
  for (int64_t row = 0; row < rows; ++row) {
    const RowSummary summary = summarize(runs + row * per_row, per_row);
    const double above = static_cast<double>(logits[row * stride + ids[row]]) - summary.best;
    logprobs[row] = summary.is_sound ? static_cast<float>(above - summary.log_sum)
                                     : std::numeric_limits<float>::quiet_NaN();
  }
}

void race(const float* logits, int64_t stride, int64_t rows, int64_t width, const int64_t* seeds,
          const int64_t* positions, int64_t* ids) {
  const int64_t per_row = divide_up(width, kRunLogits);
  RaceRun* const runs = static_cast<RaceRun*>(session_scratch(rows * per_row * sizeof(RaceRun)));
  split(rows * per_row, kRunLogits * 0.3, [&](int64_t first, int64_t end, int thread) {
    float* const scratch = static_cast<float*>(thread_scratch(thread, kRaceScratchBytes));
    for (int64_t index = first; index < end; ++index) {
      const int64_t row = index / per_row, start = index % per_row * kRunLogits;
      runs[index] = kernels().race(logits + row * stride + start, start, std::min(kRunLogits, width - start),
                                   static_cast<uint64_t>(seeds[row]), static_cast<uint64_t>(positions[row]), scratch);
    }
  });
  for (int64_t row = 0; row < rows; ++row) ids[row] = winner(runs + row * per_row, per_row);
}

void draw(const DrawArguments& a, int64_t rows) {
  const int64_t per_row = divide_up(a.width, kRunLogits), count = rows * per_row;
  const int64_t bytes = count * (2 * sizeof(LogitRun) + sizeof(RaceRun)) + rows * sizeof(RowSummary);
  LogitRun* const raw = static_cast<LogitRun*>(session_scratch(bytes));
  LogitRun* const tempered = raw + count;
  RaceRun* const races = reinterpret_cast<RaceRun*>(tempered + count);
  RowSummary* const summaries = reinterpret_cast<RowSummary*>(races + count);
  scan_rows(a.logits, a.stride, rows, a.width, raw);
  for (int64_t row = 0; row < rows; ++row) summaries[row] = summarize(raw + row * per_row, per_row);
  const int64_t scratch_floats = kRaceScratchBytes / static_cast<int64_t>(sizeof(float));
  split(count, kRunLogits * 0.4, [&](int64_t first, int64_t end, int thread) {
    float* const scratch = static_cast<float*>(thread_scratch(thread, kRaceScratchBytes + kRunLogits * sizeof(float)));
    for (int64_t index = first; index < end; ++index) {
      const int64_t row = index / per_row, start = index % per_row * kRunLogits;
      const int64_t length = std::min(kRunLogits, a.width - start);
      const float* logits = a.logits + row * a.stride + start;
      if (a.temperatures[row] != 1.0f) {
        float* const changed = scratch + scratch_floats;
        kernels().temper(logits, length, summaries[row].best, a.temperatures[row], changed);
        logits = changed;
        if (a.is_raw[row] == 0) tempered[index] = kernels().scan_logits(logits, start, length);
      }
      races[index] = kernels().race(logits, start, length, static_cast<uint64_t>(a.seeds[row]),
                                    static_cast<uint64_t>(a.positions[row]), scratch);
    }
  });
  for (int64_t row = 0; row < rows; ++row) {
    a.ids[row] = winner(races + row * per_row, per_row);
    a.logprobs[row] = std::numeric_limits<float>::quiet_NaN();
    if (a.ids[row] < 0) continue;
    RowSummary summary = summaries[row];
    float logit = a.logits[row * a.stride + a.ids[row]];
    if (a.temperatures[row] != 1.0f && a.is_raw[row] == 0) {
      logit = (logit - summary.best) / a.temperatures[row];
      summary = summarize(tempered + row * per_row, per_row);
    }
    if (summary.is_sound) {
      a.logprobs[row] = static_cast<float>(static_cast<double>(logit) - summary.best - summary.log_sum);
    }
  }
}

}  // namespace weft
