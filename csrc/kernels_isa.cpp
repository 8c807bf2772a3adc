// The kernels of one instruction set for one type of data. CMake compiles this file once for each pair, with the set's
// flags, PYBN_ISA, its name, and PYBN_TYPE, the type.
#include "channels.h"
#include "few_channels.h"
#include "kernels.h"

namespace pybn {
namespace {

// Calls f with a Kind<Act>: turns the fusion, a run-time value, into a template parameter. Activations without loops of
// their own share those of Other.
template <class Act>
struct Kind {
  using type = Act;
};
template <class T, class F>
PYBN_INLINE void with_forward(const Fusion<T>& fusion, F f) {
  if (fusion.activation == Activation::none) return f(Kind<Identity>{});
  if (fusion.activation == Activation::relu) return f(Kind<Relu>{});
  return f(Kind<Other<false>>{});
}
template <class T, class F>
PYBN_INLINE void with_backward(const Fusion<T>& fusion, F f) {
  if (fusion.activation == Activation::none) return f(Kind<Identity>{});
  if (fusion.mask) return f(Kind<Masked>{});
  if (fusion.residual) return f(Kind<Other<true>>{});
  if (fusion.activation == Activation::relu) return f(Kind<Relu>{});
  if constexpr (sizeof(T) > 2)  // half types are not overwritten
    if (fusion.activation == Activation::overwritten_leaky_relu) return f(Kind<OverwrittenLeakyRelu>{});
  return f(Kind<Other<false>>{});
}

template <class Layout, class T>
struct Entry {
  using A = Arithmetic<T>;

  static void stats(Block block, Operand<const T> x, const double* shift, double* sum, double* squares) noexcept {
    if (shift)
      Layout::template stats<true>(block, x, shift, sum, squares);
    else
      Layout::template stats<false>(block, x, shift, sum, squares);
  }

  static void elemt(Block block, Operand<const T> x, Operand<T> y, Affine<A> affine, const Fusion<T>& fusion) noexcept {
    with_forward(fusion, [&](auto kind) {
      using Act = typename decltype(kind)::type;
      if (fusion.residual)
        Layout::template elemt<Act, true>(block, x, y, affine, fusion);
      else
        Layout::template elemt<Act, false>(block, x, y, affine, fusion);
    });
  }

  static void backward_reduce(Block block, Operand<const T> dy, Operand<const T> x, const double* mean,
                              Affine<A> affine, const Fusion<T>& fusion, double* sum_dy, double* sum_dy_xmu) noexcept {
    with_backward(fusion, [&](auto kind) {
      using Act = typename decltype(kind)::type;
      Layout::template backward_reduce<Act>(block, dy, x, mean, affine, fusion, sum_dy, sum_dy_xmu);
    });
  }

  static void backward_elemt(Block block, Operand<const T> dy, Operand<const T> x, Operand<T> dx, Operand<T> dresidual,
                             Affine<A> affine, const GradientAffine<A>* gradient, const Fusion<T>& fusion) noexcept {
    with_backward(fusion, [&](auto kind) {
      using Act = typename decltype(kind)::type;
      if (gradient)
        Layout::template backward_elemt<Act, true>(block, dy, x, dx, dresidual, affine, gradient, fusion);
      else
        Layout::template backward_elemt<Act, false>(block, dy, x, dx, dresidual, affine, gradient, fusion);
    });
  }

  static constexpr Kernels<T> kernels() { return {stats, elemt, backward_reduce, backward_elemt}; }
};

// With AVX-512, AMD's processors convert half types sooner in registers (kernels.h).
#if defined(__AVX512F__)
constexpr bool kThroughMemoryOnAmd = false;
#else
constexpr bool kThroughMemoryOnAmd = true;
#endif

template <class T, bool kThroughMemory>
constexpr Kernels<T> planes() {
  Kernels<T> kernels = Entry<PlanesBy<Reading>, T>::kernels();
  if constexpr (kThroughMemory && sizeof(T) == 2) {
    using ThroughMemory = Entry<PlanesBy<ReadingThroughMemory>, T>;
    kernels.stats = ThroughMemory::stats;
    kernels.backward_reduce = ThroughMemory::backward_reduce;
  }
  return kernels;
}

}  // namespace

#define PYBN_CONCATENATE(a, b) a##b
#define PYBN_JOIN(a, b) PYBN_CONCATENATE(a, b)

extern const KernelTable<PYBN_TYPE> PYBN_JOIN(PYBN_TYPE, PYBN_JOIN(_kernels_, PYBN_ISA));
const KernelTable<PYBN_TYPE> PYBN_JOIN(PYBN_TYPE, PYBN_JOIN(_kernels_, PYBN_ISA)) = {
    planes<PYBN_TYPE, true>(),
    planes<PYBN_TYPE, kThroughMemoryOnAmd>(),
    Entry<RowsOfAnyLength, PYBN_TYPE>::kernels(),
    {shifts_of_channels<PYBN_TYPE>, statistics_of_channels, normalize_channels<PYBN_TYPE>,
     gradient_of_channels<PYBN_TYPE>}};

}  // namespace pybn
