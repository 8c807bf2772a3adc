// NumPy arrays -> plain structs, and nothing else: the only file that knows Python.
//
// pybn/_arrays.py has checked every argument and phrased every error before a call comes here; what is checked again is
// what memory safety needs. The GIL is released while kernels run.
#include <cxxabi.h>
#include <pybind11/native_enum.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <exception>
#include <memory>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "batch_norm.h"
#include "buffers.h"
#include "dispatch.h"
#include "layout.h"
#include "parallel.h"

namespace py = pybind11;

namespace pybn {
namespace {

using Doubles = py::array_t<double>;

void require(bool condition, const char* what) {
  if (!condition) throw std::invalid_argument(what);
}

// Calls f with a value of the array's element type.
template <class F>
auto with_dtype(const py::array& x, F f) {
  if (x.dtype().is(py::dtype::of<float>())) return f(float{});
  if (x.dtype().is(py::dtype::of<double>())) return f(double{});
  if (py::isinstance<py::array_t<float>>(x)) return f(float{});  // another object for the same type
  if (py::isinstance<py::array_t<double>>(x)) return f(double{});
  throw std::invalid_argument("expected a native float32 or float64 array");
}

std::optional<Layout> layout_of(py::ssize_t channel_axis, const std::vector<const py::array*>& arrays) {
  const py::array& first = *arrays.front();
  const std::vector<std::ptrdiff_t> shape(first.shape(), first.shape() + first.ndim());
  std::vector<std::vector<std::ptrdiff_t>> strides;
  for (const py::array* array : arrays) {
    std::vector<std::ptrdiff_t> elements;
    for (py::ssize_t d = 0; d < array->ndim(); ++d) {
      if (array->shape(d) > 1 && array->strides(d) % array->itemsize() != 0) return std::nullopt;
      elements.push_back(array->strides(d) / array->itemsize());
    }
    strides.push_back(std::move(elements));
  }
  return find_layout(shape, static_cast<std::size_t>(channel_axis), strides);
}

// Arrays of one shape and type, as a call to the core sees them.
class Problem {
 public:
  Problem(py::ssize_t channel_axis, std::vector<const py::array*> arrays) : arrays_(std::move(arrays)) {
    const py::array& first = *arrays_.front();
    require(channel_axis >= 0 && channel_axis < first.ndim(), "channel axis out of range");
    for (const py::array* array : arrays_) {
      require(
          array->ndim() == first.ndim() && std::equal(array->shape(), array->shape() + array->ndim(), first.shape()),
          "shapes differ");
      require(array->dtype().is(first.dtype()) || array->dtype().equal(first.dtype()), "dtypes differ");
    }
    std::optional<Layout> layout = layout_of(channel_axis, arrays_);
    require(layout.has_value(), "strides that the kernels cannot follow");
    layout_ = std::move(*layout);
  }

  const Extents& extents() const { return layout_.extents; }
  std::size_t channels() const { return layout_.extents.channels; }

  template <class T>
  Operand<const T> input(std::size_t k) const {
    return {static_cast<const T*>(arrays_[k]->data()), layout_.operands[k].outer, layout_.operands[k].channel};
  }
  template <class T>
  Operand<T> output(std::size_t k) const {
    return {static_cast<T*>(const_cast<py::array*>(arrays_[k])->mutable_data()), layout_.operands[k].outer,
            layout_.operands[k].channel};
  }

