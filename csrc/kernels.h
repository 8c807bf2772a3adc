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

// Vectors per step of a plane, in a reduction each with accumulators of its own: an add takes 4 cycles and two can
// start in each, so fewer than 8 independent chains (4 of each of two sums) would wait for one another.
constexpr int kUnroll = 4;

// Rows taken together: their channels share one load of the parameters, or of the sums.
constexpr int kRows = 4;

// How far ahead of its use memory is fetched, also memory that is only written. The hardware's own prefetching leaves a
// core waiting: training forward on 56x56 planes takes 1.4 copies without this, 1.2 with it; 1 to 4 KiB are alike.
constexpr std::size_t kAheadBytes = 2048;
constexpr std::size_t kLineBytes = 64;

PYBN_INLINE std::size_t min(std::size_t a, std::size_t b) {
  return a < b ? a : b;
}

// ---- the arithmetic of one vector

template <int N, class A>
struct AffineVectors {
  Vec<A, N> center_hi, center_lo, scale, shift;

  PYBN_INLINE Vec<A, N> center(Vec<A, N> x) const { return (x - center_hi) - center_lo; }
  PYBN_INLINE Vec<A, N> apply(Vec<A, N> centered) const { return fma(centered, scale, shift); }
};

template <int N, class A>
PYBN_INLINE AffineVectors<N, A> broadcast(Affine<A> a, std::size_t c) {
  return {broadcast<N>(a.center_hi[c]), broadcast<N>(a.center_lo[c]), broadcast<N>(a.scale[c]),
          broadcast<N>(a.shift[c])};
}
template <int N, class Lanes, class A>
PYBN_INLINE AffineVectors<N, A> load(Lanes lanes, Affine<A> a, std::size_t c) {
  return {load<N>(lanes, a.center_hi + c), load<N>(lanes, a.center_lo + c), load<N>(lanes, a.scale + c),
          load<N>(lanes, a.shift + c)};
}

template <int N, class A>
struct GradientVectors {
  Vec<A, N> mean_dy, slope;
};

template <int N, class A>
PYBN_INLINE GradientVectors<N, A> broadcast(const GradientAffine<A>* g, std::size_t c) {
  if (!g) return {Vec<A, N>{}, Vec<A, N>{}};
  return {broadcast<N>(g->mean_dy[c]), broadcast<N>(g->slope[c])};
}
template <int N, class Lanes, class A>
PYBN_INLINE GradientVectors<N, A> load(Lanes lanes, const GradientAffine<A>* g, std::size_t c) {
  if (!g) return {Vec<A, N>{}, Vec<A, N>{}};
  return {load<N>(lanes, g->mean_dy + c), load<N>(lanes, g->slope + c)};
}

// Bits of the N values from the i-th of a plane or a row on; i is a multiple of N.
template <int N>
PYBN_INLINE std::uint32_t mask_bits(const std::uint8_t* mask, std::size_t i) {
  return std::uint32_t{mask[i / kMaskValues]} >> i % kMaskValues;
}
template <int N>
PYBN_INLINE void set_mask_bits(std::uint8_t* mask, std::size_t i, std::uint32_t bits) {
  std::uint8_t& byte = mask[i / kMaskValues];
  byte = static_cast<std::uint8_t>(i % kMaskValues == 0 ? bits : byte | bits << i % kMaskValues);
}

// y of the vector at position i of a plane or a row; its bits of the mask are written if there is one.
template <bool kResidual, int N, class Act, class Lanes, class T, class A>
PYBN_INLINE void apply_forward(const Act& act, Lanes lanes, std::size_t i, const T* x, const T* residual,
                               std::uint8_t* mask, T* y, const AffineVectors<N, A>& a) {
  Vec<A, N> z = a.apply(a.center(load<N>(lanes, x + i)));
  if constexpr (kResidual) {
    z += load<N>(lanes, residual + i);
    if constexpr (Act::kReadsZ)
      if (mask) set_mask_bits<N>(mask, i, bits_of(act.template passes<N, A>(z)));
  }
  store<N>(lanes, y + i, act.template forward<N, A>(z));
}

