#include "thread_pool.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <climits>
#include <cstdlib>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

namespace weft {
namespace {

// Long enough to bridge the gap between two operations of a step, short enough that an idle server burns nothing and
// that a neighbour on the same core gets it.
constexpr int64_t kSpinNanoseconds = 40'000;
constexpr int kPausesPerClockRead = 32;
constexpr int kMaxThreads = 256;
// A quarter of a second-level cache: what a thread asks for while it waits must still be there when it is read.
constexpr int64_t kMostAhead = 256 << 10;
constexpr int64_t kAheadPerPause = 512;

int64_t now_ns() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec * 1'000'000'000LL + time.tv_nsec;
}

void futex_wait(std::atomic<uint32_t>& word, uint32_t expected) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT_PRIVATE, expected, nullptr, nullptr, 0);
}

void futex_wake_all(std::atomic<uint32_t>& word) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}

void pause_cpu() { __builtin_ia32_pause(); }

// Spins until `is_done`, at most kSpinNanoseconds, with `rest` between two looks. Returns whether it is.
template <typename Condition, typename Rest>
bool spin_until(const Condition& is_done, const Rest& rest) {
  const int64_t deadline = now_ns() + kSpinNanoseconds;
  do {
    for (int pause = 0; pause < kPausesPerClockRead; ++pause) {
      if (is_done()) return true;
      rest();
    }
  } while (now_ns() < deadline);
  return is_done();
}

struct Scratch {
  void* memory = nullptr;
  int64_t bytes = 0;

  void* at_least(int64_t wanted) {
    if (bytes < wanted) {
      std::free(memory);
      bytes = (wanted + 4095) / 4096 * 4096;
      memory = std::aligned_alloc(4096, bytes);
      if (memory == nullptr) std::abort();
    }
    return memory;
  }

  void release() {
    std::free(memory);
    memory = nullptr;
    bytes = 0;
  }
};

class Pool {
 public:
  void run(ChunkFunction function, const void* context, int64_t count, Claims claims) {
    if (count <= 0) return;
    if (count == 1 || count_ == 1) {
      for (int64_t chunk = 0; chunk < count; ++chunk) function(context, chunk, 0);
      return;
    }
    if (threads_.empty()) start();
    // More chunks than a claim can count are run in rounds.
    for (int64_t first = 0; first < count; first += kMaxChunks) {
      const int64_t round = count - first < kMaxChunks ? count - first : kMaxChunks;
      run_round(function, context, first, round, claims);
    }
  }

  void set_count(int count) {
    std::lock_guard<std::mutex> lock(callers_);
    const int bounded = count < 1 ? 1 : (count > kMaxThreads ? kMaxThreads : count);
    if (bounded == count_) return;
    stop();
    count_ = bounded;
  }

  int count() const { return count_; }

  void stop_all() {
    std::lock_guard<std::mutex> lock(callers_);
    stop();
  }

  void announce(const void* memory, int64_t bytes) {
    announced_.store(static_cast<const uint8_t*>(memory), std::memory_order_relaxed);
    announced_bytes_.store(bytes, std::memory_order_relaxed);
  }

  void* scratch(int thread, int64_t bytes) { return scratch_[thread].at_least(bytes); }
  void* session_scratch(int64_t bytes) { return session_scratch_.at_least(bytes); }
  void open_session() { callers_.lock(); }
  void close_session() { callers_.unlock(); }

  // Called in a forked child, where the other threads do not exist.
  void forget_threads() {
    for (std::thread& thread : threads_) thread.detach();
    threads_.clear();
    sleeping_.store(0, std::memory_order_relaxed);
    new (&callers_) std::mutex();
  }

  ~Pool() { stop(); }

 private:
  static constexpr int64_t kMaxChunks = 1 << 30;

  // Chunks of a thread that nobody has claimed: first << 32 | end.
  struct alignas(64) Run {
    std::atomic<uint64_t> unclaimed{0};
  };

  void run_round(ChunkFunction function, const void* context, int64_t first, int64_t count, Claims claims) {
    function_ = function;
    context_ = context;
    first_ = first;
    claims_.store(claims, std::memory_order_relaxed);
    unfinished_.store(static_cast<uint32_t>(count), std::memory_order_relaxed);
    const int64_t runs = claims == Claims::kOwnRun ? count_.load(std::memory_order_relaxed) : 1;
    for (int64_t run = 0; run < runs; ++run) {
      const uint64_t begin = count * run / runs, end = count * (run + 1) / runs;
      runs_[run].unclaimed.store(begin << 32 | end, std::memory_order_release);
    }
    wake_word_.fetch_add(1, std::memory_order_seq_cst);
    if (sleeping_.load(std::memory_order_seq_cst) > 0) futex_wake_all(wake_word_);

    work(0);

    const auto is_done = [this] { return unfinished_.load(std::memory_order_acquire) == 0; };
    if (spin_until(is_done, [this] { ask_ahead(0); })) return;
    caller_sleeps_.store(1, std::memory_order_seq_cst);
    for (uint32_t left; (left = unfinished_.load(std::memory_order_seq_cst)) != 0;) futex_wait(unfinished_, left);
    caller_sleeps_.store(0, std::memory_order_relaxed);
  }

