// One instruction set's table of kernels. CMake compiles this file once per set, with the set's flags and PYBN_ISA, its
// name.
#include "kernels.h"

namespace pybn {
namespace {

// Turns the activation, a run-time value, into a template parameter.
template <class F>
PYBN_INLINE void with_activation(Activation activation, F f) {
  switch (activation) {
    case Activation::none:
      return f(Identity{});
    case Activation::relu:
      return f(Relu{});
  }
}

template <class Layout, class T>
struct Entry {
  static void elemt(Block block, Operand<const T> x, Operand<T> y, Affine<T> affine, Activation activation) noexcept {
    with_activation(activation, [&](auto act) { Layout::template elemt<decltype(act), T>(block, x, y, affine); });
  }

  static void backward_reduce(Block block, Operand<const T> dy, Operand<const T> x, const double* mean,
                              Affine<T> affine, Activation activation, double* sum_dy, double* sum_dy_xmu) noexcept {
    with_activation(activation, [&](auto act) {
      Layout::template backward_reduce<decltype(act), T>(block, dy, x, mean, affine, sum_dy, sum_dy_xmu);
    });
  }

  static void backward_elemt(Block block, Operand<const T> dy, Operand<const T> x, Operand<T> dx, Affine<T> affine,
                             const GradientAffine<T>* gradient, Activation activation) noexcept {
    with_activation(activation, [&](auto act) {
      if (gradient)
        Layout::template backward_elemt<decltype(act), true, T>(block, dy, x, dx, affine, gradient);
      else
        Layout::template backward_elemt<decltype(act), false, T>(block, dy, x, dx, affine, gradient);
    });
  }

  static constexpr Kernels<T> table() { return {Layout::template stats<T>, elemt, backward_reduce, backward_elemt}; }
};

template <class T>
constexpr KernelTable<T> tables() {
  return {Entry<Planes, T>::table(), Entry<Rows, T>::table()};
}

}  // namespace

#define PYBN_STRINGIFY(x) #x
#define PYBN_STRING(x) PYBN_STRINGIFY(x)
#define PYBN_CONCATENATE(a, b) a##b
#define PYBN_JOIN(a, b) PYBN_CONCATENATE(a, b)

extern const InstructionSet PYBN_JOIN(instruction_set_, PYBN_ISA);
const InstructionSet PYBN_JOIN(instruction_set_, PYBN_ISA) = {PYBN_STRING(PYBN_ISA), tables<float>(), tables<double>()};

}  // namespace pybn
