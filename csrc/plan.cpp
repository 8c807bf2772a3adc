#include "plan.h"

#include <algorithm>
#include <fstream>

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

#include "dispatch.h"
#include "parallel.h"

namespace pybn {
namespace {

// Values of one channel whose sums are kept in registers. Larger segments would leave too few tasks for tensors of few
// channels, smaller ones would spend time on merging; 16384 floats also stream through L1 and half fill a small L2.
constexpr std::size_t kSegment = 16384;

// Rows of one segment in the rows layout: its sums are 16 bytes per channel, so 256 rows keep them below 2 % of the
// traffic. A small matrix has two segments, so that two threads can take its halves.
constexpr std::size_t kSegmentRows = 256, kFewestSegmentRows = 64;

// Neighbouring channels form one run of memory per image. Longer runs are faster (14x14 planes: 1.9 copies with 4 KiB,
// 1.5 with 16, 1.4 with 64), up to these lengths. Those of a wave are shorter, because it should fit a cache.
constexpr std::size_t kRunBytes = 1 << 18, kSharedRunBytes = 1 << 16;

// Runs of fewer neighbouring channels in the rows layout would use only part of the lines that are fetched together.
constexpr std::size_t kRowRun = 64;

// Shorter ones, of channels that a task keeps to itself, cost more than waiting for the other threads does, because
// each core fetches ahead what the other one writes, up to the end of a page: NHWC with 512 channels on 7x7 planes
// takes 1.4 times as long with 256-byte runs, a 256x512 matrix 1.2 times with 1 KiB.
constexpr std::size_t kPrivateRunBytes = 4096;

// Work of less than this is done sooner than another thread wakes (about 10 us).
constexpr std::size_t kSerialBytes = 1 << 18;

// What an application moves per task: images of small planes several at a time, because what is looked up per group of
// channels takes as long as some of its planes; little enough to balance two threads.
constexpr std::size_t kApplicationBytes = 1 << 20;

// Tasks per thread that even out threads of unequal speed; fewer if they would be smaller than kTaskBytes, because
// narrow pieces of a small matrix cost more than an uneven end. Fewer, too, where a fast L3 lets a task be large: its
// runs of memory are longer then (28x28 and 14x14 planes take 0.91 to 0.98 of the time on an EPYC).
constexpr std::size_t kTasksPerThread = 4, kTasksPerThreadOfFastL3 = 2;
constexpr std::size_t kTaskBytes = 1 << 18;

std::size_t ceil_div(std::size_t a, std::size_t b) {
  return (a + b - 1) / b;
}
std::size_t round_up(std::size_t a, std::size_t b) {
  return ceil_div(a, b) * b;
}

std::size_t l2_bytes() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
  const long size = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (size > 0) return static_cast<std::size_t>(size);
#endif
  return std::size_t{1} << 20;
}

// L3 where it serves a core nearly as fast as its L2: on AMD's processors, which have one for every few cores. Linux
// tells the size of that one; sysconf gives all of a package together (320 MiB where lscpu says 32).
std::size_t fast_l3_bytes() {
  static const std::size_t size = [] {
    std::size_t kib = 0;
    std::ifstream("/sys/devices/system/cpu/cpu0/cache/index3/size") >> kib;
    return kib << 10;
  }();
  return is_amd() ? size : 0;
}

// What a thread may reduce before it applies the result, and still find it in a cache. Four fifths of L2, not half:
// backward on 56x56 planes (two slabs, 784 KiB of 1 MiB) took 1.8 copies this way and 2.1 with the slabs shared. A
// quarter of a thread's share of a fast L3: that takes longer runs of memory.
std::size_t slab_bytes(int threads) {
  static const std::size_t l2 = l2_bytes() * 4 / 5;
  return std::max(l2, fast_l3_bytes() / 4 / static_cast<std::size_t>(threads));
}

std::size_t total_bytes(const Extents& e, std::size_t bytes_per_value) {
  return e.per_channel() * e.channels * bytes_per_value;
}

// The order of memory matters little to an EPYC in small tensors (0.8 to 0.95 of the time with rows together up to 4
// MB, 1.2 to 1.8 beyond 6 MB), unless rows are long: those of 4 KiB have their values at the same places of L1 (up
// to 1.8).
constexpr std::size_t kLongRowBytes = 4096;
bool takes_rows_together(const Extents& e, std::size_t bytes_per_value, int threads) {
  return is_amd() && e.is_rows() && e.channels * bytes_per_value < kLongRowBytes &&
         total_bytes(e, bytes_per_value) <= slab_bytes(threads);
}

int threads_for(const Extents& e, std::size_t bytes_per_value) {
  return total_bytes(e, bytes_per_value) < kSerialBytes ? 1 : get_num_threads();
}

std::size_t balanced_tasks(const Extents& e, std::size_t bytes_per_value, int threads) {
  if (threads == 1) return 1;
  const auto least = static_cast<std::size_t>(threads);
  const std::size_t most = fast_l3_bytes() > 0 ? kTasksPerThreadOfFastL3 : kTasksPerThread;
  return std::clamp(total_bytes(e, bytes_per_value) / kTaskBytes, least, most * least);
}

Partition reduction_partition(const Extents& e) {
  if (e.is_rows()) {
    const std::size_t most = std::max(kSegmentRows, ceil_div(4 * kSegment, e.channels));
    return {e, std::clamp(ceil_div(e.outer, 2), kFewestSegmentRows, most), 1};
  }
  if (e.inner < 2 * kSegment) return {e, std::max<std::size_t>(1, kSegment / e.inner), e.inner};
  return {e, 1, round_up(ceil_div(e.inner, e.inner / kSegment), 64)};
}

// The largest divisor of `common_channels` that is not above `group`; that itself if there is nothing to divide.
std::size_t dividing(std::size_t common_channels, std::size_t group) {
  if (common_channels == 0 || group == 0) return group;
  group = std::min(group, common_channels);
  while (common_channels % group != 0) --group;
  return group;
}

// The most channels per task, up to `group`, that give no thread over a 32nd more than its share. (In tasks of ten, 64
// channels would give one of two threads forty.)
std::size_t fair(const Extents& e, std::size_t group, int threads) {
  const auto shares = static_cast<std::size_t>(threads);
  const auto most = [&](std::size_t g) { return ceil_div(ceil_div(e.channels, g), shares) * g; };
  while (group > 1 && most(group) * shares > e.channels + e.channels / 32) --group;
  return group;
}

// Channels per task of a plan in which segments and groups of channels are both spread over the threads.
std::size_t shared_group(const Partition& partition, std::size_t bytes_per_value, std::size_t common_channels,
                         int threads) {
  const Extents& e = partition.extents;
  const std::size_t tasks = balanced_tasks(e, bytes_per_value, threads);
  const std::size_t balanced = std::max<std::size_t>(1, e.channels / ceil_div(tasks, partition.segments()));
  if (e.is_rows()) return std::min(e.channels, round_up(balanced, kRowRun));
  return dividing(common_channels, std::min({balanced, ceil_div(kSharedRunBytes, e.inner * bytes_per_value), kGroup}));
}

}  // namespace

