// The leaf loops: written once over simd.h, compiled once per instruction set by kernels_isa.cpp.
//
// Reductions run in double whatever the data type. Converting costs about 4 cycles per 64-byte line of floats, where a
// core's share of the memory needs 13 or more to deliver one, and buys exactness: no overflow at 1e30, no cancellation.
#pragma once

#include "simd.h"

#include "epilogue.h"
#include "kernel_table.h"

namespace pybn {
namespace {

// Vectors per step of a reduction, each with accumulators of its own: an add takes 4 cycles and two can start in each,
// so fewer than 8 independent chains (4 of each of two sums) would wait for one another.
constexpr int kUnroll = 4;
constexpr std::size_t kStride = kUnroll * kDoubles;

// Rows are read in tiles that stay in L1, a run of channels at a time down the tile, so that the run's accumulators
// stay in registers.
constexpr std::size_t kTileBytes = 16384;

// How far ahead of its use memory is fetched, also memory that is only written. The hardware's own prefetching leaves a
// core waiting: training forward on 56x56 planes takes 1.4 copies without this, 1.2 with it; 1 to 4 KiB are alike.
constexpr std::size_t kAheadBytes = 2048;
constexpr std::size_t kLineBytes = 64;

PYBN_INLINE std::size_t min(std::size_t a, std::size_t b) {
  return a < b ? a : b;
}

template <int N, class T>
struct AffineVectors {
  Vec<T, N> center_hi, center_lo, scale, shift;

  PYBN_INLINE Vec<T, N> center(Vec<T, N> x) const { return (x - center_hi) - center_lo; }
  PYBN_INLINE Vec<T, N> apply(Vec<T, N> centered) const { return fma(centered, scale, shift); }
  PYBN_INLINE Vec<T, N> operator()(Vec<T, N> x) const { return apply(center(x)); }
};

template <int N, class T>
PYBN_INLINE AffineVectors<N, T> broadcast(Affine<T> a, std::size_t c) {
  return {broadcast<N>(a.center_hi[c]), broadcast<N>(a.center_lo[c]), broadcast<N>(a.scale[c]),
          broadcast<N>(a.shift[c])};
}
template <int N, class Lanes, class T>
PYBN_INLINE AffineVectors<N, T> load(Lanes lanes, Affine<T> a, std::size_t c) {
  return {lanes.template load<N>(a.center_hi + c), lanes.template load<N>(a.center_lo + c),
          lanes.template load<N>(a.scale + c), lanes.template load<N>(a.shift + c)};
}

template <int N, class T>
struct GradientVectors {
  Vec<T, N> mean_dy, slope;
};

template <int N, class T>
PYBN_INLINE GradientVectors<N, T> broadcast(const GradientAffine<T>* g, std::size_t c) {
  if (!g) return {Vec<T, N>{}, Vec<T, N>{}};
  return {broadcast<N>(g->mean_dy[c]), broadcast<N>(g->slope[c])};
}
template <int N, class Lanes, class T>
PYBN_INLINE GradientVectors<N, T> load(Lanes lanes, const GradientAffine<T>* g, std::size_t c) {
  if (!g) return {Vec<T, N>{}, Vec<T, N>{}};
  return {lanes.template load<N>(g->mean_dy + c), lanes.template load<N>(g->slope + c)};
}

template <class Act, bool kTraining, int N, class T>
PYBN_INLINE Vec<T, N> gradient(Vec<T, N> dy, Vec<T, N> x, const AffineVectors<N, T>& a,
                               const GradientVectors<N, T>& g) {
  const Vec<T, N> centered = a.center(x);
  const Vec<T, N> dz = Act::backward(a.apply(centered), dy);
  if constexpr (kTraining) return fma(centered, g.slope, dz - g.mean_dy) * a.scale;
  return dz * a.scale;
}

// Accumulators of one vector of channels or of values: the two sums that a statistics or a backward reduction needs.
struct SumPair {
  Doubles first, second;