 private:
  std::vector<const py::array*> arrays_;
  Layout layout_;
};

void require_channels(const py::array& values, std::size_t channels) {
  require(values.ndim() == 1 && static_cast<std::size_t>(values.shape(0)) == channels,
          "a per-channel array of another length");
}

Parameter parameter(const std::optional<py::array>& values, std::size_t channels) {
  if (!values) return {};
  require_channels(*values, channels);
  const bool is_double = with_dtype(*values, [](auto zero) { return sizeof zero == sizeof(double); });
  return {static_cast<const char*>(values->data()), values->strides(0), is_double};
}

RunningStatistic running(std::optional<py::array>& values, std::size_t channels) {
  const Parameter as_parameter = parameter(values, channels);
  return {static_cast<char*>(values->mutable_data()), as_parameter.byte_stride, as_parameter.is_double};
}

const double* doubles(const Doubles& values, std::size_t channels) {
  require_channels(values, channels);
  return values.data();
}

// A Normalization whose memory Python owns: mean and invstd of shape (C,), and the affine map of shape (4, C).
using NormalizationArrays = std::tuple<Doubles, Doubles, py::array>;

template <class T>
Normalization<T> view(NormalizationArrays& arrays, std::size_t channels) {
  auto& [mean, invstd, affine] = arrays;
  require_channels(mean, channels);
  require_channels(invstd, channels);
  require(py::isinstance<py::array_t<T>>(affine) && affine.ndim() == 2 && affine.shape(0) == 4 &&
              static_cast<std::size_t>(affine.shape(1)) == channels && (affine.flags() & py::array::c_style),
          "an affine map of another shape or type");
  T* rows = static_cast<T*>(affine.mutable_data());
  return {mean.mutable_data(), invstd.mutable_data(), rows, rows + channels, rows + 2 * channels, rows + 3 * channels};
}

template <class T>
NormalizationArrays new_normalization(std::size_t channels) {
  const auto n = static_cast<py::ssize_t>(channels);
  return {Doubles(n), Doubles(n), py::array_t<T>({py::ssize_t{4}, n})};
}

Doubles new_doubles(std::size_t channels) {
  return Doubles(static_cast<py::ssize_t>(channels));
}

// A new array of x's shape, type and order of axes, without gaps; large ones live in recycled memory.
py::array empty_like(const py::array& x) {
  const auto ndim = static_cast<std::size_t>(x.ndim());
  std::vector<std::size_t> axes(ndim);
  std::iota(axes.begin(), axes.end(), std::size_t{0});
  std::stable_sort(axes.begin(), axes.end(), [&](std::size_t a, std::size_t b) {
    return lies_outside(x.strides(static_cast<py::ssize_t>(a)), x.strides(static_cast<py::ssize_t>(b)));
  });
  const std::vector<py::ssize_t> shape(x.shape(), x.shape() + ndim);
  std::vector<py::ssize_t> strides(ndim);
  py::ssize_t bytes = x.itemsize();
  for (std::size_t i = ndim; i-- > 0;) {
    strides[axes[i]] = bytes;
    bytes *= shape[axes[i]];
  }
  if (static_cast<std::size_t>(bytes) < kPooledBytes) return py::array(x.dtype(), shape, strides);

  auto buffer = std::make_unique<Buffer>(acquire_buffer(static_cast<std::size_t>(bytes)));
  const void* data = buffer->data;
  const py::capsule owner(buffer.release(), [](void* pointer) {
    const std::unique_ptr<Buffer> owned(static_cast<Buffer*>(pointer));
    release_buffer(*owned);
  });
  return py::array(x.dtype(), shape, strides, data, owner);
}

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

bool python_signal_is_pending() {
  return taking_gil([] {
    py::gil_scoped_acquire gil;
    return PyErr_CheckSignals() != 0;
  });
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
    throw py::error_already_set();
  }
}

std::pair<Doubles, Doubles> stats(const py::array& x, py::ssize_t axis) {
  const Problem problem(axis, {&x});
  Doubles mean = new_doubles(problem.channels()), var = new_doubles(problem.channels());
  require(!problem.extents().is_empty(), "an empty array has no statistics");
  with_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const auto input = problem.input<T>(0);
    double *mean_data = mean.mutable_data(), *var_data = var.mutable_data();
    compute([&] { batch_norm_stats<T>(problem.extents(), input, mean_data, var_data); });
  });
  return {std::move(mean), std::move(var)};
}

std::pair<NormalizationArrays, Doubles> forward(
    const py::array& x, const py::array& y, py::ssize_t axis, const std::optional<py::array>& weight,
    const std::optional<py::array>& bias, std::optional<py::array> running_mean, std::optional<py::array> running_var,
    std::optional<py::array_t<std::int64_t>> counter, double momentum, double eps, Activation activation) {
  const Problem problem(axis, {&x, &y});
  const std::size_t channels = problem.channels();
  const Parameter w = parameter(weight, channels), b = parameter(bias, channels);
  const double n = static_cast<double>(problem.extents().per_channel());
  require(running_mean.has_value() == running_var.has_value(), "one running statistic without the other");
  require(!problem.extents().is_empty(), "an empty array has no statistics");
  RunningStatistic mean_statistic, var_statistic;
  if (running_mean) mean_statistic = running(running_mean, channels), var_statistic = running(running_var, channels);

  Doubles var = new_doubles(channels);
  NormalizationArrays arrays = with_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    NormalizationArrays result = new_normalization<T>(channels);
    const Normalization<T> normalization = view<T>(result, channels);
    const auto input = problem.input<T>(0);
    const auto output = problem.output<T>(1);
    double* var_data = var.mutable_data();
    compute([&] {
      batch_norm_forward<T>(problem.extents(), input, output, w, b, eps, activation, var_data, normalization);
    });
    return result;
  });
  // Committed last and together, so that an error or an interrupt leaves all of them as they were.
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
  if (counter) ++*counter->mutable_data();
  if (running_mean && momentum != 0) {
    mean_statistic.update(channels, std::get<0>(arrays).data(), 1, momentum);
    var_statistic.update(channels, var.data(), n / (n - 1), momentum);
  }
  return {std::move(arrays), std::move(var)};
}

