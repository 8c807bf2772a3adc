// What is computed once per channel: sums -> statistics -> map, and sums -> coefficients of the gradient. It is done in
// vectors, because divisions and a square root per channel cost a small tensor as much as its values do (the maps of
// 512 channels one by one: 7 us; a 256x512 matrix takes 20 us to copy).
#pragma once

#include "kernel_table.h"
#include "simd.h"

namespace pybn {
namespace {

template <class A>
constexpr double kLargest = 0;
template <>
constexpr double kLargest<float> = static_cast<double>(__FLT_MAX__);
template <>
constexpr double kLargest<double> = __DBL_MAX__;

template <int N, class Some>
PYBN_INLINE void for_each_channels(std::size_t channels, Some some) {
  std::size_t c = 0;
  for (; c + N <= channels; c += N) some(Whole{}, c);
  if (c < channels) some(First{channels - c}, c);
}

// Whether values may be summed as they are: those whose squares are exact in double. Values that are doubles have no
// digits to spare.
template <class T>
constexpr bool kMayBeUnshifted = sizeof(Arithmetic<T>) < sizeof(double);

// A shift cancels what a large mean would cost, and is one operation more for every value: statistics out of a cache
// take 0.8 of the time without. So it is 0 if no sampled value is further from zero than kReach times the distance
// between two of them, otherwise the first of them.
//
// That bounds what is left of the cancellation in `squares - sum^2 / n`, whatever the other values are. Two members of
// the data that lie r apart make its variance at least r^2 / 2n, and every member lies within sqrt(n) standard
// deviations of the mean. So the mean is within 7 sqrt(n) deviations of zero, or within sqrt(n) of the first value, and
// the relative error of the variance at most about 50 n * 2^-53, or n * 2^-53.
constexpr double kReach = 4;

template <class T>
bool shifts_of_channels(std::size_t channels, Operand<const T> sample, double* shifts) noexcept {
  constexpr int N = kDoubles;
  Ints<double, N> are_used{};
  for_each_channels<N>(channels, [&](auto lanes, std::size_t c) {
    const auto sampled = [&](std::size_t k) PYBN_INLINE_LAMBDA {
      const T* from = sample.at(k, c, 0);
      return sample.channel_stride == 1 ? load_wide(lanes, from)
                                        : widen(load_strided(from, sample.channel_stride, channels - c));
    };
    const Doubles first = sampled(0);
    Doubles shift = first, low = first, high = first;
    if constexpr (kMayBeUnshifted<T>) {
      for (std::size_t k = 1; k < kSampled; ++k) {
        const Doubles value = sampled(k);
        low = value < low ? value : low;
        high = value > high ? value : high;
      }
      const Doubles reach = (high - low) * kReach;
      shift = (high <= reach) & (-low <= reach) ? Doubles{} : first;
    }
    are_used |= shift != Doubles{};
    store<N>(lanes, shifts + c, shift);
  });
  return bits_of(are_used) != 0;
}

// The sums are those of values minus `shifts`. What rounding takes from the mean is Knuth's: the sum of two is exact in
// two doubles.
void statistics_of_channels(std::size_t channels, double values_per_channel, const double* shifts, const double* sums,
                            const double* squares, double* means, double* vars, double* remainders) noexcept {
  constexpr int N = kDoubles;
  const Doubles count = broadcast<N>(values_per_channel), infinity = broadcast<N>(__builtin_inf()), zero{};
  for_each_channels<N>(channels, [&](auto lanes, std::size_t c) {
    const Doubles shift = load<N>(lanes, shifts + c), sum = load<N>(lanes, sums + c);
    const Doubles square = load<N>(lanes, squares + c), offset = sum / count;
    const Doubles mean = shift + offset, rounded_offset = mean - shift;
    store<N>(lanes, means + c, mean);
    if (remainders) store<N>(lanes, remainders + c, (shift - (mean - rounded_offset)) + (offset - rounded_offset));
    Doubles var = (square - sum * offset) / count;
    var = var < zero ? zero : var;  // rounding can leave -1e-17; NaN stays
    // Squares of values beyond 1e154 overflow: the variance is infinite then, not infinity less infinity.
    store<N>(lanes, vars + c, (square == infinity) & (sum - sum == zero) ? infinity : var);
  });
}

template <class T>
void normalize_channels(std::size_t channels, const double* var, const double* weight, const double* bias, double eps,
                        const Normalization<T>& all) noexcept {
  using A = Arithmetic<T>;
  constexpr int N = kDoubles;
  const Doubles largest = broadcast<N>(kLargest<A>), zero{};
  for_each_channels<N>(channels, [&](auto lanes, std::size_t c) {
    const Normalization<T> n = all.from(c);
    const Doubles mean = load<N>(lanes, n.mean);
    const Doubles invstd = broadcast<N>(1.0) / square_root(load<N>(lanes, var + c) + eps);
    // A finite scale stays finite, so that a constant channel gives 0 * (a large number) rather than 0 * infinity.
    const Doubles product = load<N>(lanes, weight + c) * (largest < invstd ? largest : invstd);
    const Doubles bounded = product > largest ? largest : product < -largest ? -largest : product;
    const Doubles wide_scale = product - product == zero ? bounded : product;
    const Vec<A, N> center = plain_nan(narrow<A>(mean)), scale = plain_nan(narrow<A>(wide_scale));
    const Doubles shift = load<N>(lanes, bias + c) - (mean - widen(center)) * widen(scale);
    store<N>(lanes, n.invstd, invstd);
    store<N>(lanes, n.center, center);
    store<N>(lanes, n.scale, scale);
    store<N>(lanes, n.shift, plain_nan(narrow<A>(shift)));
  });
}

template <class T>
void gradient_of_channels(std::size_t channels, double values_per_channel, const double* sums_dy,
                          const double* sums_dy_xmu, const Normalization<T>& all, Arithmetic<T>* slopes,
                          Arithmetic<T>* offsets) noexcept {
  using A = Arithmetic<T>;
  constexpr int N = kDoubles;
  const Doubles count = broadcast<N>(values_per_channel);
  for_each_channels<N>(channels, [&](auto lanes, std::size_t c) {
    const Normalization<T> n = all.from(c);
    const Doubles scale = widen(load<N>(lanes, n.scale)), invstd = load<N>(lanes, n.invstd);
    const Doubles rounded_off = widen(load<N>(lanes, n.center)) - load<N>(lanes, n.mean);
    const Doubles slope = -invstd * invstd * (load<N>(lanes, sums_dy_xmu + c) / count) * scale;
    const Doubles offset = -(load<N>(lanes, sums_dy + c) / count) * scale + rounded_off * slope;
    store<N>(lanes, slopes + c, plain_nan(narrow<A>(slope)));
    store<N>(lanes, offsets + c, plain_nan(narrow<A>(offset)));
  });
}

}  // namespace
}  // namespace pybn
