// From the statistics of a channel to its map: a division and a square root per channel, which cost a small tensor as
// much as its values do (512 channels one by one: 7 us, a 256x512 matrix takes 20 us to copy).
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

template <class T>
void normalize_channels(std::size_t channels, const double* var, const double* weight, const double* bias, double eps,
                        const Normalization<T>& all) noexcept {
  using A = Arithmetic<T>;
  constexpr int N = kDoubles;
  const Doubles largest = broadcast<N>(kLargest<A>), zero{};
  const auto some = [&](auto lanes, std::size_t c) {
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
  };
  std::size_t c = 0;
  for (; c + N <= channels; c += N) some(Whole{}, c);
  if (c < channels) some(First{channels - c}, c);
}

}  // namespace
}  // namespace pybn