// Index of the first value below 0, or -1.
py::ssize_t first_negative(const py::array& values) {
  require(values.ndim() == 1, "expected one axis");
  const auto count = static_cast<std::size_t>(values.shape(0));
  const Parameter parameters = parameter(values, count);
  for (std::size_t c = 0; c < count; ++c)
    if (parameters[c] < 0) return static_cast<py::ssize_t>(c);
  return -1;
}

NormalizationArrays normalization(const py::array& like, const py::array& mean, const py::array& var,
                                  const std::optional<py::array>& weight, const std::optional<py::array>& bias,
                                  double eps) {
  require(mean.ndim() == 1, "mean must have one axis");
  const auto channels = static_cast<std::size_t>(mean.shape(0));
  const Parameter m = parameter(mean, channels), v = parameter(var, channels);
  const Parameter w = parameter(weight, channels), b = parameter(bias, channels);
  return with_dtype(like, [&](auto zero) {
    using T = decltype(zero);
    NormalizationArrays result = new_normalization<T>(channels);
    Normalization<T> n = view<T>(result, channels);
    for (std::size_t c = 0; c < channels; ++c) n.set(c, m[c], v[c], w, b, eps);
    return result;
  });
}

void elemt(const py::array& x, const py::array& y, py::ssize_t axis, NormalizationArrays arrays,
           Activation activation) {
  const Problem problem(axis, {&x, &y});
  with_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const Normalization<T> n = view<T>(arrays, problem.channels());
    if (problem.extents().is_empty()) return;
    const auto input = problem.input<T>(0);
    const auto output = problem.output<T>(1);
    compute([&] { batch_norm_elemt<T>(problem.extents(), input, output, n, activation); });
  });
}

std::pair<Doubles, Doubles> backward(const py::array& dy, const py::array& x, const py::array& dx, py::ssize_t axis,
                                     NormalizationArrays arrays, Activation activation, bool training) {
  const Problem problem(axis, {&dy, &x, &dx});
  Doubles sum_dy = new_doubles(problem.channels()), sum_dy_xmu = new_doubles(problem.channels());
  require(!problem.extents().is_empty(), "an empty array has no sums");
  with_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const Normalization<T> n = view<T>(arrays, problem.channels());
    const auto gradient = problem.input<T>(0), input = problem.input<T>(1);
    const auto output = problem.output<T>(2);
    double *first = sum_dy.mutable_data(), *second = sum_dy_xmu.mutable_data();
    compute([&] {
      batch_norm_backward<T>(problem.extents(), gradient, input, output, n, activation, training, first, second);
    });
  });
  return {std::move(sum_dy), std::move(sum_dy_xmu)};
}

std::pair<Doubles, Doubles> backward_reduce(const py::array& dy, const py::array& x, py::ssize_t axis,
                                            NormalizationArrays arrays, Activation activation) {
  const Problem problem(axis, {&dy, &x});
  Doubles sum_dy = new_doubles(problem.channels()), sum_dy_xmu = new_doubles(problem.channels());
  require(!problem.extents().is_empty(), "an empty array has no sums");
  with_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const Normalization<T> n = view<T>(arrays, problem.channels());
    const auto gradient = problem.input<T>(0), input = problem.input<T>(1);
    double *first = sum_dy.mutable_data(), *second = sum_dy_xmu.mutable_data();
    compute([&] { batch_norm_backward_reduce<T>(problem.extents(), gradient, input, n, activation, first, second); });
  });
  return {std::move(sum_dy), std::move(sum_dy_xmu)};
}

