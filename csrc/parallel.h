// Runs independent tasks on OpenMP's threads.
#pragma once

#include <cstddef>
#include <memory>

namespace pybn {

// The most threads a call may use; OpenMP's own limit (OMP_NUM_THREADS, threadpoolctl, affinity) applies below it.
void set_num_threads(int limit);
int get_num_threads();
bool has_openmp();

// Called between tasks, at most every 50 ms and only on the thread that called parallel_for; returning true abandons
// the rest.
void set_interrupt_check(bool (*check)());

// Thrown by parallel_for when the interrupt check returned true.
struct Interrupted {};

namespace detail {
void parallel_for(std::size_t count, int threads, void (*task)(const void* context, std::size_t index),
                  const void* context);
}

// Calls task(index) once for every index below count, on at most `threads` threads, in no particular order. The task
// must not throw.
template <class Task>
void parallel_for(std::size_t count, int threads, const Task& task) {
  detail::parallel_for(
      count, threads, [](const void* context, std::size_t index) { (*static_cast<const Task*>(context))(index); },
      std::addressof(task));
}

}  // namespace pybn