  static PYBN_INLINE SumPair zero() { return {Doubles{}, Doubles{}}; }
  PYBN_INLINE void add_shifted(Doubles x, Doubles shift) {
    const Doubles d = x - shift;
    first += d;
    second = fma(d, d, second);
  }
  PYBN_INLINE void add_gradient(Doubles dz, Doubles x, Doubles mean) {
    first += dz;
    second = fma(x - mean, dz, second);
  }
  PYBN_INLINE void operator+=(const SumPair& other) {
    first += other.first;
    second += other.second;
  }
};

// ---- planes
// -------------------------------------------------------------------------------------------------------------------------

// Planes of neighbouring channels lie one after the other, in one run per outer index. What lies ahead is further down
// the run or at the beginning of the next.
template <class T>
struct Ahead {
  const T *run, *next;
  std::size_t length;

  PYBN_INLINE Ahead(Operand<T> operand, const Block& block, std::size_t o)
      : run(operand.at(o, 0, 0)),
        next(operand.at(o + 1 < block.outer ? o + 1 : o, 0, 0)),
        length(block.channels * block.inner) {}

  // The lines of `values` values, kAheadBytes after `offset` values into the run.
  PYBN_INLINE void fetch(std::size_t offset, std::size_t values) const {
    const std::size_t at = offset + kAheadBytes / sizeof(T);
    const T* from = at < length ? run + at : next + (at - length);
    for (std::size_t i = 0; i < values; i += kLineBytes / sizeof(T)) __builtin_prefetch(from + i);
  }
};

// Calls fetch(offset, values), then step(lanes, offset, u) for every vector of a plane. Successive steps have different
// u < kUnroll.
template <int N, class Fetch, class Step>
PYBN_INLINE void for_each_vector(std::size_t count, Fetch fetch, Step step) {
  std::size_t i = 0;
  for (; i + kUnroll * N <= count; i += kUnroll * N) {
    fetch(i, kUnroll * N);
    for (int u = 0; u < kUnroll; ++u) step(Whole{}, i + u * N, u);
  }
  if (i == count) return;
  fetch(i, count - i);
  for (; i + N <= count; i += N) step(Whole{}, i, 0);
  if (i < count) step(First{count - i}, i, 1);
}

// Adds up every channel of a block in memory order, a group of channels at a time: plane(part, sums, o, c) adds a plane
// of the part.
template <class Plane>
PYBN_INLINE void sum_over_planes(const Block& block, double* first, double* second, Plane plane) {
  for (std::size_t begin = 0; begin < block.channels; begin += kGroup) {
    const std::size_t channels = min(kGroup, block.channels - begin);
    SumPair sums[kGroup];
    for (std::size_t c = 0; c < channels; ++c) sums[c] = SumPair::zero();
    for (std::size_t o = 0; o < block.outer; ++o)
      for (std::size_t c = 0; c < channels; ++c) {
        SumPair parts[kUnroll];
        for (SumPair& part : parts) part = SumPair::zero();
        plane(parts, o, begin + c);
        parts[0] += parts[1];
        parts[2] += parts[3];
        parts[0] += parts[2];
        sums[c] += parts[0];
      }
    for (std::size_t c = 0; c < channels; ++c) {
      first[begin + c] = sum_of_lanes(sums[c].first);
      second[begin + c] = sum_of_lanes(sums[c].second);
    }
  }
}

struct Planes {
  template <class T>
  static void stats(Block block, Operand<const T> x, const T* shift, double* sum, double* squares) noexcept {
    sum_over_planes(block, sum, squares, [&](SumPair* sums, std::size_t o, std::size_t c) {
      const T* plane = x.at(o, c, 0);
      const Vec<T, kDoubles> plane_shift =
          broadcast<kDoubles>(shift[static_cast<std::ptrdiff_t>(c) * x.channel_stride]);
      const Doubles wide_shift = widen(plane_shift);
      const Ahead<const T> ahead(x, block, o);
      for_each_vector<kDoubles>(
          block.inner,
          [&](std::size_t i, std::size_t values) PYBN_INLINE_LAMBDA { ahead.fetch(c * block.inner + i, values); },
          [&](auto lanes, std::size_t i, int u) {
            sums[u].add_shifted(widen(lanes.template load<kDoubles>(plane + i, plane_shift)), wide_shift);
          });
    });
  }

