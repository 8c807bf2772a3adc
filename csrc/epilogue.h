// Activations: what happens to z = (x - mean) * scale + shift (+ residual) before it is stored, and to the gradient of
// the output on its way back.
//
// `backward` turns the gradient of the output into the gradient of z, given z recomputed with the same operations, and
// so the same bits, as in the forward pass. NaN passes through both, as in PyTorch; so do the values at the kinks.
#pragma once

#include "kernel_table.h"
#include "simd.h"

namespace pybn {
namespace {

template <class V>
PYBN_INLINE V constant(double value) {
  V v{};
  return v + static_cast<decltype(v[0] + 0)>(value);
}

// 2^64 * exp(x) for x <= 0, within 2 ULP: x = n * ln 2 + r, and Taylor's polynomial of r. The factor keeps results
// normal until even x * exp(x) rounds to 0.
template <class A>
struct ExpConstants;
template <>
struct ExpConstants<float> {
  static constexpr int kMantissa = 23, kDegree = 7;
  static constexpr double kRound = 12582912.0 /* 1.5 * 2^23 */, kLeast = -120;
  static constexpr double kLn2Hi = 0.693359375, kLn2Lo = -2.12194440054690583e-4;
  static constexpr std::int32_t kFactor = 0x5f800000;  // 2^64
};
template <>
struct ExpConstants<double> {
  static constexpr int kMantissa = 52, kDegree = 13;
  static constexpr double kRound = 6755399441055744.0 /* 1.5 * 2^52 */, kLeast = -752;
  static constexpr double kLn2Hi = 0.693145751953125, kLn2Lo = 1.42860682030941723212e-6;
  static constexpr std::int64_t kFactor = 0x43f0000000000000;
};
constexpr double kInverseFactorial[] = {
    1,         1,          1. / 2,      1. / 6,       1. / 24,       1. / 120,       1. / 720,
    1. / 5040, 1. / 40320, 1. / 362880, 1. / 3628800, 1. / 39916800, 1. / 479001600, 1. / 6227020800.};

template <int N, class A>
PYBN_INLINE Vec<A, N> scaled_exp(Vec<A, N> x) {
  using V = Vec<A, N>;
  using C = ExpConstants<A>;
  const V rounded = fma(x, constant<V>(1.44269504088896340736), constant<V>(C::kRound));
  const V n = rounded - constant<V>(C::kRound);
  const V r = fma(n, constant<V>(-C::kLn2Lo), fma(n, constant<V>(-C::kLn2Hi), x));
  V p = constant<V>(kInverseFactorial[C::kDegree]);
  for (int k = C::kDegree - 1; k >= 0; --k) p = fma(p, r, constant<V>(kInverseFactorial[k]));
  const V power = (V)(((Ints<A, N>)rounded << C::kMantissa) + C::kFactor);  // n is in the low bits of `rounded`
  return x < constant<V>(C::kLeast) ? V{} : p * power;
}

// 1 / (1 + exp(-z)) = of_z * unit and its complement, neither of which cancels. Where it is small, unit is 2^-64, so
// that a product with z, which may be a hundred times larger, underflows no sooner than it has to.
template <class V>
struct Sigmoid {
  V of_z, unit, of_minus_z;
};
template <int N, class A>
PYBN_INLINE Sigmoid<Vec<A, N>> sigmoid(Vec<A, N> z) {
  using V = Vec<A, N>;
  const V unit = constant<V>(0x1p-64);
  const V scaled = scaled_exp<N, A>(z < V{} ? z : -z);
  const V larger = 1 / (1 + scaled * unit), smaller = scaled * larger;
  return {z < V{} ? smaller : larger, z < V{} ? unit : constant<V>(1), z < V{} ? larger : smaller * unit};
}

// What a backward pass reads besides dy; an activation overrides what it needs.
struct ReadsNothing {
  static constexpr bool kReadsZ = false, kReadsResidual = false, kReadsMask = false, kReadsOutput = false;
};

struct Identity : ReadsNothing {
  template <class T>
  PYBN_INLINE explicit Identity(const Fusion<T>&) {}

  template <int N, class A>
  PYBN_INLINE Vec<A, N> forward(Vec<A, N> z) const {
    return z;
  }
  template <int N, class A>
  PYBN_INLINE Vec<A, N> backward(Vec<A, N>, Vec<A, N> dy) const {
    return dy;
  }
};

struct Relu : ReadsNothing {
  static constexpr bool kReadsZ = true;
  template <class T>
  PYBN_INLINE explicit Relu(const Fusion<T>&) {}

