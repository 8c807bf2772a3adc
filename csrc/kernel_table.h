// What a leaf kernel is given, and the table of kernels that every instruction set provides.
//
// A kernel works on a block: `outer x channels x inner` values, element (o, c, i) of an operand at
// data[o * outer_stride + c * channel_stride + i]. Two layouts cover every array:
//   planes  inner > 1, contiguous             NCHW is (N, C, H*W)
//   rows    inner == 1, channel_stride == 1   NHWC is (N*H*W, C, 1)
// Kernels are serial, allocate nothing and cannot fail.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pybn {

// Neighbouring channels whose accumulators a kernel keeps in L1 together, while it reads their planes in memory order.
constexpr std::size_t kGroup = 64;

enum class Activation : int { none, relu };

struct Block {
  std::size_t outer, channels, inner;
};

template <class T>
struct Operand {
  T* data;
  std::ptrdiff_t outer_stride, channel_stride;

  T* at(std::size_t outer, std::size_t channel, std::size_t inner) const {
    return data + static_cast<std::ptrdiff_t>(outer) * outer_stride +
           static_cast<std::ptrdiff_t>(channel) * channel_stride + static_cast<std::ptrdiff_t>(inner);
  }
};

// z = ((x - center_hi) - center_lo) * scale + shift, one value per channel.
//
// The centre is the mean in two parts: x * scale + (bias - mean * scale), the cheaper form, loses the result when
// |mean| >> std (float32 error 0.18 at mean 1e7, std 1), and so does a mean rounded to float32 (0.5).
template <class T>
struct Affine {
  const T *center_hi, *center_lo, *scale, *shift;

  Affine from(std::size_t c) const { return {center_hi + c, center_lo + c, scale + c, shift + c}; }
};

// dx = (dy - mean_dy + (x - mean) * slope) * scale with the scale of the Affine, one value per channel.
template <class T>
struct GradientAffine {
  const T *mean_dy, *slope;

  GradientAffine from(std::size_t c) const { return {mean_dy + c, slope + c}; }
};

template <class T>
struct Kernels {
  // Sums of x - shift and of (x - shift)^2 of each channel; channel c's shift is shift[c * x.channel_stride].
  void (*stats)(Block, Operand<const T> x, const T* shift, double* sum, double* squares) noexcept;
  // y = activation(affine(x))
  void (*elemt)(Block, Operand<const T> x, Operand<T> y, Affine<T>, Activation) noexcept;
  // Sums of dz and of (x - mean) * dz of each channel, dz being dy passed back through the activation.
  void (*backward_reduce)(Block, Operand<const T> dy, Operand<const T> x, const double* mean, Affine<T>, Activation,
                          double* sum_dy, double* sum_dy_xmu) noexcept;
  // With a gradient affine (training) dx depends on x through the statistics; without one (evaluation) dx = dz * scale,
  // and x is read only if the activation needs it.
  void (*backward_elemt)(Block, Operand<const T> dy, Operand<const T> x, Operand<T> dx, Affine<T>,
                         const GradientAffine<T>*, Activation) noexcept;
};

template <class T>
struct KernelTable {
  Kernels<T> planes, rows;
};

struct InstructionSet {
  const char* name;
  KernelTable<float> float32;
  KernelTable<double> float64;
};

}  // namespace pybn
