// Runs independent tasks on OpenMP's threads.
#pragma once

#include <atomic>
#include <cstddef>
#include <memory>

namespace pybn {

// The most threads a call may use; OpenMP's own limit (OMP_NUM_THREADS, threadpoolctl, affinity) applies below it.
void set_num_threads(int limit);
int get_num_threads();
bool has_openmp();

// A limit for this thread's calls alone, below the others; 0 for none. Returns the previous one.
int limit_threads_here(int limit);

// Called between tasks, at most every 50 ms and only on the thread that called; returning true abandons the rest.
void set_interrupt_check(bool (*check)());

// Thrown when the interrupt check returned true.
struct Interrupted {};

// Tasks 0 to count - 1, dealt out to threads in ranges of neighbours. A thread takes its own first, so that call after
// call it works on the same data and finds them in its cache (inference on a 256x512 matrix takes half of the time that
// it does if any thread takes any task); then it takes what others have not begun.
class Tasks {
 public:
  enum class Order { first_to_last, last_to_first };  // within every range

  Tasks(std::size_t count, int threads, Order order = Order::first_to_last);

  std::size_t count() const { return count_; }
  // The next task for a thread; count() if all have been taken.
  std::size_t take(int thread);

 private:
  struct alignas(64) Range {
    std::size_t begin, end;
    std::atomic<std::size_t> taken{0};
  };

  std::size_t count_;
  int threads_;
  Order order_;
  std::unique_ptr<Range[]> ranges_;
};

// What threads wait for: that all of some tasks are done and a conclusion is drawn from them.
class Latch {
 public:
  // The last of `all` calls draws the conclusion.
  template <class Conclude>
  void done(std::size_t all, const Conclude& conclude) {
    if (done_.fetch_add(1, std::memory_order_acq_rel) + 1 < all) return;
    conclude();
    open_.store(true, std::memory_order_release);
  }
  bool is_open() const { return open_.load(std::memory_order_acquire); }

 private:
  std::atomic<std::size_t> done_{0};
  std::atomic<bool> open_{false};
};

// One of the threads that run a function together.
class Thread {
 public:
  // Takes tasks until none is left. They must not throw.
  template <class Task>
  void run(Tasks& tasks, const Task& task) {
    for (std::size_t i; !abandoned_ && (i = tasks.take(number_)) < tasks.count();) {
      task(i);
      if (number_ == 0) check_for_interrupt();
    }
  }
  // Tasks that open the latch must all have been taken.
  void wait(const Latch& latch) const;

 private:
  friend class Team;
  Thread(int number, std::atomic<bool>& abandoned) : number_(number), abandoned_(abandoned) {}
  void check_for_interrupt();

  int number_;
  std::atomic<bool>& abandoned_;
  long long next_check_ = 0;
};

namespace detail {
void run_together(int threads, void (*function)(const void* context, Thread&), const void* context);
}

// Calls function(thread) on each of at most `threads` threads at once.
template <class Function>
void run_together(int threads, const Function& function) {
  detail::run_together(
      threads, [](const void* context, Thread& thread) { (*static_cast<const Function*>(context))(thread); },
      std::addressof(function));
}

// Calls task(index) once for every index below count, on at most `threads` threads. The task must not throw.
template <class Task>
void parallel_for(std::size_t count, int threads, const Task& task) {
  Tasks tasks(count, threads);
  run_together(static_cast<int>(count < static_cast<std::size_t>(threads) ? count : threads),
               [&](Thread& thread) { thread.run(tasks, task); });
}

}  // namespace pybn
