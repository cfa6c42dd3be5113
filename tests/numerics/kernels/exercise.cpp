// Calls every function of the compiled kernels' C interface on odd shapes, from one and from several threads, with
// buffers of exactly the size that is promised: a program for the sanitizers, which cannot look into Python.
//
//   python -m weft.kernels.cpu.build --sanitize thread --program tests/numerics/kernels/exercise.cpp --output-dir DIR
//
// Ends with 0 when all thread counts gave the same bits and no sanitizer complained.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "program.h"
#include "quantized.h"

extern "C" {
int32_t weft_select(const char* name);
int32_t weft_select_quantized(const char* name);
void weft_set_threads(int32_t count);
void weft_stop();
int64_t weft_packed_bytes(int64_t, int64_t, int32_t);
void weft_pack_panels(const void*, int64_t, void*, int64_t, int64_t, int32_t);
void weft_linear(const void*, int64_t, const void*, const float*, const void*, int64_t, void*, int64_t, int64_t,
                 int64_t, int64_t, int32_t, int32_t);
int64_t weft_embedding(const void*, int64_t, int64_t, const void*, int64_t, int64_t, int32_t, void*);
int64_t weft_paged_attention(const void*, int64_t, void*, const void*, const void*, int64_t, const int32_t*, int64_t,
                             int64_t, const int32_t*, const int32_t*, int64_t, int64_t, float, float, int64_t, int64_t,
                             int64_t, int64_t, int64_t, int32_t, int32_t);
int64_t weft_rotary_and_store(void*, int64_t, const void*, int64_t, const void*, int64_t, const float*, int64_t,
                              int64_t, const int32_t*, const int32_t*, void*, void*, int64_t, int64_t, int64_t, int64_t,
                              int64_t, int64_t, int32_t, int32_t);
void weft_rms_norm(const void*, int64_t, int64_t, int64_t, const void*, const void*, void*, void*, int64_t, float, float,
                   int32_t);
void weft_gated_activation(const void*, int64_t, void*, int64_t, int64_t, int32_t, int32_t);
void weft_greedy(const float*, int64_t, int64_t, int64_t, int64_t*, float*);
int64_t weft_token_logprobs(const float*, int64_t, int64_t, int64_t, const int64_t*, float*);
void weft_draw(const float*, int64_t, int64_t, int64_t, const float*, const int64_t*, const int64_t*, const uint8_t*,
               int64_t*, float*);
void weft_race(const float*, int64_t, int64_t, int64_t, const int64_t*, const int64_t*, int64_t*);
int64_t weft_quantized_bytes(int64_t, int64_t, const weft::QuantizedFormat*);
void weft_quantize_weight(const void*, int64_t, int32_t, int64_t, int64_t, int64_t, int64_t, void*,
                          const weft::QuantizedFormat*);
void weft_pack_codes(const uint8_t*, const uint16_t*, const uint16_t*, int64_t, int64_t, void*,
                     const weft::QuantizedFormat*);
void weft_quantized_linear(const void*, int64_t, const void*, const float*, const void*, int64_t, void*, int64_t, int64_t,
                           int64_t, int64_t, int32_t, int32_t);
int64_t weft_quantized_embedding(const int32_t*, int64_t, const void*, int64_t, int64_t, int32_t, void*);
int32_t weft_find_layout(const char*, int32_t);
int32_t weft_run_step(const weft::Instruction*, int64_t, const weft::Step*, int64_t*);
}

namespace {

constexpr int32_t kDtypes[] = {0, 1};       // float32, bfloat16
constexpr int32_t kPoolDtypes[] = {0, 1, 2};  // and int8

// Small repeatable numbers.
struct Random {
  uint64_t state;
  float next() {
    state = state * 6364136223846793005ULL + 1442695040888963407ULL;
    return static_cast<float>(static_cast<int32_t>(state >> 40) - (1 << 23)) / (1 << 22);
  }
};

// `count` elements of a dtype in a heap block of exactly that size.
struct Array {
  std::unique_ptr<uint8_t[]> memory;
  int64_t bytes;

