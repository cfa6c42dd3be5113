// What the fixed order of additions costs our own bfloat16 products: the kernel in use beside tiles of the same making
// that split the sum over inputs into several chains, as only some numbers of rows would have it. How rows and panels
// are cut is free in any case. `invariance.py --own` builds and runs it.
//
//   free_order ROUNDS        one line per number of rows: rows, ms of ours, ms of the best other form, its name
#include <sys/mman.h>
#include <time.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "operations.h"
#include "thread_pool.h"

#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni")
#include "vector_avx512.h"

namespace weft {
namespace {

constexpr int kVectors = kPanelColumns / kLanes;
constexpr int64_t kStreamAhead = 8192;

// As in vector_avx512.h, which does not see that the pragma allows it.
WEFT_INLINE Floats dot(Floats sum, const void* x, Words w) {
  return _mm512_dpbf16_ps(sum, (__m512bh)broadcast_word(x), (__m512bh)w);
}

// Rows and panels of a tile, and chains of additions per output.
template <int kRows, int kPanels, int kChains>
__attribute__((noinline)) void multiply_tile(const LinearArguments& a, int64_t row, int64_t panel, int64_t ahead,
                                             int64_t ahead_step) {
  const int64_t bytes = panel_bytes(a.in_features, a.dtype);
  Floats sums[kChains][kRows][kPanels * kVectors];
  for (auto& chain : sums) {
    for (auto& of_row : chain) {
      for (Floats& sum : of_row) sum = zero();
    }
  }
  const uint8_t* x = static_cast<const uint8_t*>(a.x) + row * a.x_row_bytes;
  const uint8_t* w = a.panels + panel * bytes;
  const uint8_t* later = w + ahead;
  for (int64_t step = panel_steps(a.in_features, a.dtype); step > 0; step -= kChains) {
#pragma GCC unroll 4
    for (int chain = 0; chain < kChains; ++chain) {
      Words weights[kPanels * kVectors];
#pragma GCC unroll 4
      for (int vector = 0; vector < kPanels * kVectors; ++vector) {
        const int64_t place = vector / kVectors * bytes + vector % kVectors * 64;
        weights[vector] = load_words(w + place);
        __builtin_prefetch(later + place);
      }
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int vector = 0; vector < kPanels * kVectors; ++vector) {
          sums[chain][r][vector] = dot(sums[chain][r][vector], x + r * a.x_row_bytes, weights[vector]);
        }
      }
      x += 4;
      w += 128;
      later += ahead_step;
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int vector = 0; vector < kPanels * kVectors; ++vector) {
      Floats sum = sums[0][r][vector];
      for (int chain = 1; chain < kChains; ++chain) sum = add(sum, sums[chain][r][vector]);
      store(static_cast<uint16_t*>(a.out) + (row + r) * a.out_stride + panel * kPanelColumns + vector * kLanes, sum);
    }
  }
}

template <int kRows, int kPanels, int kChains>
void multiply_rows(const LinearArguments& a, int64_t rows, int64_t row, int64_t panel, int64_t ahead, int64_t step) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return multiply_rows<kRows - 1, kPanels, kChains>(a, rows, row, panel, ahead, step);
  }
  multiply_tile<kRows, kPanels, kChains>(a, row, panel, ahead, step);
}

// As `linear_piece` of kernels.inl goes through panels and rows, and asks for weights ahead.
template <int kRows, int kPanels, int kChains>
void multiply(const LinearArguments& a) {
  const int64_t bytes = panel_bytes(a.in_features, a.dtype), tiles = (a.rows + kRows - 1) / kRows;
  for (int64_t panel = 0; panel < panel_count(a.out_features); panel += kPanels) {
    int64_t row = 0;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t rows = (a.rows - row + (tiles - tile) - 1) / (tiles - tile);
      const int64_t ahead = tiles == 1 ? kStreamAhead : kPanels * bytes + tile * (bytes / tiles);
      multiply_rows<kRows, kPanels, kChains>(a, rows, row, panel, ahead, (128 + tiles - 1) / tiles);
      row += rows;
    }
  }
}

void multiply_ours(const LinearArguments& a) { kernels().linear(a, 0, a.rows, 0, panel_count(a.out_features)); }

