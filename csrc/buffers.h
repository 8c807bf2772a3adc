// Recycled memory for large results.
//
// A fresh 100 MB array costs more in page faults (about 16 ms) than the kernel that fills it (about 10 ms), because
// malloc gives blocks of that size back to the system as soon as they are freed. The pool keeps them instead, up to a
// limit, and marks those that have not been wanted for some seconds as free to take (MADV_FREE), so that the system can
// have the pages when it needs them.
#pragma once

#include <cstddef>

namespace pybn {

// Results smaller than this are left to malloc, which recycles them itself.
constexpr std::size_t kPooledBytes = std::size_t{1} << 20;

struct Buffer {
  void* data;
  std::size_t bytes;  // what it holds, at least what was asked for
};

// A buffer of at least `bytes`, aligned to a page. Throws std::bad_alloc.
Buffer acquire_buffer(std::size_t bytes);

// Gives a buffer back. May be called from any thread, also while the interpreter shuts down.
void release_buffer(Buffer buffer) noexcept;

// Returns all cached blocks to the system.
void empty_buffers();

// The most bytes to keep cached; 0 keeps none.
void set_buffer_limit(std::size_t bytes);

struct PoolStatistics {
  std::size_t cached_bytes, limit_bytes;
  std::size_t recycled, fresh;  // requests served from the cache, and by the system
};
PoolStatistics buffer_statistics();

}  // namespace pybn