  Array(int64_t count, int32_t dtype) : bytes(count * (dtype == 0 ? 4 : dtype == 1 ? 2 : 1)) {
    memory.reset(new uint8_t[bytes]);
    std::memset(memory.get(), 0, bytes);
  }
  Array(int64_t count, int32_t dtype, uint64_t seed) : Array(count, dtype) {
    Random random{seed};
    for (int64_t i = 0; i < count; ++i) {
      const float value = random.next();
      uint32_t bits;
      std::memcpy(&bits, &value, 4);
      if (dtype == 0) {
        std::memcpy(memory.get() + i * 4, &bits, 4);
      } else if (dtype == 2) {
        memory[i] = bits >> 16 & 0x3F;  // as codes, and as the bytes of a scale of about one
      } else {
        const uint16_t high = static_cast<uint16_t>(bits >> 16);
        std::memcpy(memory.get() + i * 2, &high, 2);
      }
    }
  }
  void* get() const { return memory.get(); }
  float* floats() const { return reinterpret_cast<float*>(memory.get()); }
};

// What a run computed, as bytes to compare with another run.
using Results = std::string;

void keep(Results& results, const Array& array) { results.append(static_cast<const char*>(array.get()), array.bytes); }

template <typename Number>
void keep(Results& results, const std::vector<Number>& numbers) {
  results.append(reinterpret_cast<const char*>(numbers.data()), numbers.size() * sizeof(Number));
}

void linears(Results& results) {
  for (const int32_t dtype : kDtypes) {
    for (const auto& [outputs, inputs] : {std::pair{1, 1}, {31, 33}, {65, 127}, {96, 64}, {257, 20}}) {
      const Array weight(outputs * inputs, dtype, 1), bias(outputs, 0, 2);
      const Array panels(weft_packed_bytes(outputs, inputs, dtype) / 4, 0);
      weft_pack_panels(weight.get(), inputs, panels.get(), outputs, inputs, dtype);
      for (const int64_t rows : {0, 1, 2, 5, 12, 13, 40, 300}) {
        const Array x(rows * inputs, dtype, 3), residual(rows * outputs, dtype, 4);
        const Array y(rows * outputs, dtype), z(rows * outputs, 0);
        weft_linear(x.get(), inputs, panels.get(), bias.floats(), residual.get(), outputs, y.get(), outputs, rows,
                    inputs, outputs, dtype, dtype);
        weft_linear(x.get(), inputs, panels.get(), nullptr, nullptr, 0, z.get(), outputs, rows, inputs, outputs, dtype,
                    0);
        keep(results, y);
        keep(results, z);
      }
      const std::vector<int32_t> ids = {0, outputs - 1, outputs / 2};
      const Array rows(3 * inputs, dtype);
      weft_embedding(ids.data(), 4, 3, panels.get(), inputs, outputs, dtype, rows.get());
      keep(results, rows);
    }
  }
}

void attention(Results& results) {
  struct Shape {
    int64_t query_heads, kv_heads, head_size, block_size, window;
    float softcap;
  };
  for (const Shape& s : {Shape{9, 3, 64, 32, 0, 0.f}, {2, 2, 8, 16, 20, 0.f}, {3, 1, 72, 48, 0, 5.f}, {6, 2, 50, 16, 0, 0.f}, {4, 1, 128, 64, 600, 0.f}}) {
    for (const int32_t dtype : kDtypes) {
      for (const int32_t kv_dtype : kPoolDtypes) {
        const std::vector<int32_t> rows = {1, 40, 1, 0, 130}, contexts = {1, 40, 700, 0, 1100};
        int64_t width = 0, blocks = 0;
        std::vector<int32_t> starts = {0};
        for (size_t i = 0; i < rows.size(); ++i) {
          const int64_t used = (contexts[i] + s.block_size - 1) / s.block_size;
          width = used > width ? used : width;
          blocks += used;
          starts.push_back(starts.back() + rows[i]);
        }
        std::vector<int32_t> tables(rows.size() * width, -1);
        int32_t block = static_cast<int32_t>(blocks);
        for (size_t i = 0; i < rows.size(); ++i) {
          for (int64_t j = 0; j * s.block_size < contexts[i]; ++j) tables[i * width + j] = --block;
        }
        const int64_t pool = blocks * s.kv_heads * s.block_size * (s.head_size + (kv_dtype == 2 ? 4 : 0));
        const Array keys(pool, kv_dtype, 5), values(pool, kv_dtype, 6);
        const int64_t tokens = starts.back();
        const Array q(tokens * s.query_heads * s.head_size, dtype, 7), out(tokens * s.query_heads * s.head_size, dtype);
        const int64_t bad = weft_paged_attention(
            q.get(), s.query_heads * s.head_size, out.get(), keys.get(), values.get(), blocks, tables.data(), width,
            width, starts.data(), contexts.data(), static_cast<int64_t>(rows.size()), tokens, 0.125f, s.softcap,
            s.window, s.query_heads, s.kv_heads, s.head_size, s.block_size, dtype, kv_dtype);
        if (bad != 0) std::abort();
        keep(results, out);
      }
    }
  }
}

void rows(Results& results) {
  for (const int32_t dtype : kDtypes) {
    for (const int64_t width : {1, 5, 33, 100, 576}) {
      for (const int64_t count : {0, 1, 7, 200}) {
        const Array x(count * width, dtype, 8), residual(count * width, dtype, 9), weight(width, dtype, 10);
        const Array sum(count * width, dtype), normed(count * width, dtype);
        weft_rms_norm(x.get(), width, count, 1, residual.get(), weight.get(), sum.get(), normed.get(), width, 1e-5f,
                      1.0f, dtype);
        keep(results, sum);
        keep(results, normed);
        for (const int32_t kind : {0, 1}) {
          const Array pairs(count * 2 * width, dtype, 11), gated(count * width, dtype);
          weft_gated_activation(pairs.get(), 2 * width, gated.get(), count, width, kind, dtype);
          keep(results, gated);
        }
      }
    }
    for (const auto& [head_size, rotary_size] : {std::pair<int64_t, int64_t>{80, 80}, {80, 34}, {80, 2}, {50, 50}}) {
      const int64_t tokens = 60, block_size = 16, blocks = 5;
      const Array q(tokens * 4 * head_size, dtype, 12), k(tokens * 2 * head_size, dtype, 13);
      const Array cos_sin(50 * rotary_size, 0, 14);
      std::vector<int32_t> positions, slots;
      for (int32_t token = 0; token < tokens; ++token) {
        positions.push_back(token % 50);
        slots.push_back(token % 7 == 0 ? -1 : token);
      }
      for (const int32_t kv_dtype : kPoolDtypes) {
        const int64_t pool = blocks * 2 * block_size * (head_size + (kv_dtype == 2 ? 4 : 0));
        const Array keys(pool, kv_dtype), values(pool, kv_dtype);
        weft_rotary_and_store(q.get(), 4 * head_size, k.get(), 2 * head_size, k.get(), 2 * head_size, cos_sin.floats(),
                              50, rotary_size, positions.data(), slots.data(), keys.get(), values.get(), blocks, tokens,
                              4, 2, head_size, block_size, dtype, kv_dtype);
        keep(results, q);
        keep(results, keys);
      }
    }
  }
}

void logits(Results& results) {
  for (const int64_t width : {1, 5, 100, 8193, 20000}) {
    const int64_t count = 3;
    const Array scores(count * width, 0, 15);
    std::vector<int64_t> ids(count), chosen(count, width - 1), seeds = {-1, 0, 77}, positions = {0, 1LL << 40, 5};
    std::vector<float> logprobs(count);
    weft_greedy(scores.floats(), width, count, width, ids.data(), logprobs.data());
    keep(results, ids);
    keep(results, logprobs);
    weft_token_logprobs(scores.floats(), width, count, width, chosen.data(), logprobs.data());
    keep(results, logprobs);
    weft_race(scores.floats(), width, count, width, seeds.data(), positions.data(), ids.data());
    keep(results, ids);
    const std::vector<float> temperatures = {1.0f, 0.5f, 2.0f};
    const std::vector<uint8_t> is_raw = {0, 1, 0};
    weft_draw(scores.floats(), width, count, width, temperatures.data(), seeds.data(), positions.data(), is_raw.data(),
              ids.data(), logprobs.data());
    keep(results, ids);
    keep(results, logprobs);
  }
}

// Memory of a packed weight, which begins at a cache line, in a heap block that ends where the weight does.
struct Packed {
  std::unique_ptr<uint8_t, void (*)(void*)> memory;

