// A persistent pool whose threads spin briefly between jobs and then sleep.
//
// A job is a number of independent chunks. Threads claim chunks one by one, so a thread that the operating system
// takes away delays only the chunk it holds, never the whole job: with a busy neighbour on one of two cores the other
// core does the rest. No result may depend on which thread runs a chunk.
//
// Every thread has a run of neighbouring chunks of its own and takes them in ascending order; when it has none left it
// takes the others' from their far ends. So a thread walks along memory, finds in its cache what it left there in the
// last job of the same shape, and asks nobody for the next chunk until the end.
//
// Threads are started by the first job. A process forked from this one inherits no threads: its first job starts
// its own. Forking while a job runs in another thread leaves the child's pool unusable, as with every lock.
#pragma once

#include <cstdint>

namespace weft {

// Runs one chunk. `thread` is 0 for the calling thread and below thread_count() for every other.
using ChunkFunction = void (*)(const void* context, int64_t chunk, int thread);

// Sets how many threads work, the caller included; at least 1. Waits for a running session.
void set_thread_count(int count);
int thread_count();

// The right to use the pool and its scratch memory. Every entry point of the library opens one and keeps it until it
// returns, so that calls from several Python threads are served one after another, each as a whole.
class Session {
 public:
  Session();
  ~Session();
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;
};

enum class Claims {
  kOwnRun,     // as above
  kInOrder,    // all threads take the lowest chunk that is left: for chunks sorted by descending size
};

// Runs chunks 0 … count-1 and returns when all are done. The caller holds a Session.
void run_chunks(ChunkFunction function, const void* context, int64_t count, Claims claims);

// The same with any callable `void(int64_t chunk, int thread)`; nothing is allocated.
template <typename Callable>
inline void parallel_chunks(int64_t count, const Callable& callable, Claims claims = Claims::kOwnRun) {
  run_chunks(
      [](const void* context, int64_t chunk, int thread) {
        (*static_cast<const Callable*>(context))(chunk, thread);
      },
      &callable, count, claims);
}

// Says which memory the next jobs will read, in runs of equal length, one per thread. A thread that has nothing to do
// asks for the beginning of its run while it waits, so memory is not idle between two jobs. The memory is not touched.
void announce(const void* memory, int64_t bytes);

// Memory of one thread: at least `bytes`, aligned to 4096, contents undefined, valid until the next call for that
// thread. While a job runs only the thread itself may call it.
void* thread_scratch(int thread, int64_t bytes);

// The same, owned by the session: what is passed from one job to the next.
void* session_scratch(int64_t bytes);

// Stops and joins every thread. The next job starts them again.
void stop_threads();

}  // namespace weft