// dz of the vector at position i: dy passed back through the activation.
template <int N, class Act, class Lanes, class T, class A>
PYBN_INLINE Vec<A, N> backward_through(const Act& act, Lanes lanes, std::size_t i, const T* dy, const T* residual,
                                       const std::uint8_t* mask, Vec<A, N> centered, const AffineVectors<N, A>& a) {
  const Vec<A, N> gradient = load<N>(lanes, dy + i);
  if constexpr (Act::kReadsMask) {
    return act.template backward_masked<N, A>(lanes_of<A, N>(mask_bits<N>(mask, i)), gradient);
  } else {
    Vec<A, N> z = a.apply(centered);
    if constexpr (Act::kReadsResidual) z += load<N>(lanes, residual + i);
    return act.template backward<N, A>(z, gradient);
  }
}

// dx of the vector at position i, and dz, the gradient of the residual, if it is wanted.
template <bool kTraining, int N, class Act, class Lanes, class T, class A>
PYBN_INLINE void apply_backward(const Act& act, Lanes lanes, std::size_t i, const T* dy, const T* x, const T* residual,
                                const std::uint8_t* mask, T* dx, T* dresidual, const AffineVectors<N, A>& a,
                                const GradientVectors<N, A>& g) {
  const Vec<A, N> centered = a.center(load<N>(lanes, x + i));
  const Vec<A, N> dz = backward_through(act, lanes, i, dy, residual, mask, centered, a);
  if (dresidual) store<N>(lanes, dresidual + i, dz);
  if constexpr (kTraining)
    store<N>(lanes, dx + i, fma(centered, g.slope, dz - g.mean_dy) * a.scale);
  else
    store<N>(lanes, dx + i, dz * a.scale);
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

// One operand of a block of planes. Planes of neighbouring channels lie one after the other, in one run per outer
// index; what lies ahead is further down the run or at the beginning of the next.
template <class T>
class Run {
 public:
  PYBN_INLINE Run(Operand<T> operand, const Block& block, std::size_t o)
      : run_(operand.at(o, 0, 0)),
        next_(operand.at(o + 1 < block.outer ? o + 1 : o, 0, 0)),
        length_(operand ? block.channels * block.inner : 0),
        plane_(operand.channel_stride) {}

  PYBN_INLINE T* plane(std::size_t c) const { return run_ + static_cast<std::ptrdiff_t>(c) * plane_; }

  // The lines of `values` values, kAheadBytes after `offset` values into the run.
  PYBN_INLINE void fetch(std::size_t offset, std::size_t values) const {
    const std::size_t at = offset + kAheadBytes / sizeof(T);
    const T* from = at < length_ ? run_ + at : next_ + (at - length_);
    for (std::size_t i = 0; i < values; i += kLineBytes / sizeof(T)) __builtin_prefetch(from + i);
  }

 private:
  T *run_, *next_;
  std::size_t length_;
  std::ptrdiff_t plane_;
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

// Adds up every channel of a block in memory order, a group of channels at a time: plane(parts, o, c) adds a plane to
// the kUnroll parts.
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
      const Run<const T> x_run(x, block, o);
      const T* x_plane = x_run.plane(c);
      const Doubles wide_shift = widen(splat<kDoubles>(shift + static_cast<std::ptrdiff_t>(c) * x.channel_stride));
      for_each_vector<kDoubles>(
          block.inner,
          [&](std::size_t i, std::size_t values) PYBN_INLINE_LAMBDA { x_run.fetch(c * block.inner + i, values); },
          [&](auto lanes, std::size_t i, int u) {
            const Doubles value = widen(load<kDoubles>(lanes, x_plane + i));
            sums[u].add_shifted(lanes.or_else(value, wide_shift), wide_shift);
          });
    });
  }

  template <class Act, bool kResidual, class T>
  static void elemt(Block block, Operand<const T> x, Operand<T> y, Affine<Arithmetic<T>> affine,
                    const Fusion<T>& fusion) noexcept {
    constexpr int N = kLanes<T>;
    const Act act(fusion);
    for (std::size_t o = 0; o < block.outer; ++o) {
      const Run<const T> x_run(x, block, o), residual_run(fusion.residual, block, o);
      const Run<T> y_run(y, block, o);
      for (std::size_t c = 0; c < block.channels; ++c) {
        const auto a = broadcast<N>(affine, c);
        const T *x_plane = x_run.plane(c), *residual_plane = kResidual ? residual_run.plane(c) : x_plane;
        std::uint8_t* mask = fusion.mask ? fusion.mask.at(o, c) : nullptr;
        T* y_plane = y_run.plane(c);
        for_each_vector<N>(
            block.inner,
            [&](std::size_t i, std::size_t values) PYBN_INLINE_LAMBDA {
              x_run.fetch(c * block.inner + i, values);
              if (kResidual) residual_run.fetch(c * block.inner + i, values);
              y_run.fetch(c * block.inner + i, values);
            },
            [&](auto lanes, std::size_t i, int) {
              apply_forward<kResidual>(act, lanes, i, x_plane, residual_plane, mask, y_plane, a);
            });
      }
    }
  }

  template <class Act, class T>
  static void backward_reduce(Block block, Operand<const T> dy, Operand<const T> x, const double* mean,
                              Affine<Arithmetic<T>> affine, const Fusion<T>& fusion, double* sum_dy,
                              double* sum_dy_xmu) noexcept {
    constexpr int N = kDoubles;
    const Act act(fusion);
    sum_over_planes(block, sum_dy, sum_dy_xmu, [&](SumPair* sums, std::size_t o, std::size_t c) {
      const Run<const T> dy_run(dy, block, o), x_run(x, block, o), residual_run(fusion.residual, block, o);
      const T *dy_plane = dy_run.plane(c), *x_plane = x_run.plane(c);
      const T* residual_plane = Act::kReadsResidual ? residual_run.plane(c) : x_plane;
      const std::uint8_t* mask = fusion.mask ? fusion.mask.at(o, c) : nullptr;
      const auto a = broadcast<N>(affine, c);
      const Doubles wide_mean = broadcast<N>(mean[c]);
      for_each_vector<N>(
          block.inner,
          [&](std::size_t i, std::size_t values) PYBN_INLINE_LAMBDA {
            dy_run.fetch(c * block.inner + i, values);
            x_run.fetch(c * block.inner + i, values);
            if (Act::kReadsResidual) residual_run.fetch(c * block.inner + i, values);
          },
          [&](auto lanes, std::size_t i, int u) {
            const auto xv = load<N>(lanes, x_plane + i);
            const auto dz = backward_through(act, lanes, i, dy_plane, residual_plane, mask, a.center(xv), a);
            sums[u].add_gradient(lanes.or_else(widen(dz), Doubles{}), widen(xv), wide_mean);
          });
    });
  }

  template <class Act, bool kTraining, class T>
  static void backward_elemt(Block block, Operand<const T> dy, Operand<const T> x, Operand<T> dx, Operand<T> dresidual,
                             Affine<Arithmetic<T>> affine, const GradientAffine<Arithmetic<T>>* gradient_affine,
                             const Fusion<T>& fusion) noexcept {
    constexpr int N = kLanes<T>;
    constexpr bool kReadsX = kTraining || Act::kReadsZ;
    if (!kReadsX) x = dy;
    const Act act(fusion);
    for (std::size_t o = 0; o < block.outer; ++o) {
      const Run<const T> dy_run(dy, block, o), x_run(x, block, o), residual_run(fusion.residual, block, o);
      const Run<T> dx_run(dx, block, o), dresidual_run(dresidual, block, o);
      for (std::size_t c = 0; c < block.channels; ++c) {
        const auto a = broadcast<N>(affine, c);
        const auto g = broadcast<N>(gradient_affine, c);
        const T *dy_plane = dy_run.plane(c), *x_plane = x_run.plane(c);
        const T* residual_plane = Act::kReadsResidual ? residual_run.plane(c) : x_plane;
        const std::uint8_t* mask = fusion.mask ? fusion.mask.at(o, c) : nullptr;
        T *dx_plane = dx_run.plane(c), *dresidual_plane = dresidual ? dresidual_run.plane(c) : nullptr;
        for_each_vector<N>(
            block.inner,
            [&](std::size_t i, std::size_t values) PYBN_INLINE_LAMBDA {
              dy_run.fetch(c * block.inner + i, values);
              if (kReadsX) x_run.fetch(c * block.inner + i, values);
              if (Act::kReadsResidual) residual_run.fetch(c * block.inner + i, values);
              dx_run.fetch(c * block.inner + i, values);
              if (dresidual_plane) dresidual_run.fetch(c * block.inner + i, values);
            },
            [&](auto lanes, std::size_t i, int) {
              apply_backward<kTraining>(act, lanes, i, dy_plane, x_plane, residual_plane, mask, dx_plane,
                                        dresidual_plane, a, g);
            });
      }
    }
  }
};