  explicit Packed(int64_t bytes) : memory(static_cast<uint8_t*>(std::aligned_alloc(64, bytes)), std::free) {
    if (bytes % 64 != 0) std::abort();
    std::memset(memory.get(), 0, bytes);
  }
  void* get() const { return memory.get(); }
};

// 8 bits with a scale per output, and every kind of group that a GGUF file brings.
constexpr weft::QuantizedFormat kPerOutput{8, 64, 128, 0, 1};
constexpr weft::QuantizedFormat kWithMinima{4, 32, 0, 1, 0};
constexpr weft::QuantizedFormat kFileFormats[] = {
    {4, 32, 8, 0, 0}, {4, 32, 0, 1, 0}, {6, 16, 32, 0, 0}, {6, 32, 0, 1, 0}, {8, 32, 128, 0, 0}};

Packed quantize(const Array& weight, int64_t outputs, int64_t inputs, int32_t dtype, const weft::QuantizedFormat& format) {
  Packed packed(weft_quantized_bytes(outputs, inputs, &format));
  weft_quantize_weight(weight.get(), inputs, dtype, inputs, 0, inputs, outputs, packed.get(), &format);
  return packed;
}

Packed pack_codes(int64_t outputs, int64_t inputs, const weft::QuantizedFormat& format) {
  const int64_t groups = (inputs + format.group_size - 1) / format.group_size;
  std::vector<uint8_t> codes(outputs * inputs);
  std::vector<uint16_t> scales(outputs * groups), minima(outputs * groups);
  Random random{16};
  for (uint8_t& code : codes) code = static_cast<uint8_t>(static_cast<int32_t>(random.next() * 1000.f) & ((1 << format.bits) - 1));
  for (uint16_t& scale : scales) scale = static_cast<uint16_t>(0x2000 + static_cast<int32_t>(random.next() * 500.f));
  for (uint16_t& minimum : minima) minimum = static_cast<uint16_t>(0xA000 + static_cast<int32_t>(random.next() * 500.f));
  Packed packed(weft_quantized_bytes(outputs, inputs, &format));
  weft_pack_codes(codes.data(), scales.data(), format.has_minimum ? minima.data() : nullptr, inputs, outputs,
                  packed.get(), &format);
  return packed;
}

void multiply_quantized(Results& results, const Packed& packed, int64_t outputs, int64_t inputs, int32_t dtype) {
  const Array bias(outputs, 0, 2);
  for (const int64_t rows : {0, 1, 3, 8, 9, 40, 200}) {
    const Array x(rows * inputs, dtype, 3), residual(rows * outputs, dtype, 4), y(rows * outputs, dtype), z(rows * outputs, 0);
    weft_quantized_linear(x.get(), inputs, packed.get(), bias.floats(), residual.get(), outputs, y.get(), outputs, rows,
                          inputs, outputs, dtype, dtype);
    weft_quantized_linear(x.get(), inputs, packed.get(), nullptr, nullptr, 0, z.get(), outputs, rows, inputs, outputs,
                          dtype, 0);
    keep(results, y);
    keep(results, z);
  }
  const std::vector<int32_t> ids = {0, static_cast<int32_t>(outputs - 1)};
  const Array rows(2 * inputs, dtype);
  if (weft_quantized_embedding(ids.data(), 2, packed.get(), inputs, outputs, dtype, rows.get()) != 0) std::abort();
  keep(results, rows);
}

void quantized(Results& results) {
  for (const int32_t dtype : kDtypes) {
    for (const auto& [outputs, inputs] : {std::pair{1, 1}, {33, 31}, {65, 200}, {96, 64}}) {
      const Array weight(outputs * inputs, dtype, 17);
      for (const weft::QuantizedFormat& format : {kPerOutput, kWithMinima}) {
        multiply_quantized(results, quantize(weight, outputs, inputs, dtype, format), outputs, inputs, dtype);
      }
      for (const weft::QuantizedFormat& format : kFileFormats) {
        multiply_quantized(results, pack_codes(outputs, inputs, format), outputs, inputs, dtype);
      }
    }
  }
}

// A model of one layer as a program: all its operations, weights in each layout, rows that share their beginning.
class Model {
 public:
  Model() {
    const weft::PackedWeight embedding = panels(kVocabulary, kHidden, 20);
    begin(weft::Operation::kEmbedding, {}, {at(kStream)}).linear = embedding;
    norm({at(kStream)}, {at(kNormed)});
    begin(weft::Operation::kLinear, {at(kNormed)}, {at(kHeads)}).linear = panels(kHeadsWidth, kHidden, 21);
    weft::Instruction& rotary = begin(weft::Operation::kRotaryAndStore,
                                      {at(kHeads), at(kHeads, kHidden), at(kHeads, kHidden + kHeadSize)}, {});
    rotary.weight = table_.get();
    rotary.rotary_size = kHeadSize;
    rotary.table_rows = kPositions;
    describe_heads(rotary);
    weft::Instruction& attention = begin(weft::Operation::kPagedAttention, {at(kHeads)}, {at(kNormed)});
    attention.scale = 0.25f;
    describe_heads(attention);
    begin(weft::Operation::kLinear, {at(kNormed)}, {at(kDelta)}).linear = few_bits(kHidden, kHidden, 22, kPerOutput);
    norm({at(kDelta), at(kStream)}, {at(kNormed), at(kSum)});
    begin(weft::Operation::kLinear, {at(kNormed)}, {at(kPairs)}).linear = few_bits(2 * kFeedForward, kHidden, 23, kWithMinima);
    weft::Instruction& gate = begin(weft::Operation::kGatedActivation, {at(kPairs)}, {at(kGated)});
    gate.width = kFeedForward;
    gate.activation = weft::kSilu;
    begin(weft::Operation::kLinear, {at(kGated), at(kSum)}, {at(kDelta)}).linear = panels(kHidden, kFeedForward, 24);
    begin(weft::Operation::kTakeRows, {at(kDelta)}, {at(kTaken)}, weft::Rows::kLogits).width = kHidden;
    begin(weft::Operation::kLinear, {at(kTaken)}, {at(kLogits)}, weft::Rows::kLogits).linear = embedding;
    weft::Instruction& cap = begin(weft::Operation::kSoftcap, {at(kLogits)}, {}, weft::Rows::kLogits);
    cap.width = kVocabulary;
    cap.softcap = 5.f;
    begin(weft::Operation::kGreedy, {at(kLogits)}, {at(kChosen), at(kLogprobs)}, weft::Rows::kLogits).width = kVocabulary;
  }

