#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <chrono>

#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace pybn {
namespace {

std::atomic<int> thread_limit{1 << 20};
std::atomic<bool (*)()> interrupt_check{nullptr};

// A forked child has none of its parent's OpenMP threads, and libgomp would wait for them for ever: run serially there.
std::atomic<bool> forked{false};
#if defined(__unix__) || defined(__APPLE__)
const int fork_handler = pthread_atfork(nullptr, nullptr, [] { forked = true; });
#endif

using Clock = std::chrono::steady_clock;
constexpr auto kInterruptInterval = std::chrono::milliseconds(50);

// The work of one parallel_for, shared by its threads.
class Queue {
 public:
  explicit Queue(std::size_t count) : count_(count) {}

  void work(bool is_caller, void (*task)(const void*, std::size_t), const void* context) {
    Clock::time_point next_check = Clock::now() + kInterruptInterval;
    for (std::size_t i; !interrupted_ && (i = next_++) < count_;) {
      task(context, i);
      if (is_caller && Clock::now() >= next_check) {
        check();
        next_check = Clock::now() + kInterruptInterval;
      }
    }
  }

  bool interrupted() const { return interrupted_; }

 private:
  void check() {
    if (bool (*check)() = interrupt_check)
      if (check()) interrupted_ = true;
  }

  const std::size_t count_;
  std::atomic<std::size_t> next_{0};
  std::atomic<bool> interrupted_{false};
};

}  // namespace

void set_num_threads(int limit) {
  thread_limit = limit;
}

int get_num_threads() {
#if defined(_OPENMP)
  // Never omp_set_num_threads: the value belongs to the whole process, to torch and to threadpoolctl.
  return forked ? 1 : std::min<int>(thread_limit, omp_get_max_threads());
#else
  return 1;
#endif
}

bool has_openmp() {
#if defined(_OPENMP)
  return true;
#else
  return false;
#endif
}

void set_interrupt_check(bool (*check)()) {
  interrupt_check = check;
}

namespace detail {

void parallel_for(std::size_t count, int threads, void (*task)(const void*, std::size_t), const void* context) {
  Queue queue(count);
  threads = static_cast<int>(std::min<std::size_t>(static_cast<std::size_t>(std::max(threads, 1)), count));
#if defined(_OPENMP)
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    queue.work(omp_get_thread_num() == 0, task, context);
  } else
#endif
    queue.work(true, task, context);
  if (queue.interrupted()) throw Interrupted{};
}

}  // namespace detail
}  // namespace pybn
