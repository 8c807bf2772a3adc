// What happens to z = (x - mean) * scale + shift before it is stored: one functor per activation.
//
// `backward` turns the gradient of the output into the gradient of z, given z recomputed with the same operations, and
// so the same bits, as in the forward pass. NaN passes through both, as in PyTorch.
#pragma once

namespace pybn {
namespace {

struct Identity {
  static constexpr bool kReadsZ = false;
  template <class V>
  static PYBN_INLINE V forward(V z) {
    return z;
  }
  template <class V>
  static PYBN_INLINE V backward(V, V dy) {
    return dy;
  }
};

struct Relu {
  static constexpr bool kReadsZ = true;
  template <class V>
  static PYBN_INLINE V forward(V z) {
    return z < V{} ? V{} : z;
  }
  template <class V>
  static PYBN_INLINE V backward(V z, V dy) {
    return z <= V{} ? V{} : dy;
  }
};

}  // namespace
}  // namespace pybn