  // Sequences of some rows each at the end of some context; the first `shared` blocks are the same for all.
  void run(Results& results, const std::vector<int32_t>& rows, const std::vector<int32_t>& contexts, int32_t shared) const {
    const int64_t sequences = static_cast<int64_t>(rows.size());
    std::vector<int32_t> starts = {0}, positions, slots, ids, tables(sequences * kTableWidth, -1), last_rows;
    int32_t blocks = shared;
    for (int64_t s = 0; s < sequences; ++s) {
      for (int32_t block = 0; block * kBlockSize < contexts[s]; ++block) {
        tables[s * kTableWidth + block] = block < shared ? block : blocks++;
      }
      for (int32_t position = contexts[s] - rows[s]; position < contexts[s]; ++position) {
        positions.push_back(position);
        slots.push_back(tables[s * kTableWidth + position / kBlockSize] * kBlockSize + position % kBlockSize);
        ids.push_back(position % kVocabulary);
      }
      starts.push_back(starts.back() + rows[s]);
      last_rows.push_back(starts.back() - 1);
    }
    const int64_t tokens = starts.back(), pool = blocks * kBlockSize * kHeadSize;
    const Array keys(pool, 1, 25), values(pool, 1, 26);
    std::vector<Array> buffers;
    for (int64_t buffer = 0; buffer < kBuffers; ++buffer) {
      const int64_t count = kWidths[buffer] * (buffer >= kTaken ? sequences : tokens);
      buffers.emplace_back(buffer == kChosen ? 2 * count : count, buffer >= kLogits ? 0 : 1);
    }
    std::vector<void*> pointers;
    for (const Array& buffer : buffers) pointers.push_back(buffer.get());
    void* const keys_of_layers[] = {keys.get()};
    void* const values_of_layers[] = {values.get()};
    weft::Step step{ids.data(), positions.data(), slots.data(), starts.data(), contexts.data(), tables.data(),
                    last_rows.data(), tokens, sequences, sequences, kTableWidth, kTableWidth, blocks, kBlockSize,
                    weft::kBfloat16, keys_of_layers, values_of_layers, pointers.data(), nullptr};
    int64_t index = 0;
    const auto run_program = [&] {
      return weft_run_step(instructions_.data(), static_cast<int64_t>(instructions_.size()), &step, &index);
    };
    std::vector<int64_t> nanoseconds(instructions_.size());
    step.nanoseconds = nanoseconds.data();
    if (run_program() != 0) std::abort();
    for (const int64_t buffer : {kDelta, kLogits, kChosen, kLogprobs}) keep(results, buffers[buffer]);
    keep(results, keys);
    slots[0] = static_cast<int32_t>(blocks * kBlockSize);
    if (run_program() != static_cast<int32_t>(weft::Fault::kKvSlot) || index != 0) std::abort();
  }