  template <class Act, class T>
  static void elemt(Block block, Operand<const T> x, Operand<T> y, Affine<T> affine) noexcept {
    constexpr int N = kLanes<T>;
    for (std::size_t o = 0; o < block.outer; ++o) {
      const Ahead<const T> x_ahead(x, block, o);
      const Ahead<T> y_ahead(y, block, o);
      for (std::size_t c = 0; c < block.channels; ++c) {
        const auto a = broadcast<N>(affine, c);
        const T* x_plane = x.at(o, c, 0);
        T* y_plane = y.at(o, c, 0);
        for_each_vector<N>(
            block.inner,
            [&](std::size_t i, std::size_t values) PYBN_INLINE_LAMBDA {
              x_ahead.fetch(c * block.inner + i, values);
              y_ahead.fetch(c * block.inner + i, values);
            },
            [&](auto lanes, std::size_t i, int) {
              lanes.template store<N>(y_plane + i, Act::forward(a(lanes.template load<N>(x_plane + i))));
            });
      }
    }
  }

  template <class Act, class T>
  static void backward_reduce(Block block, Operand<const T> dy, Operand<const T> x, const double* mean,
                              Affine<T> affine, double* sum_dy, double* sum_dy_xmu) noexcept {
    sum_over_planes(block, sum_dy, sum_dy_xmu, [&](SumPair* sums, std::size_t o, std::size_t c) {
      const T *dy_plane = dy.at(o, c, 0), *x_plane = x.at(o, c, 0);
      const auto a = broadcast<kDoubles>(affine, c);
      const Doubles wide_mean = broadcast<kDoubles>(mean[c]);
      const Ahead<const T> dy_ahead(dy, block, o), x_ahead(x, block, o);
      for_each_vector<kDoubles>(
          block.inner,
          [&](std::size_t i, std::size_t values) PYBN_INLINE_LAMBDA {
            dy_ahead.fetch(c * block.inner + i, values);
            x_ahead.fetch(c * block.inner + i, values);
          },
          [&](auto lanes, std::size_t i, int u) {
            const Vec<T, kDoubles> xv = lanes.template load<kDoubles>(x_plane + i);
            const Vec<T, kDoubles> dz = Act::backward(a(xv), lanes.template load<kDoubles>(dy_plane + i));
            sums[u].add_gradient(widen(dz), widen(xv), wide_mean);
          });
    });
  }

