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

#include "dtypes.h"

namespace pybn {

// Neighbouring channels whose accumulators a kernel keeps in L1 together, while it reads their planes in memory order.
constexpr std::size_t kGroup = 64;

// Rows of fewer channels are taken several at a time, so that no step is left with a part of a vector. A tile of rows
// has all channels then.
constexpr std::size_t kFewChannels = 64;

// The last one is for backward passes alone: of a leaky ReLU in place, x being its output, which is all that is left.
enum class Activation : int { none, relu, relu6, leaky_relu, silu, hardswish, overwritten_leaky_relu };

struct Block {
  std::size_t outer, channels, inner;
  // Whether long runs of memory are to be fetched ahead. An EPYC foresees them, and on large planes needs 0.83 to 0.94
  // of the time without.
  bool fetches_runs;
  // Whether applications take several rows at a time, which share loads of the parameters, and not in the order of
  // memory.
  bool rows_together;
};

template <class T>
struct Operand {
  T* data = nullptr;
  std::ptrdiff_t outer_stride = 0, channel_stride = 0;

  PYBN_INLINE explicit operator bool() const { return data != nullptr; }
  PYBN_INLINE T* at(std::size_t outer, std::size_t channel, std::size_t inner) const {
    return data + static_cast<std::ptrdiff_t>(outer) * outer_stride +
           static_cast<std::ptrdiff_t>(channel) * channel_stride + static_cast<std::ptrdiff_t>(inner);
  }
};

// One bit per value: whether the activation passes its gradient on whole. The bits of a plane, or of a row, begin with
// a byte of their own.
constexpr std::size_t kMaskValues = 8;
struct Mask {
  std::uint8_t* data = nullptr;
  std::ptrdiff_t outer_stride = 0, plane_stride = 0;  // in bytes; rows have no planes

  PYBN_INLINE explicit operator bool() const { return data != nullptr; }
  PYBN_INLINE std::uint8_t* at(std::size_t outer, std::size_t plane) const {
    return data + static_cast<std::ptrdiff_t>(outer) * outer_stride + static_cast<std::ptrdiff_t>(plane) * plane_stride;
  }
};

// What follows the map: y = activation(z + residual).
//
// The backward pass needs the sign of z + residual. It recomputes z from x, which it reads in any case; with a residual
// a mask of one bit per value is the lesser traffic, and the forward pass writes it if `mask` is there. Activations
// whose gradient is more than a choice of two slopes read the residual again.
template <class T>
struct Fusion {
  Activation activation = Activation::none;
  double negative_slope = 0;
  Operand<const T> residual;
  Mask mask;
};

// z = (x - center) * scale + shift, one value per channel.
//
// The centre is the mean rounded to A, and shift has what the rounding left over. Without a centre, as x * scale +
// (bias - mean * scale), the result is lost when |mean| >> std (float32 error 0.18 at mean 1e7, std 1), and without the
// remainder, too (0.5).
template <class A>
struct Affine {
  const A *center, *scale, *shift;

  PYBN_INLINE Affine from(std::size_t c) const { return {center + c, scale + c, shift + c}; }
};

// dx = dz * scale + (x - center) * slope + offset with scale and center of the Affine, one value per channel.
template <class A>
struct GradientAffine {
  const A *slope, *offset;

  PYBN_INLINE GradientAffine from(std::size_t c) const { return {slope + c, offset + c}; }
};

template <class T>
struct Kernels {
  using A = Arithmetic<T>;

  // Sums of x - shift and of (x - shift)^2 of each channel; no shifts are shifts of 0.
  void (*stats)(Block, Operand<const T> x, const double* shift, double* sum, double* squares) noexcept;
  // y = activation(affine(x) + residual)
  void (*elemt)(Block, Operand<const T> x, Operand<T> y, Affine<A>, const Fusion<T>&) noexcept;
  // Sums of dz and of (x - mean) * dz of each channel, dz being dy passed back through the activation.
  void (*backward_reduce)(Block, Operand<const T> dy, Operand<const T> x, const double* mean, Affine<A>,
                          const Fusion<T>&, double* sum_dy, double* sum_dy_xmu) noexcept;
  // With a gradient affine (training) dx depends on x through the statistics; without one (evaluation) dx = dz * scale,
  // and x is read only if the activation needs it. dresidual, if it is there, becomes dz.
  void (*backward_elemt)(Block, Operand<const T> dy, Operand<const T> x, Operand<T> dx, Operand<T> dresidual, Affine<A>,
                         const GradientAffine<A>*, const Fusion<T>&) noexcept;
};

// The statistics of some channels, and the map that is made from them, as arrays. The caller owns the memory.
template <class T>
struct Normalization {
  using A = Arithmetic<T>;
  double *mean, *invstd;
  A *center, *scale, *shift;

  Affine<A> affine() const { return {center, scale, shift}; }
  Normalization from(std::size_t c) const { return {mean + c, invstd + c, center + c, scale + c, shift + c}; }
};

// Values of a channel that its shift is chosen by.
constexpr std::size_t kSampled = 4;

// What is computed once per channel, all of them arrays.
template <class T>
struct ChannelKernels {
  using A = Arithmetic<T>;

  // What is to be taken from each channel's values before they are summed, chosen by kSampled of them, one per outer
  // index. Returns whether it is other than 0 for any.
  bool (*shifts)(std::size_t channels, Operand<const T> sample, double* shift) noexcept;
  // Mean and biased variance from the sums of x - shift and of (x - shift)^2 over `count` values. The remainder, if it
  // is there, gets what rounding takes from the mean.
  void (*statistics)(std::size_t channels, double count, const double* shift, const double* sum, const double* squares,
                     double* mean, double* var, double* remainder) noexcept;
  // From the mean that is there already and var: invstd = 1 / sqrt(var + eps), scale = weight * invstd, and what else
  // the map has. Every value is rounded to A once.
  void (*normalize)(std::size_t channels, const double* var, const double* weight, const double* bias, double eps,
                    const Normalization<T>&) noexcept;
  // The gradient affine from the sums that a backward reduction makes of `count` values:
  // dx = (dz - mean(dz) - (x - mean) * invstd^2 * mean((x - mean) dz)) * scale.
  void (*gradient)(std::size_t channels, double count, const double* sum_dy, const double* sum_dy_xmu,
                   const Normalization<T>&, A* slope, A* offset) noexcept;
};

template <class T>
struct KernelTable {
  Kernels<T> planes, planes_on_amd, rows;  // the planes' two give the same bits
  ChannelKernels<T> channels;
};

struct InstructionSet {
  const char* name;
  const KernelTable<float>& float32;
  const KernelTable<double>& float64;
  const KernelTable<Float16>& float16;
  const KernelTable<BFloat16>& bfloat16;
};

}  // namespace pybn