  template <int N, class A>
  PYBN_INLINE Vec<A, N> forward(Vec<A, N> z) const {
    return z < Vec<A, N>{} ? Vec<A, N>{} : z;
  }
  // Where the gradient passes whole; elsewhere it is 0.
  template <int N, class A>
  PYBN_INLINE Ints<A, N> passes(Vec<A, N> z) const {
    return ~(z <= Vec<A, N>{});
  }
  template <int N, class A>
  PYBN_INLINE Vec<A, N> backward(Vec<A, N> z, Vec<A, N> dy) const {
    return z <= Vec<A, N>{} ? Vec<A, N>{} : dy;
  }
};

// The backward pass of relu, relu6 and leaky_relu from the mask that the forward pass wrote.
struct Masked : ReadsNothing {
  static constexpr bool kReadsMask = true;
  bool is_leaky;
  double negative_slope;
  template <class T>
  PYBN_INLINE explicit Masked(const Fusion<T>& fusion)
      : is_leaky(fusion.activation == Activation::leaky_relu), negative_slope(fusion.negative_slope) {}

  template <int N, class A>
  PYBN_INLINE Vec<A, N> backward_masked(Ints<A, N> passes, Vec<A, N> dy) const {
    if (is_leaky) return passes ? dy : dy * constant<Vec<A, N>>(negative_slope);
    return passes ? dy : Vec<A, N>{};
  }
};

// The backward pass of a leaky ReLU that has overwritten its input: z is computed from its output, and x is z.
struct OverwrittenLeakyRelu : ReadsNothing {
  static constexpr bool kReadsZ = true, kReadsOutput = true;
  double negative_slope;
  template <class T>
  PYBN_INLINE explicit OverwrittenLeakyRelu(const Fusion<T>& fusion) : negative_slope(fusion.negative_slope) {}

  template <int N, class A>
  PYBN_INLINE Vec<A, N> inverse(Vec<A, N> y) const {
    return y > Vec<A, N>{} ? y : y * constant<Vec<A, N>>(1 / negative_slope);
  }
  template <int N, class A>
  PYBN_INLINE Vec<A, N> backward(Vec<A, N> z, Vec<A, N> dy) const {
    return z > Vec<A, N>{} ? dy : dy * constant<Vec<A, N>>(negative_slope);
  }
};

// The other activations, told apart at every vector: the branch always goes the same way, and a loop of its own for
// each would double the size of the library.
template <bool kWithResidual>
struct Other : ReadsNothing {
  static constexpr bool kReadsZ = true, kReadsResidual = kWithResidual;
  Activation activation;
  double negative_slope;
  template <class T>
  PYBN_INLINE explicit Other(const Fusion<T>& fusion)
      : activation(fusion.activation), negative_slope(fusion.negative_slope) {}

  template <int N, class A>
  PYBN_INLINE Vec<A, N> forward(Vec<A, N> z) const {
    using V = Vec<A, N>;
    switch (activation) {
      case Activation::relu6:
        return z < V{} ? V{} : z > constant<V>(6) ? constant<V>(6) : z;
      case Activation::leaky_relu:
        return z < V{} ? z * constant<V>(negative_slope) : z;
      case Activation::silu: {
        const Sigmoid<V> s = sigmoid<N, A>(z);
        return z * s.of_z * s.unit;
      }
      default: {  // hardswish
        const V t = z + 3;
        return z * (t < V{} ? V{} : t > constant<V>(6) ? constant<V>(6) : t) * constant<V>(1. / 6);
      }
    }
  }
  template <int N, class A>
  PYBN_INLINE Ints<A, N> passes(Vec<A, N> z) const {
    using V = Vec<A, N>;
    if (activation == Activation::relu6) return (z > V{}) & (z < constant<V>(6));
    return z > V{};  // leaky_relu
  }
  template <int N, class A>
  PYBN_INLINE Vec<A, N> backward(Vec<A, N> z, Vec<A, N> dy) const {
    using V = Vec<A, N>;
    switch (activation) {
      case Activation::relu6:
        return ((z > V{}) & (z < constant<V>(6))) ? dy : V{};
      case Activation::leaky_relu:
        return z > V{} ? dy : dy * constant<V>(negative_slope);
      case Activation::silu: {
        const Sigmoid<V> s = sigmoid<N, A>(z);
        return dy * (s.of_z * fma(z, s.of_minus_z, constant<V>(1)) * s.unit);
      }
      case Activation::hardswish:
        return z <= constant<V>(-3)  ? V{}
               : z >= constant<V>(3) ? dy
                                     : dy * fma(z, constant<V>(1. / 3), constant<V>(.5));
      default:  // relu, with a residual and no mask
        return z <= V{} ? V{} : dy;
    }
  }
};

}  // namespace
}  // namespace pybn
