#include "buffers.h"

#include <chrono>
#include <list>
#include <mutex>
#include <new>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#include <sys/mman.h>
#endif

namespace pybn {
namespace {

// One huge page. Buffers are multiples of it, so that one serves requests of nearly its size too.
constexpr std::size_t kGranularity = std::size_t{1} << 21;

// A recycled buffer may exceed the request by this part of it: more would hold memory that nobody uses.
constexpr std::size_t kSlack = 4;

using Clock = std::chrono::steady_clock;

// A buffer that nobody has wanted for so long is offered to the system. Not as soon as it is released, because the
// cores must forget its addresses for that: inference with a fresh result of 6 MB took twice as long as with `out=`.
constexpr auto kIdleTime = std::chrono::seconds(5);

std::size_t rounded(std::size_t bytes) {
  return (bytes + kGranularity - 1) / kGranularity * kGranularity;
}

#if defined(__unix__) || defined(__APPLE__)

// Maps one huge page more than needed and returns the ends, so that the rest is aligned to huge pages.
Buffer map(std::size_t bytes) {
  void* raw = mmap(nullptr, bytes + kGranularity, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (raw == MAP_FAILED) throw std::bad_alloc();
  char* begin = static_cast<char*>(raw);
  const std::size_t skip = (kGranularity - reinterpret_cast<std::size_t>(begin) % kGranularity) % kGranularity;
  if (skip > 0) munmap(begin, skip);
  munmap(begin + skip + bytes, kGranularity - skip);
#if defined(MADV_HUGEPAGE)
  madvise(begin + skip, bytes, MADV_HUGEPAGE);
#endif
  return {begin + skip, bytes};
}

void unmap(Buffer buffer) noexcept {
  munmap(buffer.data, buffer.bytes);
}

// Lets the system take the pages if it runs short; writing to one that is still there costs nothing.
void offer_to_system(Buffer buffer) noexcept {
#if defined(MADV_FREE)
  madvise(buffer.data, buffer.bytes, MADV_FREE);
#else
  (void)buffer;
#endif
}

#else

Buffer map(std::size_t bytes) {
  return {::operator new(bytes), bytes};
}
void unmap(Buffer buffer) noexcept {
  ::operator delete(buffer.data);
}
void offer_to_system(Buffer) noexcept {}

#endif

class Pool {
 public:
  Buffer acquire(std::size_t bytes) {
    bytes = rounded(bytes);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      auto best = cached_.end();
      for (auto it = cached_.begin(); it != cached_.end(); ++it) {
        const std::size_t size = it->buffer.bytes;
        if (size >= bytes && size <= bytes + bytes / kSlack && (best == cached_.end() || size < best->buffer.bytes))
          best = it;
      }
      if (best != cached_.end()) {
        const Buffer buffer = best->buffer;
        cached_.erase(best);
        cached_bytes_ -= buffer.bytes;
        ++recycled_;
        return buffer;
      }
      ++fresh_;
    }
    return map(bytes);
  }

  void release(Buffer buffer) noexcept {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (buffer.bytes > limit_) return unmap(buffer);
    const Clock::time_point now = Clock::now();
    try {
      cached_.push_front({buffer, now, false});
    } catch (const std::bad_alloc&) {
      return unmap(buffer);
    }
    cached_bytes_ += buffer.bytes;
    shrink_to(limit_);
    offer_idle(now);
  }

  void set_limit(std::size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    limit_ = bytes;
    shrink_to(limit_);
  }

  void empty() {
    const std::lock_guard<std::mutex> lock(mutex_);
    shrink_to(0);
  }

  PoolStatistics statistics() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return {cached_bytes_, limit_, recycled_, fresh_};
  }

  std::mutex& mutex() { return mutex_; }

 private:
  struct Cached {
    Buffer buffer;
    Clock::time_point since;
    bool is_offered;
  };

  // Gives up the buffers that have waited longest.
  void shrink_to(std::size_t bytes) noexcept {
    while (cached_bytes_ > bytes) {
      unmap(cached_.back().buffer);
      cached_bytes_ -= cached_.back().buffer.bytes;
      cached_.pop_back();
    }
  }

  // Since they are in the order of their release, those that are not idle yet come last.
  void offer_idle(Clock::time_point now) noexcept {
    for (auto it = cached_.rbegin(); it != cached_.rend() && now - it->since >= kIdleTime; ++it) {
      if (it->is_offered) continue;
      offer_to_system(it->buffer);
      it->is_offered = true;
    }
  }

  std::mutex mutex_;
  std::list<Cached> cached_;  // the one released last in front
  std::size_t cached_bytes_ = 0, limit_ = 0, recycled_ = 0, fresh_ = 0;
};

// Never destroyed: arrays that outlive the interpreter's modules still give their buffers back.
Pool& pool() {
  static Pool* const instance = [] {
    Pool* created = new Pool;
#if defined(__unix__) || defined(__APPLE__)
    // A child forked while another thread held the lock would find it locked for ever.
    pthread_atfork([] { pool().mutex().lock(); }, [] { pool().mutex().unlock(); }, [] { pool().mutex().unlock(); });
#endif
    return created;
  }();
  return *instance;
}

}  // namespace

Buffer acquire_buffer(std::size_t bytes) {
  return pool().acquire(bytes);
}
void release_buffer(Buffer buffer) noexcept {
  pool().release(buffer);
}
void empty_buffers() {
  pool().empty();
}
void set_buffer_limit(std::size_t bytes) {
  pool().set_limit(bytes);
}
PoolStatistics buffer_statistics() {
  return pool().statistics();
}

}  // namespace pybn