struct Form {
  const char* name;
  void (*multiply)(const LinearArguments&);
};

// As many rows as the registers hold.
constexpr Form kForms[] = {
    {"ours", multiply_ours},
    {"1 panel, 2 chains", multiply<6, 1, 2>},
    {"1 panel, 4 chains", multiply<3, 1, 4>},
    {"2 panels, 2 chains", multiply<3, 2, 2>},
    {"2 panels, 4 chains", multiply<1, 2, 4>},
};
constexpr int kCount = sizeof(kForms) / sizeof(kForms[0]);

struct Kind {
  int64_t inputs;
  int64_t outputs;
  int64_t matrices;
};

// The matrices of SmolLM2-135M.
constexpr Kind kKinds[] = {{576, 960, 30}, {576, 576, 30}, {576, 3072, 30}, {1536, 576, 30}, {576, 49152, 1}};

double thread_ms() {
  timespec time;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) * 1e3 + static_cast<double>(time.tv_nsec) / 1e6;
}

// As arena.py takes memory for weights: on pages of 4 KiB other forms would seem better.
uint8_t* map_large_pages(int64_t bytes) {
  void* const memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return nullptr;
  madvise(memory, bytes, MADV_HUGEPAGE);
  return static_cast<uint8_t*>(memory);
}

// The shortest pass over all matrices of a kind by each form, in turns.
std::vector<double> measure(const Kind& kind, const uint8_t* weights, int64_t rows, int rounds) {
  const int64_t bytes = panel_count(kind.outputs) * panel_bytes(kind.inputs, kBfloat16);
  std::vector<uint16_t> x(rows * kind.inputs, 0x3F80), out(rows * kind.outputs);
  std::vector<double> best(kCount, 1e30);
  for (int round = 0; round < rounds; ++round) {
    for (int form = 0; form < kCount; ++form) {
      const double begun = thread_ms();
      for (int64_t matrix = 0; matrix < kind.matrices; ++matrix) {
        kForms[form].multiply({x.data(), kind.inputs * 2, weights + matrix * bytes, nullptr, nullptr, 0, out.data(),
                               kind.outputs, rows, kind.inputs, kind.outputs, kBfloat16, kBfloat16});
      }
      best[form] = std::min(best[form], thread_ms() - begun);
    }
  }
  return best;
}

void print_row(const std::vector<std::vector<double>>& of_kinds, int64_t rows) {
  double totals[kCount] = {};
  for (const std::vector<double>& best : of_kinds) {
    for (int form = 0; form < kCount; ++form) totals[form] += best[form];
  }
  int other = 1;
  for (int form = 2; form < kCount; ++form) {
    if (totals[form] < totals[other]) other = form;
  }
  std::printf("%ld\t%.3f\t%.3f\t%s\n", static_cast<long>(rows), totals[0], totals[other], kForms[other].name);
  std::fflush(stdout);
}

}  // namespace
}  // namespace weft

int main(int count, char** arguments) {
  using namespace weft;
  if (count != 2) return std::fputs("usage: free_order ROUNDS\n", stderr), 1;
  if (&kernels() != &kAvx512Bf16Kernels) return std::fputs("needs bfloat16 dot products\n", stderr), 1;
  std::vector<uint8_t*> weights;
  for (const Kind& kind : kKinds) {
    const int64_t bytes = kind.matrices * panel_count(kind.outputs) * panel_bytes(kind.inputs, kBfloat16);
    uint8_t* const memory = map_large_pages(bytes + kStreamAhead);
    if (memory == nullptr) return std::fputs("too little memory\n", stderr), 1;
    std::fill(memory, memory + bytes, static_cast<uint8_t>(0x3C));
    weights.push_back(memory);
  }
  const int rounds = std::atoi(arguments[1]);
  for (const int64_t rows : {1, 2, 4, 8, 16, 64}) {
    std::vector<std::vector<double>> of_kinds;
    for (size_t i = 0; i < weights.size(); ++i) of_kinds.push_back(measure(kKinds[i], weights[i], rows, rounds));
    print_row(of_kinds, rows);
  }
  return 0;
}