Tile tile_of(const Plan& plan, std::size_t segment, std::size_t first_channel, std::size_t channels) {
  const Partition& partition = plan.partition;
  const std::size_t outer = segment / partition.inner_count() * partition.outer_step;
  const std::size_t inner = segment % partition.inner_count() * partition.inner_step;
  return {outer, first_channel, inner,
          Block{std::min(partition.outer_step, partition.extents.outer - outer), channels,
                std::min(partition.inner_step, partition.extents.inner - inner), !is_amd(), plan.rows_together}};
}

Plan plan_reduction_and_application(const Extents& e, std::size_t bytes_per_value, std::size_t common_channels) {
  const Partition partition = reduction_partition(e);
  const int threads = threads_for(e, bytes_per_value);
  const std::size_t tasks = balanced_tasks(e, bytes_per_value, threads);

  // A task keeps its channels to itself if what it reads twice stays in a cache and every thread gets several such
  // groups.
  const std::size_t fitting = slab_bytes(threads) / (e.per_channel() * bytes_per_value);
  std::size_t group = std::min(fitting, e.channels / tasks);
  if (e.is_rows()) {
    group = group * bytes_per_value < kPrivateRunBytes ? 0 : group - group % kRowRun;
  } else {
    group = std::min({group, ceil_div(kRunBytes, e.inner * bytes_per_value), kGroup});
    group = dividing(common_channels, fair(e, group, threads));
  }
  const bool rows_together = takes_rows_together(e, bytes_per_value, threads);
  if (group > 0) return {partition, group, group, true, threads, rows_together};

  // Otherwise the threads share a wave of channels, as few as keep them all busy.
  group = shared_group(partition, bytes_per_value, common_channels, threads);
  const std::size_t wave = e.is_rows() ? e.channels : round_up(ceil_div(tasks, partition.segments()), group);
  return {partition, group, wave, false, threads, rows_together};
}

Plan plan_reduction(const Extents& e, std::size_t bytes_per_value, std::size_t common_channels) {
  const Partition partition = reduction_partition(e);
  const int threads = threads_for(e, bytes_per_value);
  return {partition, shared_group(partition, bytes_per_value, common_channels, threads), e.channels, false, threads,
          false};
}

Plan plan_application(const Extents& e, std::size_t bytes_per_value, std::size_t common_channels) {
  const int threads = threads_for(e, bytes_per_value);
  // In planes and in rows a task has whole bytes of a mask.
  const std::size_t most = kApplicationBytes / bytes_per_value;
  const std::size_t share = ceil_div(e.outer * e.channels * e.inner, balanced_tasks(e, bytes_per_value, threads));
  const std::size_t values = round_up(std::min(most, share), kMaskValues);
  const std::size_t inner_step = std::min(e.inner, values);
  const std::size_t group = dividing(common_channels, std::clamp<std::size_t>(values / inner_step, 1, e.channels));
  const std::size_t outer_step = std::max<std::size_t>(1, values / (inner_step * group));
  const bool rows_together = takes_rows_together(e, bytes_per_value, threads);
  return {Partition{e, outer_step, inner_step}, group, e.channels, false, threads, rows_together};
}

}  // namespace pybn