  // Takes a chunk from one end of a run. Returns whether there was one. A thread that slept through a whole job may
  // succeed with what it saw before: then the run is at that place again, and the chunk is one of the present job.
  static bool claim(Run& run, bool from_end, int64_t* chunk) {
    uint64_t seen = run.unclaimed.load(std::memory_order_acquire);
    for (;;) {
      const uint64_t begin = seen >> 32, end = seen & UINT32_MAX;
      if (begin == end) return false;
      const uint64_t left = from_end ? begin << 32 | (end - 1) : (begin + 1) << 32 | end;
      if (!run.unclaimed.compare_exchange_weak(seen, left, std::memory_order_acq_rel, std::memory_order_acquire)) {
        continue;
      }
      *chunk = static_cast<int64_t>(from_end ? end - 1 : begin);
      return true;
    }
  }

  // Claims and runs chunks until none is left, the thread's own first. The job's fields are read only after a
  // successful claim: they cannot change before that chunk is reported as finished.
  void work(int thread) {
    const int count = count_.load(std::memory_order_relaxed);
    uint32_t finished = 0;
    for (int i = 0; i < count; ++i) {
      const int owner = (thread + i) % count;
      const bool from_end = i > 0 && claims_.load(std::memory_order_relaxed) == Claims::kOwnRun;
      for (int64_t chunk; claim(runs_[owner], from_end, &chunk); ++finished) function_(context_, first_ + chunk, thread);
    }
    if (finished == 0) return;
    if (unfinished_.fetch_sub(finished, std::memory_order_seq_cst) == finished &&
        caller_sleeps_.load(std::memory_order_seq_cst) != 0) {
      futex_wake_all(unfinished_);
    }
  }

  // Asks for the next bit of what was announced, or pauses when there is none. An announcement seen half is harmless:
  // nothing is read.
  void ask_ahead(int thread) {
    Foresight& own = foresights_[thread];
    const uint8_t* const memory = announced_.load(std::memory_order_relaxed);
    if (memory != own.announced) {
      const int64_t bytes = announced_bytes_.load(std::memory_order_relaxed), count = count_.load(std::memory_order_relaxed);
      own = {memory, memory + bytes / count * thread, bytes / count < kMostAhead ? bytes / count : kMostAhead};
    }
    if (own.left <= 0) return pause_cpu();
    for (int64_t byte = 0; byte < kAheadPerPause; byte += 64) __builtin_prefetch(own.next + byte, 0, 2);
    own.next += kAheadPerPause;
    own.left -= kAheadPerPause;
  }

  void serve(int thread) {
    for (;;) {
      // Read before looking for work: a job published since then has changed the word, and nothing waits.
      const uint32_t seen = wake_word_.load(std::memory_order_seq_cst);
      if (stopping_.load(std::memory_order_relaxed)) return;
      work(thread);
      const auto is_called = [this, seen] { return wake_word_.load(std::memory_order_acquire) != seen; };
      if (spin_until(is_called, [this, thread] { ask_ahead(thread); })) continue;
      sleeping_.fetch_add(1, std::memory_order_seq_cst);
      futex_wait(wake_word_, seen);
      sleeping_.fetch_sub(1, std::memory_order_seq_cst);
    }
  }

  void start() {
    stopping_.store(false, std::memory_order_relaxed);
    for (int thread = 1; thread < count_; ++thread) {
      threads_.emplace_back([this, thread] { serve(thread); });
    }
  }

  void stop() {
    stopping_.store(true, std::memory_order_seq_cst);
    wake_word_.fetch_add(1, std::memory_order_seq_cst);
    futex_wake_all(wake_word_);
    for (std::thread& thread : threads_) thread.join();
    threads_.clear();
    for (Scratch& own : scratch_) own.release();
    session_scratch_.release();
  }

  std::mutex callers_;
  std::atomic<int> count_{1};
  std::vector<std::thread> threads_;
  Scratch scratch_[kMaxThreads];
  Scratch session_scratch_;

  // The running job.
  ChunkFunction function_ = nullptr;
  const void* context_ = nullptr;
  int64_t first_ = 0;
  std::atomic<Claims> claims_{Claims::kOwnRun};
  Run runs_[kMaxThreads];

  struct alignas(64) Foresight {
    const uint8_t* announced = nullptr;
    const uint8_t* next = nullptr;
    int64_t left = 0;
  };
  Foresight foresights_[kMaxThreads];
  std::atomic<const uint8_t*> announced_{nullptr};
  std::atomic<int64_t> announced_bytes_{0};

  alignas(64) std::atomic<uint32_t> unfinished_{0};
  std::atomic<uint32_t> caller_sleeps_{0};
  alignas(64) std::atomic<uint32_t> wake_word_{0};
  std::atomic<uint32_t> sleeping_{0};
  std::atomic<bool> stopping_{false};
};

Pool& pool() {
  static Pool instance;
  static const int registered = pthread_atfork(nullptr, nullptr, [] { pool().forget_threads(); });
  static_cast<void>(registered);
  return instance;
}

}  // namespace

void set_thread_count(int count) { pool().set_count(count); }
int thread_count() { return pool().count(); }
void run_chunks(ChunkFunction function, const void* context, int64_t count, Claims claims) {
  pool().run(function, context, count, claims);
}
void announce(const void* memory, int64_t bytes) { pool().announce(memory, bytes); }
Session::Session() { pool().open_session(); }
Session::~Session() { pool().close_session(); }
void* session_scratch(int64_t bytes) { return pool().session_scratch(bytes); }
void* thread_scratch(int thread, int64_t bytes) { return pool().scratch(thread, bytes); }
void stop_threads() { pool().stop_all(); }

}  // namespace weft
