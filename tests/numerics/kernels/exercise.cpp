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

extern "C" {
int32_t weft_select(const char* name);
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
void weft_race(const float*, int64_t, int64_t, int64_t, const int64_t*, const int64_t*, int64_t*);
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
  for (const Shape& s : {Shape{9, 3, 64, 32, 0, 0.f}, {2, 2, 8, 16, 20, 0.f}, {3, 1, 72, 48, 0, 5.f}, {4, 1, 128, 64, 600, 0.f}}) {
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
    for (const int64_t rotary_size : {80, 34, 2}) {
      const int64_t tokens = 60, head_size = 80, block_size = 16, blocks = 5;
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
  }
}

Results everything() {
  Results results;
  linears(results);
  attention(results);
  rows(results);
  logits(results);
  return results;
}

}  // namespace

int main() {
  for (const char* name : {"avx2", "avx512", "avx512-bf16"}) {
    if (weft_select(name) == 0) {
      std::printf("%s: not on this machine\n", name);
      continue;
    }
    weft_set_threads(1);
    const Results expected = everything();
    for (const int threads : {2, 4, 3}) {
      weft_set_threads(threads);
      if (everything() != expected) {
        std::printf("%s: %d threads change the result\n", name, threads);
        return 1;
      }
    }
    bool same[3] = {};
    std::vector<std::thread> callers;
    for (bool& is_same : same) callers.emplace_back([&] { is_same = everything() == expected; });
    for (std::thread& caller : callers) caller.join();
    if (!(same[0] && same[1] && same[2])) {
      std::printf("%s: concurrent callers change the result\n", name);
      return 1;
    }
    weft_stop();
    std::printf("%s: %zu bytes of results, the same with 1, 2, 3 and 4 threads and 3 callers\n", name, expected.size());
  }
  return 0;
}