 private:
  static constexpr int64_t kVocabulary = 67, kHidden = 48, kHeadSize = 16, kHeadsWidth = 80, kFeedForward = 41;
  static constexpr int64_t kBlockSize = 32, kTableWidth = 40, kPositions = kTableWidth * kBlockSize;
  // Buffers, those with a row per token first.
  enum : int32_t { kStream, kNormed, kHeads, kDelta, kSum, kPairs, kGated, kTaken, kLogits, kChosen, kLogprobs, kBuffers };
  static constexpr int64_t kWidths[kBuffers] = {kHidden, kHidden, kHeadsWidth, kHidden, kHidden, 2 * kFeedForward,
                                                kFeedForward, kHidden, kVocabulary, 1, 1};

  static weft::Operand at(int32_t buffer, int64_t offset = 0) {
    return {buffer, buffer >= kLogits ? weft::kFloat32 : weft::kBfloat16, offset, kWidths[buffer]};
  }

  weft::Instruction& begin(weft::Operation operation, const std::vector<weft::Operand>& inputs,
                           const std::vector<weft::Operand>& outputs, weft::Rows rows = weft::Rows::kTokens) {
    weft::Instruction instruction{};
    instruction.operation = operation;
    instruction.rows = rows;
    for (weft::Operand& input : instruction.inputs) input.buffer = weft::kNoBuffer;
    for (weft::Operand& output : instruction.outputs) output.buffer = weft::kNoBuffer;
    for (size_t i = 0; i < inputs.size(); ++i) instruction.inputs[i] = inputs[i];
    for (size_t i = 0; i < outputs.size(); ++i) instruction.outputs[i] = outputs[i];
    instruction.inner = 1;
    instruction.scale = 1.f;
    instructions_.push_back(instruction);
    return instructions_.back();
  }

