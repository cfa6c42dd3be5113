// Whole operations: cut into pieces, run on the pool. The caller holds a Session, so a program that runs many
// operations one after another takes it once.
#pragma once

#include <cstdint>

#include "kernels.h"
#include "prefixes.h"

namespace weft {

// The kernels in use. Chosen once by what the CPU can do; `select_kernels` overrides it by name.
const KernelTable& kernels();
// Returns whether the CPU has the named instruction set; nullptr chooses the best one it has.
bool select_kernels(const char* name);

// What a thread does with rows that it has just made, while they are in its cache.
struct Afterwards {
  void (*work)(const void* context, int64_t first_row, int64_t end_row) = nullptr;  // nullptr: nothing
  const void* context = nullptr;
};

void pack_panels(const PackArguments& arguments);
// `x` holds rows of in_features in `dtype`, x_stride elements apart; x and x_row_bytes of the arguments are set here.
void linear(LinearArguments arguments, const void* x, int64_t x_stride);
void embedding(const void* ids, int64_t id_bytes, int64_t count, const uint8_t* panels, int64_t width, DataType dtype,
               void* out);
// Rows of `width` contiguous elements: times a factor; capped; `count` of them copied.
void scale_rows(void* x, DataType dtype, float factor, int64_t rows, int64_t width);
void softcap(float* x, int64_t stride, int64_t rows, int64_t width, float cap);
void take_rows(const void* x, int64_t stride, const int32_t* rows, int64_t count, int64_t width, DataType dtype,
               void* out);
CommonLimits common_limits(int64_t query_heads, int64_t kv_heads, int64_t head_size);
void paged_attention(const AttentionArguments& arguments, int64_t sequences);
void rotary_and_store(const RotaryArguments& arguments, int64_t tokens);
void rms_norm(const NormArguments& arguments, int64_t rows, const Afterwards& afterwards = {});
void gated_activation(const GateArguments& arguments, int64_t rows, const Afterwards& afterwards = {});
void greedy(const float* logits, int64_t stride, int64_t rows, int64_t width, int64_t* ids, float* logprobs);
void token_logprobs(const float* logits, int64_t stride, int64_t rows, int64_t width, const int64_t* ids,
                    float* logprobs);
// Temperatures of 1 change nothing; log-probabilities are of the logits where `is_raw`, else of what they became.
struct DrawArguments {
  const float* logits;
  int64_t stride;
  int64_t width;
  const float* temperatures;
  const int64_t* seeds;
  const int64_t* positions;
  const uint8_t* is_raw;
  int64_t* ids;
  float* logprobs;
};
void draw(const DrawArguments& arguments, int64_t rows);
void race(const float* logits, int64_t stride, int64_t rows, int64_t width, const int64_t* seeds,
          const int64_t* positions, int64_t* ids);

}  // namespace weft