  template <class Act, bool kTraining, class T>
  static void backward_elemt(Block block, Operand<const T> dy, Operand<const T> x, Operand<T> dx, Affine<T> affine,
                             const GradientAffine<T>* gradient_affine) noexcept {
    constexpr int N = kLanes<T>;
    constexpr bool kReadsX = kTraining || Act::kReadsZ;
    if (!kReadsX) x = dy;
    for (std::size_t o = 0; o < block.outer; ++o) {
      const Ahead<const T> dy_ahead(dy, block, o), x_ahead(x, block, o);
      const Ahead<T> dx_ahead(dx, block, o);
      for (std::size_t c = 0; c < block.channels; ++c) {
        const auto a = broadcast<N>(affine, c);
        const auto g = broadcast<N>(gradient_affine, c);
        const T *dy_plane = dy.at(o, c, 0), *x_plane = x.at(o, c, 0);
        T* dx_plane = dx.at(o, c, 0);
        for_each_vector<N>(
            block.inner,
            [&](std::size_t i, std::size_t values) PYBN_INLINE_LAMBDA {
              dy_ahead.fetch(c * block.inner + i, values);
              if (kReadsX) x_ahead.fetch(c * block.inner + i, values);
              dx_ahead.fetch(c * block.inner + i, values);
            },
            [&](auto lanes, std::size_t i, int) {
              const Vec<T, N> dyv = lanes.template load<N>(dy_plane + i), xv = lanes.template load<N>(x_plane + i);
              lanes.template store<N>(dx_plane + i, gradient<Act, kTraining, N, T>(dyv, xv, a, g));
            });
      }
    }
  }
};

// ---- rows
// ---------------------------------------------------------------------------------------------------------------------------

template <class T>
PYBN_INLINE std::size_t tile_rows(const Block& block) {
  const std::size_t rows = kTileBytes / (block.channels * sizeof(T));
  return rows < 8 ? 8 : rows;
}

// Adds up one run of U vectors of channels over the rows [begin, end), starting from the sums in the result arrays.
template <int U, class Lanes, class Step>
PYBN_INLINE void sum_over_run(Lanes lanes, std::size_t begin, std::size_t end, std::size_t c, double* first,
                              double* second, Step step) {
  SumPair sums[U];
  for (int u = 0; u < U; ++u) {
    sums[u].first = lanes.template load<kDoubles>(first + c + u * kDoubles);
    sums[u].second = lanes.template load<kDoubles>(second + c + u * kDoubles);
  }
  for (std::size_t o = begin; o < end; ++o)
    for (int u = 0; u < U; ++u) step(sums[u], o, u);
  for (int u = 0; u < U; ++u) {
    lanes.template store<kDoubles>(first + c + u * kDoubles, sums[u].first);
    lanes.template store<kDoubles>(second + c + u * kDoubles, sums[u].second);
  }
}

// The value of a constant as a type, so that a generic lambda can use it as one.
template <int U>
struct Count {
  static constexpr int value = U;
};

// Calls run(vectors, lanes, begin, end, c) for every run of channels of every tile of rows; `vectors` is a Count.
template <class T, class Run>
PYBN_INLINE void for_each_run(const Block& block, Run run) {
  const std::size_t step = tile_rows<T>(block);
  for (std::size_t begin = 0; begin < block.outer; begin += step) {
    const std::size_t end = min(begin + step, block.outer);
    std::size_t c = 0;
    for (; c + kStride <= block.channels; c += kStride) run(Count<kUnroll>{}, Whole{}, begin, end, c);
    for (; c + kDoubles <= block.channels; c += kDoubles) run(Count<1>{}, Whole{}, begin, end, c);
    if (c < block.channels) run(Count<1>{}, First{block.channels - c}, begin, end, c);
  }
}

struct Rows {
  template <class T>
  static void stats(Block block, Operand<const T> x, const T* shift, double* sum, double* squares) noexcept {
    const std::size_t ahead = tile_rows<T>(block);
    for (std::size_t c = 0; c < block.channels; ++c) sum[c] = squares[c] = 0;
    for_each_run<T>(block, [&](auto vectors, auto lanes, std::size_t begin, std::size_t end, std::size_t first) {
      constexpr int U = decltype(vectors)::value;
      Doubles wide_shift[U];
      for (int u = 0; u < U; ++u) wide_shift[u] = widen(lanes.template load<kDoubles>(shift + first + u * kDoubles));
      sum_over_run<U>(lanes, begin, end, first, sum, squares, [&](SumPair& sums, std::size_t o, int u) {
        const std::size_t c = first + u * kDoubles;
        __builtin_prefetch(x.at(o + ahead, c, 0));
        sums.add_shifted(widen(lanes.template load<kDoubles>(x.at(o, c, 0))), wide_shift[u]);
      });
    });
  }