  void norm(const std::vector<weft::Operand>& inputs, const std::vector<weft::Operand>& outputs) {
    weft::Instruction& instruction = begin(weft::Operation::kRmsNorm, inputs, outputs);
    instruction.weight = norm_.get();
    instruction.width = kHidden;
    instruction.eps = 1e-5f;
  }

  static void describe_heads(weft::Instruction& instruction) {
    instruction.query_heads = kHidden / kHeadSize;
    instruction.kv_heads = 1;
    instruction.head_size = kHeadSize;
  }

  weft::PackedWeight keep_weight(Packed packed, int64_t outputs, int64_t inputs, const char* layout) {
    weights_.push_back(std::move(packed));
    return {weights_.back().get(), nullptr, nullptr, outputs, inputs, weft::kBfloat16, weft_find_layout(layout, 0)};
  }

  weft::PackedWeight panels(int64_t outputs, int64_t inputs, uint64_t seed) {
    const Array weight(outputs * inputs, 1, seed);
    Packed packed(weft_packed_bytes(outputs, inputs, 1));
    weft_pack_panels(weight.get(), inputs, packed.get(), outputs, inputs, 1);
    return keep_weight(std::move(packed), outputs, inputs, "panels");
  }

  weft::PackedWeight few_bits(int64_t outputs, int64_t inputs, uint64_t seed, const weft::QuantizedFormat& format) {
    const Array weight(outputs * inputs, 1, seed);
    return keep_weight(quantize(weight, outputs, inputs, 1, format), outputs, inputs, "quantized");
  }