// ---- rows

// Calls row(c, lanes) for every vector of N channels.
template <int N, class Row>
PYBN_INLINE void for_each_channel_vector(std::size_t channels, Row row) {
  std::size_t c = 0;
  for (; c + N <= channels; c += N) row(c, Whole{});
  if (c < channels) row(c, First{channels - c});
}

// The value of a constant as a type, so that a generic lambda can use it as one.
template <int R>
struct Count {
  static constexpr int value = R;
};

// Calls rows(o, count) for kRows rows at a time, then for the rest one by one; `count` is a Count.
template <class Rows>
PYBN_INLINE void for_each_rows(std::size_t outer, Rows rows) {
  std::size_t o = 0;
  for (; o + kRows <= outer; o += kRows) rows(o, Count<kRows>{});
  for (; o < outer; ++o) rows(o, Count<1>{});
}

// What lies kAheadBytes or more ahead of a value, in whole steps of kRows rows.
template <class T>
PYBN_INLINE std::ptrdiff_t ahead(const Block& block, const Operand<T>& operand) {
  const std::size_t bytes = kRows * block.channels * sizeof(T);
  return static_cast<std::ptrdiff_t>(kRows * ((kAheadBytes + bytes - 1) / bytes)) * operand.outer_stride;
}

// Adds up every channel of a block of rows: add(sums, lanes, o, c) adds a vector of channels of row o.
template <class Setup>
PYBN_INLINE void sum_over_rows(const Block& block, double* first, double* second, Setup setup) {
  for (std::size_t c = 0; c < block.channels; ++c) first[c] = second[c] = 0;
  for_each_rows(block.outer, [&](std::size_t o, auto count) {
    constexpr int R = decltype(count)::value;
    for_each_channel_vector<kDoubles>(block.channels, [&](std::size_t c, auto lanes) {
      SumPair sums{load<kDoubles>(lanes, first + c), load<kDoubles>(lanes, second + c)};
      const auto add = setup(lanes, c);
      for (int r = 0; r < R; ++r) add(sums, o + r);
      store<kDoubles>(lanes, first + c, sums.first);
      store<kDoubles>(lanes, second + c, sums.second);
    });
  });
}

