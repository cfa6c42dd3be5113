#include "program.h"

#include <time.h>

#include <algorithm>

#include "layouts.h"
#include "operations.h"
#include "prefixes.h"
#include "thread_pool.h"

namespace weft {
namespace {

int64_t now_ns() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec * 1'000'000'000LL + time.tv_nsec;
}

int64_t first_outside(const int32_t* values, int64_t count, int64_t end, int64_t low = 0) {
  for (int64_t i = 0; i < count; ++i) {
    if (values[i] < low || values[i] >= end) return i;
  }
  return -1;
}

// The first sequence whose rows, length or blocks are out of range, or -1. Blocks that the widest window has left
// behind are never read and may hold anything.
int64_t first_bad_sequence(const Step& step, int64_t window) {
  for (int64_t s = 0; s < step.sequences; ++s) {
    const int64_t first_row = step.query_starts[s], end_row = step.query_starts[s + 1];
    const int64_t length = end_row - first_row, context = step.context_lens[s];
    if (first_row < 0 || length < 0 || end_row > step.tokens) return s;
    if (length == 0) continue;
    if (context < length || context > step.table_width * step.block_size) return s;
    const int64_t oldest = window > 0 && context - length >= window ? context - length - window + 1 : 0;
    const int64_t first = oldest / step.block_size;
    const int64_t end = (context + step.block_size - 1) / step.block_size;
    if (first_outside(step.block_tables + s * step.table_stride + first, end - first, step.num_blocks) >= 0) return s;
  }
  return -1;
}

// Finds the first product from `i` on and lets waiting threads ask for its weight. Returns `end` when there is none.
const Instruction* announce_product(const Instruction* i, const Instruction* end) {
  while (i != end && i->operation != Operation::kLinear) ++i;
  if (i != end) announce(i->linear.data, layout_at(i->linear.layout).bytes(i->linear));
  return i;
}

// What suits attention of every layer.
CommonLimits common_limits_of(const Instruction* program, const Instruction* end) {
  CommonLimits limits{INT64_MAX, 1};
  for (const Instruction* i = program; i != end; ++i) {
    if (i->operation != Operation::kPagedAttention) continue;
    const CommonLimits own = common_limits(i->query_heads, i->kv_heads, i->head_size);
    limits = {std::min(limits.most, own.most), std::max(limits.wanted, own.wanted)};
  }
  return limits;
}

class Runner {
 public:
  Runner(const Instruction* program, const Instruction* end, const Step& step)
      : step_(step),
        prefixes_(step.query_starts, step.context_lens, step.block_tables, step.table_stride, step.sequences,
                  step.block_size, common_limits_of(program, end)) {}

  // `next` is the instruction after i, or nullptr.
  void run(const Instruction& i, const Instruction* next) {
    switch (i.operation) {
      case Operation::kEmbedding: return look_up(i);
      case Operation::kLinear: return multiply(i);
      case Operation::kRmsNorm: return normalize(i, next);
      case Operation::kRotaryAndStore: return rotate(i);
      case Operation::kPagedAttention: return attend(i);
      case Operation::kGatedActivation: return activate(i, next);
      case Operation::kTakeRows: return take(i);
      case Operation::kSoftcap: return cap(i);
      case Operation::kGreedy: return choose(i);
    }
  }

 private:
  int64_t rows(const Instruction& i) const { return i.rows == Rows::kTokens ? step_.tokens : step_.logits; }

  void* at(const Operand& operand) const {
    if (operand.buffer == kNoBuffer) return nullptr;
    return static_cast<uint8_t*>(step_.buffers[operand.buffer]) + operand.offset * bytes_per_element(operand.dtype);
  }

  void look_up(const Instruction& i) const {
    layout_at(i.linear.layout).embedding(i.linear, step_.token_ids, step_.tokens, at(i.outputs[0]));
    scale_rows(at(i.outputs[0]), i.outputs[0].dtype, i.scale, step_.tokens, i.linear.in_features);
  }

  void multiply(const Instruction& i) const {
    const Operand &x = i.inputs[0], &residual = i.inputs[1], &out = i.outputs[0];
    layout_at(i.linear.layout)
        .linear(i.linear,
                {at(x), x.stride, at(residual), residual.stride, at(out), out.stride, rows(i), out.dtype,
                 &i.linear == preparation_.weight ? preparation_.prepared : nullptr});
  }

  // Where the product that comes next wants the rows that `i` makes in another form, the thread that makes them changes
  // them too: one barrier less, and the rows are still in its cache.
  Afterwards prepare_for(const Instruction* next, const Instruction& i) {
    if (next == nullptr || next->operation != Operation::kLinear || next->rows != i.rows) return {};
    const Operand &x = next->inputs[0], &made = i.outputs[0];
    const Layout& layout = layout_at(next->linear.layout);
    const bool is_made = x.buffer == made.buffer && x.offset == made.offset && x.stride == made.stride;
    if (layout.prepare == nullptr || !is_made) return {};
    preparation_ = {&next->linear, at(x), x.stride, session_scratch(rows(i) * layout.prepared_row_bytes(next->linear))};
    return {[](const void* context, int64_t first_row, int64_t end_row) {
              const PrepareRows& preparation = *static_cast<const PrepareRows*>(context);
              layout_at(preparation.weight->layout).prepare(preparation, first_row, end_row);
            },
            &preparation_};
  }

