#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <thread>
#include <utility>

#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace pybn {
namespace {

std::atomic<int> thread_limit{1 << 20};
thread_local int thread_limit_here = 0;
std::atomic<bool (*)()> interrupt_check{nullptr};

// A forked child has none of its parent's OpenMP threads, and libgomp would wait for them for ever: run serially there.
std::atomic<bool> forked{false};
#if defined(__unix__) || defined(__APPLE__)
const int fork_handler = pthread_atfork(nullptr, nullptr, [] { forked = true; });
#endif

using Clock = std::chrono::steady_clock;
constexpr auto kInterruptInterval = std::chrono::milliseconds(50);

// Turns of a waiting loop, some microseconds, before others get the core: one of them may have what is waited for.
constexpr int kSpins = 1 << 12;

long long ticks_now() {
  return Clock::now().time_since_epoch().count();
}

}  // namespace

void set_num_threads(int limit) {
  thread_limit = limit;
}

int get_num_threads() {
#if defined(_OPENMP)
  // Never omp_set_num_threads: the value belongs to the whole process, to torch and to threadpoolctl.
  const int limit = forked ? 1 : std::min<int>(thread_limit, omp_get_max_threads());
  return thread_limit_here > 0 ? std::min(limit, thread_limit_here) : limit;
#else
  return 1;
#endif
}

int limit_threads_here(int limit) {
  return std::exchange(thread_limit_here, limit);
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

Tasks::Tasks(std::size_t count, int threads, Order order)
    : count_(count), threads_(std::max(threads, 1)), order_(order), ranges_(new Range[threads_]) {
  const auto shares = static_cast<std::size_t>(threads_);
  for (std::size_t i = 0; i < shares; ++i) {
    ranges_[i].begin = count * i / shares;
    ranges_[i].end = count * (i + 1) / shares;
  }
}

std::size_t Tasks::take(int thread) {
  for (int i = 0; i < threads_; ++i) {
    Range& range = ranges_[(thread + i) % threads_];
    const std::size_t size = range.end - range.begin;
    if (range.taken.load(std::memory_order_relaxed) >= size) continue;  // so that the count cannot grow for ever
    const std::size_t taken = range.taken.fetch_add(1, std::memory_order_relaxed);
    if (taken < size) return order_ == Order::first_to_last ? range.begin + taken : range.end - 1 - taken;
  }
  return count_;
}

void Thread::wait(const Latch& latch) const {
  for (int turn = 0; !latch.is_open() && !abandoned_; ++turn)
    if (turn > kSpins) std::this_thread::yield();
}

void Thread::check_for_interrupt() {
  const long long now = ticks_now();
  if (next_check_ == 0) next_check_ = now + Clock::duration(kInterruptInterval).count();
  if (now < next_check_) return;
  next_check_ = 0;
  if (bool (*check)() = interrupt_check)
    if (check()) abandoned_ = true;
}

class Team {
 public:
  Team(void (*function)(const void*, Thread&), const void* context) : function_(function), context_(context) {}

  void work(int number) {
    Thread thread(number, abandoned_);
    function_(context_, thread);
  }
  bool was_abandoned() const { return abandoned_; }

 private:
  void (*function_)(const void*, Thread&);
  const void* context_;
  std::atomic<bool> abandoned_{false};
};

namespace detail {

void run_together(int threads, void (*function)(const void*, Thread&), const void* context) {
  Team team(function, context);
#if defined(_OPENMP)
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    team.work(omp_get_thread_num());
  } else
#endif
    team.work(0);
  if (team.was_abandoned()) throw Interrupted{};
}

}  // namespace detail
}  // namespace pybn