struct Rows {
  template <class T>
  static void stats(Block block, Operand<const T> x, const T* shift, double* sum, double* squares) noexcept {
    const std::ptrdiff_t x_ahead = ahead(block, x);
    sum_over_rows(block, sum, squares, [&](auto lanes, std::size_t c) {
      const Doubles wide_shift = widen(load<kDoubles>(lanes, shift + c));
      return [=](SumPair& sums, std::size_t o) {
        const T* from = x.at(o, c, 0);
        __builtin_prefetch(from + x_ahead);
        sums.add_shifted(widen(load<kDoubles>(lanes, from)), wide_shift);
      };
    });
  }

  template <class Act, bool kResidual, class T>
  static void elemt(Block block, Operand<const T> x, Operand<T> y, Affine<Arithmetic<T>> affine,
                    const Fusion<T>& fusion) noexcept {
    constexpr int N = kLanes<T>;
    const Act act(fusion);
    const Operand<const T> residual = kResidual ? fusion.residual : x;
    const std::ptrdiff_t x_ahead = ahead(block, x), y_ahead = ahead(block, y), residual_ahead = ahead(block, residual);
    for_each_rows(block.outer, [&](std::size_t o, auto count) {
      constexpr int R = decltype(count)::value;
      for_each_channel_vector<N>(block.channels, [&](std::size_t c, auto lanes) {
        const auto a = load<N>(lanes, affine, c);
        for (int r = 0; r < R; ++r) {
          const T *from = x.at(o + r, 0, 0), *added = residual.at(o + r, 0, 0);
          T* to = y.at(o + r, 0, 0);
          __builtin_prefetch(from + c + x_ahead);
          __builtin_prefetch(to + c + y_ahead);
          if (kResidual) __builtin_prefetch(added + c + residual_ahead);
          apply_forward<kResidual>(act, lanes, c, from, added, fusion.mask ? fusion.mask.at(o + r, 0) : nullptr, to, a);
        }
      });
    });
  }

