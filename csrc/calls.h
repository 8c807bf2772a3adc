// What every entry from Python needs, whatever its arrays are: checks, types, the GIL, and the layout of masks.
#pragma once

#include <cxxabi.h>
#include <pybind11/pybind11.h>

#include <chrono>
#include <cstddef>
#include <exception>
#include <memory>
#include <stdexcept>
#include <thread>
#include <utility>
#include <vector>

#include "batch_norm.h"
#include "kernel_table.h"
#include "layout.h"
#include "parallel.h"

namespace pybn {

inline void require(bool condition, const char* what) {
  if (!condition) throw std::invalid_argument(what);
}

enum class DType { float32, float64, float16, bfloat16 };

// Calls f with a value of the type.
template <class F>
auto with_dtype(DType dtype, F f) {
  switch (dtype) {
    case DType::float32:
      return f(float{});
    case DType::float64:
      return f(double{});
    case DType::float16:
      return f(Float16{});
    default:
      return f(BFloat16{});
  }
}

// ---- activations and masks

// Activation and slope, as Python passes them.
using ActivationArguments = std::pair<int, double>;

constexpr const char* kActivationNames[] = {"none", "relu", "relu6", "leaky_relu", "silu", "hardswish"};

// Whether the activation's gradient is a choice of two slopes, so that one bit per value tells it.
inline bool has_mask(Activation activation) {
  return activation == Activation::relu || activation == Activation::relu6 || activation == Activation::leaky_relu;
}

// Bytes between planes (or 0: rows), and between outer indices, of a mask.
inline std::pair<std::size_t, std::size_t> mask_strides(const Extents& e) {
  const auto bytes = [](std::size_t values) { return (values + kMaskValues - 1) / kMaskValues; };
  if (e.is_rows()) return {0, bytes(e.channels)};
  return {bytes(e.inner), e.channels * bytes(e.inner)};
}

// ---- maps

// Fills n from statistics that the caller holds.
template <class T>
void normalize_with(Parameter mean, Parameter var, Parameter weight, Parameter bias, double eps, std::size_t channels,
                    const Normalization<T>& n) {
  std::vector<double> wide_var(channels);
  mean.read(0, channels, 0, n.mean);
  var.read(0, channels, 1, wide_var.data());
  normalize<T>(0, channels, wide_var.data(), weight, bias, eps, n);
}

// The arrays of a Normalization, one after the other: mean and invstd, and the affine map.
constexpr std::size_t kStatisticsRows = 2, kAffineRows = 3;

template <class T>
Normalization<T> normalization_in(double* statistics, Arithmetic<T>* affine, std::size_t channels) {
  return {statistics, statistics + channels, affine, affine + channels, affine + 2 * channels};
}

// A Normalization and its memory.
template <class T>
class OwnNormalization {
 public:
  explicit OwnNormalization(std::size_t channels)
      : channels_(channels),
        statistics_(new double[kStatisticsRows * channels]),
        affine_(new Arithmetic<T>[kAffineRows * channels]) {}

  Normalization<T> view() const { return normalization_in<T>(statistics_.get(), affine_.get(), channels_); }

 private:
  std::size_t channels_;
  std::unique_ptr<double[]> statistics_;
  std::unique_ptr<Arithmetic<T>[]> affine_;
};

// ---- the GIL

// Calls f, which takes the GIL. A daemon thread that asks for the GIL while the interpreter shuts down is ended by
// force, by unwinding its stack, which ends the whole process where it meets C++; so it waits here for the exit
// instead, as Python 3.14 itself lets such threads do.
template <class F>
auto taking_gil(const F& f) {
#if defined(__GLIBCXX__)
  try {
    return f();
  } catch (abi::__forced_unwind&) {
    for (;;) std::this_thread::sleep_for(std::chrono::hours(1));
  }
#else
  return f();
#endif
}

// Runs f without the GIL; a KeyboardInterrupt raised meanwhile comes out of here.
template <class F>
void compute(const F& f) {
  std::exception_ptr error;
  PyThreadState* const state = PyEval_SaveThread();
  try {
    f();
  } catch (...) {
    error = std::current_exception();
  }
  taking_gil([&] { PyEval_RestoreThread(state); });
  try {
    if (error) std::rethrow_exception(error);
  } catch (const Interrupted&) {
    throw pybind11::error_already_set();
  }
}

}  // namespace pybn