  void normalize(const Instruction& i, const Instruction* next) {
    const Operand& x = i.inputs[0];
    rms_norm({at(x), x.stride, i.inner, at(i.inputs[1]), i.weight, at(i.outputs[1]), at(i.outputs[0]), i.width, i.eps,
              i.weight_offset, x.dtype},
             rows(i) * i.inner, i.inner == 1 ? prepare_for(next, i) : Afterwards{});
  }

  void rotate(const Instruction& i) const {
    const Operand &q = i.inputs[0], &k = i.inputs[1], &v = i.inputs[2];
    rotary_and_store({at(q), q.stride, at(k), k.stride, at(v), v.stride, static_cast<const float*>(i.weight),
                      i.rotary_size, step_.positions, step_.kv_slots, step_.keys[i.layer], step_.values[i.layer],
                      i.query_heads, i.kv_heads, i.head_size, step_.block_size, q.dtype, step_.kv_dtype},
                     step_.tokens);
  }

  void attend(const Instruction& i) const {
    const Operand& q = i.inputs[0];
    paged_attention({at(q), q.stride, at(i.outputs[0]), step_.keys[i.layer], step_.values[i.layer], step_.block_tables,
                     step_.table_stride, step_.query_starts, step_.context_lens, i.scale, i.softcap, i.window,
                     i.query_heads, i.kv_heads, i.head_size, step_.block_size, q.dtype, step_.kv_dtype,
                     prefixes_.order()},
                    step_.sequences);
  }

  void activate(const Instruction& i, const Instruction* next) {
    const Operand& x = i.inputs[0];
    gated_activation({at(x), x.stride, at(i.outputs[0]), i.width, i.activation, x.dtype}, rows(i), prepare_for(next, i));
  }

  void take(const Instruction& i) const {
    const Operand& x = i.inputs[0];
    take_rows(at(x), x.stride, step_.logit_rows, step_.logits, i.width, x.dtype, at(i.outputs[0]));
  }

  void cap(const Instruction& i) const {
    const Operand& x = i.inputs[0];
    softcap(static_cast<float*>(at(x)), x.stride, rows(i), i.width, i.softcap);
  }

  void choose(const Instruction& i) const {
    const Operand& x = i.inputs[0];
    greedy(static_cast<const float*>(at(x)), x.stride, rows(i), i.width, static_cast<int64_t*>(at(i.outputs[0])),
           static_cast<float*>(at(i.outputs[1])));
  }

  const Step& step_;
  const PrefixFinder prefixes_;
  PrepareRows preparation_{};  // of the latest rows that were prepared
};

}  // namespace

Finding check_step(const Instruction* program, int64_t count, const Step& step) {
  int64_t vocabulary = INT32_MAX, positions = INT32_MAX, window = -1;
  for (const Instruction* i = program; i != program + count; ++i) {
    if (i->operation == Operation::kEmbedding && i->linear.out_features < vocabulary) {
      vocabulary = i->linear.out_features;
    }
    if (i->operation == Operation::kRotaryAndStore && i->table_rows < positions) positions = i->table_rows;
    if (i->operation == Operation::kPagedAttention) {
      const bool sees_all = i->window == 0 || window == 0;
      window = sees_all ? 0 : (i->window > window ? i->window : window);
    }
  }
  const int64_t token = first_outside(step.token_ids, step.tokens, vocabulary);
  if (token >= 0) return {Fault::kTokenId, token};
  const int64_t position = first_outside(step.positions, step.tokens, positions);
  if (position >= 0) return {Fault::kPosition, position};
  const int64_t slot = first_outside(step.kv_slots, step.tokens, step.num_blocks * step.block_size, INT32_MIN);
  if (slot >= 0) return {Fault::kKvSlot, slot};
  const int64_t sequence = first_bad_sequence(step, window);
  if (sequence >= 0) return {Fault::kSequence, sequence};
  const int64_t row = first_outside(step.logit_rows, step.logits, step.tokens);
  if (row >= 0) return {Fault::kLogitRow, row};
  return {Fault::kNone, 0};
}

void run_step(const Instruction* program, int64_t count, const Step& step) {
  const Instruction* const end = program + count;
  Runner runner(program, end, step);
  const Instruction* product = announce_product(program, end);
  int64_t before = step.nanoseconds == nullptr ? 0 : now_ns();
  for (const Instruction* i = program; i != end; ++i) {
    if (i == product) product = announce_product(i + 1, end);
    runner.run(*i, i + 1 == end ? nullptr : i + 1);
    if (step.nanoseconds == nullptr) continue;
    const int64_t after = now_ns();
    step.nanoseconds[i - program] += after - before;
    before = after;
  }
}

}  // namespace weft