  template <class Act, class T>
  static void backward_reduce(Block block, Operand<const T> dy, Operand<const T> x, const double* mean,
                              Affine<Arithmetic<T>> affine, const Fusion<T>& fusion, double* sum_dy,
                              double* sum_dy_xmu) noexcept {
    constexpr int N = kDoubles;
    const Act act(fusion);
    const Operand<const T> residual = Act::kReadsResidual ? fusion.residual : x;
    const Mask mask = fusion.mask;
    const std::ptrdiff_t dy_ahead = ahead(block, dy), x_ahead = ahead(block, x);
    const std::ptrdiff_t residual_ahead = ahead(block, residual);
    sum_over_rows(block, sum_dy, sum_dy_xmu, [&](auto lanes, std::size_t c) {
      const auto a = load<N>(lanes, affine, c);
      const Doubles wide_mean = load<N>(lanes, mean + c);
      return [=](SumPair& sums, std::size_t o) {
        const T *dy_from = dy.at(o, 0, 0), *x_from = x.at(o, 0, 0), *added = residual.at(o, 0, 0);
        __builtin_prefetch(dy_from + c + dy_ahead);
        __builtin_prefetch(x_from + c + x_ahead);
        if (Act::kReadsResidual) __builtin_prefetch(added + c + residual_ahead);
        const auto xv = load<N>(lanes, x_from + c);
        const auto dz =
            backward_through(act, lanes, c, dy_from, added, mask ? mask.at(o, 0) : nullptr, a.center(xv), a);
        sums.add_gradient(widen(dz), widen(xv), wide_mean);
      };
    });
  }

  template <class Act, bool kTraining, class T>
  static void backward_elemt(Block block, Operand<const T> dy, Operand<const T> x, Operand<T> dx, Operand<T> dresidual,
                             Affine<Arithmetic<T>> affine, const GradientAffine<Arithmetic<T>>* gradient_affine,
                             const Fusion<T>& fusion) noexcept {
    constexpr int N = kLanes<T>;
    constexpr bool kReadsX = kTraining || Act::kReadsZ;
    if (!kReadsX) x = dy;
    const Act act(fusion);
    const Operand<const T> residual = Act::kReadsResidual ? fusion.residual : x;
    const std::ptrdiff_t dy_ahead = ahead(block, dy), x_ahead = ahead(block, x), dx_ahead = ahead(block, dx);
    const std::ptrdiff_t residual_ahead = ahead(block, residual);
    for_each_rows(block.outer, [&](std::size_t o, auto count) {
      constexpr int R = decltype(count)::value;
      for_each_channel_vector<N>(block.channels, [&](std::size_t c, auto lanes) {
        const auto a = load<N>(lanes, affine, c);
        const auto g = load<N>(lanes, gradient_affine, c);
        for (int r = 0; r < R; ++r) {
          const T *dy_from = dy.at(o + r, 0, 0), *x_from = x.at(o + r, 0, 0), *added = residual.at(o + r, 0, 0);
          T *to = dx.at(o + r, 0, 0), *dz_to = dresidual ? dresidual.at(o + r, 0, 0) : nullptr;
          __builtin_prefetch(dy_from + c + dy_ahead);
          if (kReadsX) __builtin_prefetch(x_from + c + x_ahead);
          if (Act::kReadsResidual) __builtin_prefetch(added + c + residual_ahead);
          __builtin_prefetch(to + c + dx_ahead);
          apply_backward<kTraining>(act, lanes, c, dy_from, x_from, added,
                                    fusion.mask ? fusion.mask.at(o + r, 0) : nullptr, to, dz_to, a, g);
        }
      });
    });
  }
};

}  // namespace
}  // namespace pybn