  const Array table_{kPositions * kHeadSize, 0, 27}, norm_{kHidden, 1, 28};
  std::vector<Packed> weights_;
  std::vector<weft::Instruction> instructions_;
};

void programs(Results& results) {
  const Model model;
  model.run(results, {1}, {1}, 0);
  model.run(results, {1, 1, 1, 5}, {1100, 1060, 1040, 1200}, 32);  // whole parts in common, read once
  model.run(results, {1, 1, 1, 5, 1}, {700, 1000, 690, 720, 640}, 20);  // and tiles of a part
  model.run(results, {130, 1, 40}, {130, 700, 640}, 0);
}

Results everything() {
  Results results;
  linears(results);
  attention(results);
  rows(results);
  logits(results);
  quantized(results);
  programs(results);
  return results;
}

struct Kernels {
  const char* name;
  const char* quantized;
};

constexpr Kernels kKernels[] = {
    {"avx2", "avx2"}, {"avx2", "avx-vnni"}, {"avx512", "avx512"}, {"avx512-bf16", "avx512-vnni"}};

}  // namespace

int main() {
  for (const Kernels& kernels : kKernels) {
    if (weft_select(kernels.name) == 0 || weft_select_quantized(kernels.quantized) == 0) {
      std::printf("%s and %s: not on this machine\n", kernels.name, kernels.quantized);
      continue;
    }
    weft_set_threads(1);
    const Results expected = everything();
    for (const int threads : {2, 3}) {
      weft_set_threads(threads);
      if (everything() != expected) {
        std::printf("%s: %d threads change the result\n", kernels.name, threads);
        return 1;
      }
    }
    bool same[2] = {};
    std::vector<std::thread> callers;
    for (bool& is_same : same) callers.emplace_back([&] { is_same = everything() == expected; });
    for (std::thread& caller : callers) caller.join();
    if (!(same[0] && same[1])) {
      std::printf("%s: concurrent callers change the result\n", kernels.name);
      return 1;
    }
    weft_stop();
    std::printf("%s and %s: %zu bytes of results, the same with 1, 2 and 3 threads and from 2 callers\n", kernels.name,
                kernels.quantized, expected.size());
  }
  return 0;
}