void backward_elemt(const py::array& dy, const py::array& x, const py::array& dx, py::ssize_t axis,
                    NormalizationArrays arrays, Activation activation,
                    const std::optional<std::tuple<Doubles, Doubles, double>>& sums) {
  const Problem problem(axis, {&dy, &x, &dx});
  const std::size_t channels = problem.channels();
  std::optional<GradientSums> gradient_sums;
  if (sums)
    gradient_sums = {doubles(std::get<0>(*sums), channels), doubles(std::get<1>(*sums), channels), std::get<2>(*sums)};
  with_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const Normalization<T> n = view<T>(arrays, channels);
    if (problem.extents().is_empty()) return;
    const auto gradient = problem.input<T>(0), input = problem.input<T>(1);
    const auto output = problem.output<T>(2);
    compute([&] {
      batch_norm_backward_elemt<T>(problem.extents(), gradient, input, output, n, activation,
                                   gradient_sums ? &*gradient_sums : nullptr);
    });
  });
}

// The yardstick of the benchmarks: memcpy on the threads that a kernel would use.
void copy(const py::array& from, py::array to) {
  require(from.nbytes() == to.nbytes() && (from.flags() & py::array::c_style) && (to.flags() & py::array::c_style),
          "copy needs two contiguous arrays of one size");
  const auto* source = static_cast<const char*>(from.data());
  auto* target = static_cast<char*>(to.mutable_data());
  const auto bytes = static_cast<std::size_t>(from.nbytes());
  const auto threads = static_cast<std::size_t>(get_num_threads());
  compute([&] {
    parallel_for(threads, static_cast<int>(threads), [&](std::size_t i) {
      const std::size_t begin = bytes / threads * i, end = i + 1 == threads ? bytes : begin + bytes / threads;
      std::memcpy(target + begin, source + begin, end - begin);
    });
  });
}

const char* compiler() {
#if defined(__clang__)
  return "Clang " __clang_version__;
#else
  return "GCC " __VERSION__;
#endif
}

}  // namespace
}  // namespace pybn

PYBIND11_MODULE(_core, m, py::mod_gil_not_used()) {
  using namespace pybn;
  using namespace py::literals;
  set_interrupt_check(python_signal_is_pending);

  m.attr("__version__") = PYBN_VERSION;
  m.attr("compiler") = compiler();
  m.attr("openmp") = has_openmp();

  py::native_enum<Activation>(m, "Activation", "enum.Enum")
      .value("none", Activation::none)
      .value("relu", Activation::relu)
      .finalize();

  const auto has_layout = [](py::ssize_t axis, const py::args& args) {
    std::vector<py::array> arrays;
    for (const py::handle arg : args) arrays.push_back(py::cast<py::array>(arg));
    std::vector<const py::array*> pointers;
    for (const py::array& array : arrays) pointers.push_back(&array);
    return layout_of(axis, pointers).has_value();
  };
  m.def("has_layout", has_layout, "axis"_a);
  m.def("stats", &stats, "x"_a, "axis"_a);
  m.def("forward", &forward, "x"_a, "y"_a, "axis"_a, "weight"_a, "bias"_a, "running_mean"_a, "running_var"_a,
        py::arg("counter").noconvert(), "momentum"_a, "eps"_a, "activation"_a);
  m.def("first_negative", &first_negative, "values"_a);
  m.def("normalization", &normalization, "like"_a, "mean"_a, "var"_a, "weight"_a, "bias"_a, "eps"_a);
  m.def("elemt", &elemt, "x"_a, "y"_a, "axis"_a, "normalization"_a, "activation"_a);
  m.def("backward", &backward, "dy"_a, "x"_a, "dx"_a, "axis"_a, "normalization"_a, "activation"_a, "training"_a);
  m.def("backward_reduce", &backward_reduce, "dy"_a, "x"_a, "axis"_a, "normalization"_a, "activation"_a);
  m.def("backward_elemt", &backward_elemt, "dy"_a, "x"_a, "dx"_a, "axis"_a, "normalization"_a, "activation"_a,
        "sums"_a);
  m.def("empty_like", &empty_like, "x"_a);
  m.def("copy", &copy, "source"_a, "target"_a);

  m.def("set_num_threads", &set_num_threads, "limit"_a);
  m.def("get_num_threads", &get_num_threads);
  m.def("empty_cache", &empty_buffers);
  m.def("set_cache_limit", &set_buffer_limit, "bytes"_a);
  m.def("cache_statistics", [] {
    const PoolStatistics s = buffer_statistics();
    return std::make_tuple(s.cached_bytes, s.limit_bytes, s.recycled, s.fresh);
  });
  m.def("available_instruction_sets", &available_instruction_sets);
  m.def("instruction_set", [] { return std::string(instruction_set().name); });
  m.def("select_instruction_set", &select_instruction_set, "name"_a);
}
