// Batch norm on strided arrays: statistics (a reduction) -> a per-channel affine map -> an application of that map.
//
// Every function is a template over the data type T (float, double, Float16, BFloat16). Per-channel values are double,
// except for the affine map that the kernels apply, which is of the type that T is computed with. Results are the same
// bits for any number of threads, and for x in any pieces; planes only may be in pieces.
#pragma once

#include <algorithm>
#include <cstddef>

#include "kernel_table.h"
#include "layout.h"
#include "pieces.h"

namespace pybn {

// A per-channel parameter as the caller holds it: float or double, any stride, or absent.
struct Parameter {
  const char* data = nullptr;
  std::ptrdiff_t byte_stride = 0;
  bool is_double = false;

  explicit operator bool() const { return data != nullptr; }
  // The values of `count` channels from the first on; `absent` for each where there is no parameter.
  void read(std::size_t first, std::size_t count, double absent, double* to) const {
    if (!data)
      std::fill_n(to, count, absent);
    else if (is_double)
      read_as<double>(first, count, to);
    else
      read_as<float>(first, count, to);
  }

 private:
  template <class V>
  void read_as(std::size_t first, std::size_t count, double* to) const {
    const char* from = data + static_cast<std::ptrdiff_t>(first) * byte_stride;
    if (byte_stride == sizeof(V)) {  // in vectors
      std::copy_n(reinterpret_cast<const V*>(from), count, to);
    } else {
      for (; count > 0; --count, from += byte_stride) *to++ = *reinterpret_cast<const V*>(from);
    }
  }
};

// Fills a normalization, whose mean is there already, for `channels` channels from the first on.
template <class T>
void normalize(std::size_t first, std::size_t channels, const double* var, Parameter weight, Parameter bias, double eps,
               const Normalization<T>&);

// Mean and biased variance of every channel; the remainder is what rounding took from the mean. Needs at least one
// value per channel, as all of these do.
template <class T>
void batch_norm_stats(const Extents&, Operand<const T> x, double* mean, double* var, double* remainder);

// Training: statistics of x, then y = activation((x - mean) * invstd * weight + bias + residual). Fills `var` (biased)
// and `normalization`.
template <class T>
void batch_norm_forward(const Extents&, const Pieces<const T>& x, Operand<T> y, Parameter weight, Parameter bias,
                        double eps, const Fusion<T>&, double* var, const Normalization<T>& normalization);

// y = activation(affine(x) + residual), with a normalization that is already filled.
template <class T>
void batch_norm_elemt(const Extents&, const Pieces<const T>& x, Operand<T> y, const Normalization<T>&,
                      const Fusion<T>&);

// What a backward pass reads and writes: dresidual, if it is there, becomes dz, the gradient passed back through the
// activation.
template <class T>
struct GradientOperands {
  Operand<const T> dy;
  Pieces<const T> x;
  Pieces<T> dx;  // in x's pieces
  Operand<T> dresidual;
};

// The whole backward pass: the two sums, then dx, which in evaluation does not depend on them.
template <class T>
void batch_norm_backward(const Extents&, const GradientOperands<T>&, const Normalization<T>&, const Fusion<T>&,
                         bool training, double* sum_dy, double* sum_dy_xmu);

// sum_dy = sum(dz), sum_dy_xmu = sum((x - mean) * dz).
template <class T>
void batch_norm_backward_reduce(const Extents&, Operand<const T> dy, const Pieces<const T>& x, const Normalization<T>&,
                                const Fusion<T>&, double* sum_dy, double* sum_dy_xmu);

// The sums over `count` values per channel, of this batch or of several processes.
struct GradientSums {
  const double *sum_dy, *sum_dy_xmu;
  double count;
};

// dx given the sums (training), or without them (evaluation: the statistics are constants).
template <class T>
void batch_norm_backward_elemt(const Extents&, const GradientOperands<T>&, const Normalization<T>&, const Fusion<T>&,
                               const GradientSums* sums);

// A running statistic as the caller holds it: running = (1 - momentum) * running + momentum * batch, computed in
// double.
struct RunningStatistic {
  char* data = nullptr;
  std::ptrdiff_t byte_stride = 0;
  bool is_double = false;

  void update(std::size_t channels, const double* batch, double factor, double momentum) const;
};

}  // namespace pybn