  template <class Act, class T>
  static void elemt(Block block, Operand<const T> x, Operand<T> y, Affine<T> affine) noexcept {
    constexpr int N = kLanes<T>;
    constexpr std::size_t kAhead = kAheadBytes / sizeof(T);
    for (std::size_t o = 0; o < block.outer; ++o) {
      const T* x_row = x.at(o, 0, 0);
      T* y_row = y.at(o, 0, 0);
      for_each_vector<N>(
          block.channels,
          [&](std::size_t c, std::size_t) PYBN_INLINE_LAMBDA {
            __builtin_prefetch(x_row + c + kAhead);
            __builtin_prefetch(y_row + c + kAhead);
          },
          [&](auto lanes, std::size_t c, int) {
            lanes.template store<N>(y_row + c,
                                    Act::forward(load<N>(lanes, affine, c)(lanes.template load<N>(x_row + c))));
          });
    }
  }

  template <class Act, class T>
  static void backward_reduce(Block block, Operand<const T> dy, Operand<const T> x, const double* mean,
                              Affine<T> affine, double* sum_dy, double* sum_dy_xmu) noexcept {
    const std::size_t ahead = tile_rows<T>(block);
    for (std::size_t c = 0; c < block.channels; ++c) sum_dy[c] = sum_dy_xmu[c] = 0;
    for_each_run<T>(block, [&](auto vectors, auto lanes, std::size_t begin, std::size_t end, std::size_t first) {
      constexpr int U = decltype(vectors)::value;
      AffineVectors<kDoubles, T> a[U];
      Doubles wide_mean[U];
      for (int u = 0; u < U; ++u) {
        a[u] = load<kDoubles>(lanes, affine, first + u * kDoubles);
        wide_mean[u] = lanes.template load<kDoubles>(mean + first + u * kDoubles);
      }
      sum_over_run<U>(lanes, begin, end, first, sum_dy, sum_dy_xmu, [&](SumPair& sums, std::size_t o, int u) {
        const std::size_t c = first + u * kDoubles;
        __builtin_prefetch(dy.at(o + ahead, c, 0));
        __builtin_prefetch(x.at(o + ahead, c, 0));
        const Vec<T, kDoubles> xv = lanes.template load<kDoubles>(x.at(o, c, 0));
        const Vec<T, kDoubles> dz = Act::backward(a[u](xv), lanes.template load<kDoubles>(dy.at(o, c, 0)));
        sums.add_gradient(widen(dz), widen(xv), wide_mean[u]);
      });
    });
  }

  template <class Act, bool kTraining, class T>
  static void backward_elemt(Block block, Operand<const T> dy, Operand<const T> x, Operand<T> dx, Affine<T> affine,
                             const GradientAffine<T>* gradient_affine) noexcept {
    constexpr int N = kLanes<T>;
    constexpr std::size_t kAhead = kAheadBytes / sizeof(T);
    constexpr bool kReadsX = kTraining || Act::kReadsZ;
    if (!kReadsX) x = dy;
    for (std::size_t o = 0; o < block.outer; ++o) {
      const T *dy_row = dy.at(o, 0, 0), *x_row = x.at(o, 0, 0);
      T* dx_row = dx.at(o, 0, 0);
      for_each_vector<N>(
          block.channels,
          [&](std::size_t c, std::size_t) PYBN_INLINE_LAMBDA {
            __builtin_prefetch(dy_row + c + kAhead);
            __builtin_prefetch(x_row + c + kAhead);
            __builtin_prefetch(dx_row + c + kAhead);
          },
          [&](auto lanes, std::size_t c, int) {
            const Vec<T, N> dyv = lanes.template load<N>(dy_row + c), xv = lanes.template load<N>(x_row + c);
            const auto a = load<N>(lanes, affine, c);
            const auto g = load<N>(lanes, gradient_affine, c);
            lanes.template store<N>(dx_row + c, gradient<Act, kTraining, N, T>(dyv, xv, a, g));
          });
    }
  }
};

}  // namespace
}  // namespace pybn
