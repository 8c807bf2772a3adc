// NumPy arrays -> plain structs, and nothing else.
//
// pybn/_arrays.py has checked every argument and phrased every error before a call comes here; what is checked again is
// what memory safety needs. The GIL is released while kernels run.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstring>
#include <memory>
#include <numeric>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "batch_norm.h"
#include "buffers.h"
#include "calls.h"
#include "dispatch.h"
#include "layout.h"
#include "parallel.h"
#include "torch_bindings.h"

namespace py = pybind11;

namespace pybn {
namespace {

using Doubles = py::array_t<double>;

// ---- types

// What NumPy calls ml_dtypes.bfloat16, once an array of it has been met: a type that ml_dtypes registers at run time.
std::atomic<int> bfloat16_number{-1};

std::optional<DType> dtype_of(const py::array& array) {
  const py::dtype dtype = array.dtype();
  const char order = dtype.byteorder();  // '=' or '<' or '>'; '|' or '=' where there is none
  constexpr char kForeign = __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__ ? '>' : '<';
  if (order == kForeign) return std::nullopt;
  const int number = dtype.num();
  if (number == py::dtype::num_of<float>()) return DType::float32;
  if (number == py::dtype::num_of<double>()) return DType::float64;
  if (number == 23 /* NPY_HALF */) return DType::float16;
  if (number == bfloat16_number) return DType::bfloat16;
  if (dtype.kind() == 'V' && dtype.itemsize() == 2 && py::str(dtype.attr("name")).equal(py::str("bfloat16"))) {
    bfloat16_number = number;
    return DType::bfloat16;
  }
  return std::nullopt;
}

// Calls f with a value of the array's element type.
template <class F>
auto with_dtype(const py::array& x, F f) {
  const std::optional<DType> dtype = dtype_of(x);
  require(dtype.has_value(), "expected a native float32, float64, float16 or bfloat16 array");
  return with_dtype(*dtype, std::move(f));
}

bool is_c_contiguous(const py::array& array) {
  return (array.flags() & py::array::c_style) != 0;
}

// ---- layouts

std::optional<Layout> layout_of_strides(py::ssize_t channel_axis, const std::vector<const py::array*>& arrays) {
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

std::optional<Layout> layout_of(py::ssize_t channel_axis, const std::vector<const py::array*>& arrays) {
  const py::array& first = *arrays.front();
  const auto c_contiguous = [](const py::array* array) { return is_c_contiguous(*array); };
  // The usual case, soon done. With one channel there is more to merge.
  if (first.size() > 0 && first.shape(channel_axis) > 1 && std::all_of(arrays.begin(), arrays.end(), c_contiguous)) {
    Extents e{1, static_cast<std::size_t>(first.shape(channel_axis)), 1};
    for (py::ssize_t d = 0; d < first.ndim(); ++d)
      if (d != channel_axis) (d < channel_axis ? e.outer : e.inner) *= static_cast<std::size_t>(first.shape(d));
    const Strides strides{static_cast<std::ptrdiff_t>(e.channels * e.inner), static_cast<std::ptrdiff_t>(e.inner)};
    return Layout{e, std::vector<Strides>(arrays.size(), strides)};
  }
  return layout_of_strides(channel_axis, arrays);
}

// Arrays of one shape and type, as a call to the core sees them. The first decides the order of the axes; null pointers
// stand for absent ones.
class Problem {
 public:
  Problem(py::ssize_t channel_axis, const std::vector<const py::array*>& arrays) {
    const py::array& first = *arrays.front();
    require(channel_axis >= 0 && channel_axis < first.ndim(), "channel axis out of range");
    for (const py::array* array : arrays)
      if (array) {
        require(
            array->ndim() == first.ndim() && std::equal(array->shape(), array->shape() + array->ndim(), first.shape()),
            "shapes differ");
        require(array->dtype().is(first.dtype()) || dtype_of(*array) == dtype_of(first), "dtypes differ");
        arrays_.push_back(array);
      }
    std::optional<Layout> layout = layout_of(channel_axis, arrays_);
    require(layout.has_value(), "strides that the kernels cannot follow");
    layout_ = std::move(*layout);
  }

  const Extents& extents() const { return layout_.extents; }
  std::size_t channels() const { return layout_.extents.channels; }

  template <class T>
  Operand<const T> input(const py::array* array) const {
    if (!array) return {};
    const Strides strides = strides_of(array);
    return {static_cast<const T*>(array->data()), strides.outer, strides.channel};
  }
  template <class T>
  Operand<T> output(py::array* array) const {
    if (!array) return {};
    const Strides strides = strides_of(array);
    return {static_cast<T*>(array->mutable_data()), strides.outer, strides.channel};
  }

 private:
  Strides strides_of(const py::array* array) const {
    const auto found = std::find(arrays_.begin(), arrays_.end(), array);
    return layout_.operands[static_cast<std::size_t>(found - arrays_.begin())];
  }

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
  const std::optional<DType> dtype = dtype_of(*values);
  require(dtype == DType::float32 || dtype == DType::float64, "a per-channel array of another type");
  return {static_cast<const char*>(values->data()), values->strides(0), dtype == DType::float64};
}

RunningStatistic running(std::optional<py::array>& values, std::size_t channels) {
  const Parameter as_parameter = parameter(values, channels);
  return {static_cast<char*>(values->mutable_data()), as_parameter.byte_stride, as_parameter.is_double};
}

const double* doubles(const Doubles& values, std::size_t channels) {
  require_channels(values, channels);
  return values.data();
}

// Two values per channel, of shape (2, C).
Doubles new_pair(std::size_t channels) {
  return Doubles({py::ssize_t{2}, static_cast<py::ssize_t>(channels)});
}

// A Normalization whose memory Python owns: mean and invstd, of shape (2, C), and the affine map, of shape (3, C).
using NormalizationArrays = std::pair<Doubles, py::array>;

template <class T>
Normalization<T> view(NormalizationArrays& arrays, std::size_t channels) {
  auto& [statistics, affine] = arrays;
  const auto has_shape = [&](const py::array& array, py::ssize_t rows) {
    return array.ndim() == 2 && array.shape(0) == rows && static_cast<std::size_t>(array.shape(1)) == channels &&
           is_c_contiguous(array);
  };
  using A = Arithmetic<T>;
  require(has_shape(statistics, kStatisticsRows), "statistics of another shape");
  require(has_shape(affine, kAffineRows) && py::isinstance<py::array_t<A>>(affine),
          "an affine map of another shape or type");
  return normalization_in<T>(statistics.mutable_data(), static_cast<A*>(affine.mutable_data()), channels);
}

template <class T>
NormalizationArrays new_normalization(std::size_t channels) {
  return {new_pair(channels), py::array_t<Arithmetic<T>>({py::ssize_t{3}, static_cast<py::ssize_t>(channels)})};
}

// A new array; large ones live in recycled memory.
py::array new_array(const py::dtype& dtype, const std::vector<py::ssize_t>& shape,
                    const std::vector<py::ssize_t>& strides, std::size_t bytes) {
  if (bytes < kPooledBytes) return py::array(dtype, shape, strides);
  auto buffer = std::make_unique<Buffer>(acquire_buffer(bytes));
  const void* data = buffer->data;
  const py::capsule owner(buffer.release(), [](void* pointer) {
    const std::unique_ptr<Buffer> owned(static_cast<Buffer*>(pointer));
    release_buffer(*owned);
  });
  return py::array(dtype, shape, strides, data, owner);
}

// ---- what follows the map

py::array new_mask(const Extents& e) {
  const std::size_t bytes = e.outer * mask_strides(e).second;
  return new_array(py::dtype::of<std::uint8_t>(), {static_cast<py::ssize_t>(bytes)}, {1}, bytes);
}

template <class T>
Fusion<T> fusion(const Problem& problem, ActivationArguments activation, const py::array* residual,
                 const py::array* mask) {
  require(activation.first >= 0 && activation.first < static_cast<int>(std::size(kActivationNames)),
          "an unknown activation");
  Fusion<T> result{static_cast<Activation>(activation.first), activation.second, problem.input<T>(residual), {}};
  if (mask) {
    const Extents& e = problem.extents();
    const auto [plane, outer] = mask_strides(e);
    require(py::isinstance<py::array_t<std::uint8_t>>(*mask) && is_c_contiguous(*mask) &&
                static_cast<std::size_t>(mask->size()) == e.outer * outer,
            "a mask of another layout");
    // Kernels write it in the forward pass only, where it is new.
    result.mask = {static_cast<std::uint8_t*>(const_cast<void*>(mask->data())), static_cast<std::ptrdiff_t>(outer),
                   static_cast<std::ptrdiff_t>(plane)};
  }
  return result;
}

const py::array* pointer(const std::optional<py::array>& array) {
  return array ? &*array : nullptr;
}
py::array* pointer(std::optional<py::array>& array) {
  return array ? &*array : nullptr;
}

// A new array of x's shape, type and order of axes, without gaps; large ones live in recycled memory.
py::array empty_like(const py::array& x) {
  if (is_c_contiguous(x))
    return new_array(x.dtype(), {x.shape(), x.shape() + x.ndim()}, {x.strides(), x.strides() + x.ndim()},
                     static_cast<std::size_t>(x.nbytes()));
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
  return new_array(x.dtype(), shape, strides, static_cast<std::size_t>(bytes));
}

bool python_signal_is_pending() {
  return taking_gil([] {
    py::gil_scoped_acquire gil;
    return PyErr_CheckSignals() != 0;
  });
}

// ---- the operations

// Mean, variance, and what rounding took from the mean, of shape (3, C).
Doubles stats(const py::array& x, py::ssize_t axis) {
  const Problem problem(axis, {&x});
  const std::size_t channels = problem.channels();
  Doubles result({py::ssize_t{3}, static_cast<py::ssize_t>(channels)});
  require(!problem.extents().is_empty(), "an empty array has no statistics");
  with_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const auto input = problem.input<T>(&x);
    double* mean = result.mutable_data();
    compute([&] { batch_norm_stats<T>(problem.extents(), input, mean, mean + channels, mean + 2 * channels); });
  });
  return result;
}

// Index of the first value below 0, or -1.
py::ssize_t first_negative(const py::array& values) {
  require(values.ndim() == 1, "expected one axis");
  const auto count = static_cast<std::size_t>(values.shape(0));
  std::vector<double> wide(count);
  parameter(values, count).read(0, count, 0, wide.data());
  const auto is_negative = [](double value) { return value < 0; };
  if (std::count_if(wide.begin(), wide.end(), is_negative) == 0) return -1;  // the usual case, in vectors
  return std::find_if(wide.begin(), wide.end(), is_negative) - wide.begin();
}

// Training or evaluation: if it `keeps` what a backward pass needs, the normalization and, where there is one, a mask.
// Arrays for a map that nobody keeps would cost a call on two values a fifth of its time.
std::pair<std::optional<NormalizationArrays>, std::optional<py::array>> forward(
    const py::array& x, py::array y, py::ssize_t axis, const std::optional<py::array>& weight,
    const std::optional<py::array>& bias, std::optional<py::array> running_mean, std::optional<py::array> running_var,
    std::optional<py::array_t<std::int64_t>> counter, bool training, double momentum, double eps,
    ActivationArguments activation, const std::optional<py::array>& residual, bool keeps) {
  const Problem problem(axis, {&x, &y, pointer(residual)});
  const Extents& extents = problem.extents();
  const std::size_t channels = problem.channels();
  const Parameter w = parameter(weight, channels), b = parameter(bias, channels);
  require(running_mean.has_value() == running_var.has_value(), "one running statistic without the other");
  require(training || running_mean, "evaluation needs running statistics");
  require(!extents.is_empty(), "an empty array has no statistics");
  RunningStatistic mean_statistic, var_statistic;
  if (training && running_mean)
    mean_statistic = running(running_mean, channels), var_statistic = running(running_var, channels);
  std::optional<py::array> mask;
  if (keeps && residual && has_mask(static_cast<Activation>(activation.first))) mask = new_mask(extents);

  std::optional<NormalizationArrays> kept;
  with_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    std::optional<OwnNormalization<T>> own;
    const Normalization<T> n =
        keeps ? view<T>(kept.emplace(new_normalization<T>(channels)), channels) : own.emplace(channels).view();
    const Fusion<T> f = fusion<T>(problem, activation, pointer(residual), pointer(mask));
    const auto input = problem.input<T>(&x);
    const auto output = problem.output<T>(&y);
    if (training) {
      std::vector<double> var(channels);
      compute([&] { batch_norm_forward<T>(extents, input, output, w, b, eps, f, var.data(), n); });
      // Committed last and together, so that an error or an interrupt leaves all of them as they were.
      if (PyErr_CheckSignals() != 0) throw py::error_already_set();
      if (counter) ++*counter->mutable_data();
      if (running_mean && momentum != 0) {
        const double count = static_cast<double>(extents.per_channel());
        mean_statistic.update(channels, n.mean, 1, momentum);
        var_statistic.update(channels, var.data(), count / (count - 1), momentum);
      }
    } else {
      normalize_with(parameter(running_mean, channels), parameter(running_var, channels), w, b, eps, channels, n);
      compute([&] { batch_norm_elemt<T>(extents, input, output, n, f); });
    }
  });
  return {std::move(kept), std::move(mask)};
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
    normalize_with(m, v, w, b, eps, channels, n);
    return result;
  });
}

void elemt(const py::array& x, py::array y, py::ssize_t axis, NormalizationArrays arrays,
           ActivationArguments activation, const std::optional<py::array>& residual) {
  const Problem problem(axis, {&x, &y, pointer(residual)});
  with_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const Normalization<T> n = view<T>(arrays, problem.channels());
    if (problem.extents().is_empty()) return;
    const Fusion<T> f = fusion<T>(problem, activation, pointer(residual), nullptr);
    const auto input = problem.input<T>(&x);
    const auto output = problem.output<T>(&y);
    compute([&] { batch_norm_elemt<T>(problem.extents(), input, output, n, f); });
  });
}

// sum_dy and sum_dy_xmu, of shape (2, C). Where a leaky ReLU has `overwritten` z, x is its output.
Doubles backward(const py::array& dy, const py::array& x, py::array dx, std::optional<py::array> dresidual,
                 py::ssize_t axis, NormalizationArrays arrays, ActivationArguments activation,
                 const std::optional<py::array>& residual, const std::optional<py::array>& mask, bool training,
                 bool overwritten) {
  const Problem problem(axis, {&x, &dy, &dx, pointer(dresidual), pointer(residual)});
  const std::size_t channels = problem.channels();
  Doubles sums = new_pair(channels);
  require(!problem.extents().is_empty(), "an empty array has no sums");
  with_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const Normalization<T> n = view<T>(arrays, channels);
    Fusion<T> f = fusion<T>(problem, activation, pointer(residual), pointer(mask));
    if (overwritten) {
      require(f.activation == Activation::leaky_relu && !residual && !mask && sizeof(T) > 2,
              "an activation that cannot be inverted");
      f.activation = Activation::overwritten_leaky_relu;
    }
    const GradientOperands<T> operands{problem.input<T>(&dy), problem.input<T>(&x), problem.output<T>(&dx),
                                       problem.output<T>(pointer(dresidual))};
    double* sum_dy = sums.mutable_data();
    compute([&] { batch_norm_backward<T>(problem.extents(), operands, n, f, training, sum_dy, sum_dy + channels); });
  });
  return sums;
}

Doubles backward_reduce(const py::array& dy, const py::array& x, py::ssize_t axis, NormalizationArrays arrays,
                        ActivationArguments activation, const std::optional<py::array>& residual,
                        const std::optional<py::array>& mask) {
  const Problem problem(axis, {&x, &dy, pointer(residual)});
  const std::size_t channels = problem.channels();
  Doubles sums = new_pair(channels);
  require(!problem.extents().is_empty(), "an empty array has no sums");
  with_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const Normalization<T> n = view<T>(arrays, channels);
    const Fusion<T> f = fusion<T>(problem, activation, pointer(residual), pointer(mask));
    const auto gradient = problem.input<T>(&dy), input = problem.input<T>(&x);
    double* sum_dy = sums.mutable_data();
    compute(
        [&] { batch_norm_backward_reduce<T>(problem.extents(), gradient, input, n, f, sum_dy, sum_dy + channels); });
  });
  return sums;
}

void backward_elemt(const py::array& dy, const py::array& x, py::array dx, std::optional<py::array> dresidual,
                    py::ssize_t axis, NormalizationArrays arrays, ActivationArguments activation,
                    const std::optional<py::array>& residual, const std::optional<py::array>& mask,
                    const std::optional<std::tuple<Doubles, Doubles, double>>& sums) {
  const Problem problem(axis, {&x, &dy, &dx, pointer(dresidual), pointer(residual)});
  const std::size_t channels = problem.channels();
  std::optional<GradientSums> gradient_sums;
  if (sums)
    gradient_sums = {doubles(std::get<0>(*sums), channels), doubles(std::get<1>(*sums), channels), std::get<2>(*sums)};
  with_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const Normalization<T> n = view<T>(arrays, channels);
    if (problem.extents().is_empty()) return;
    const Fusion<T> f = fusion<T>(problem, activation, pointer(residual), pointer(mask));
    const GradientOperands<T> operands{problem.input<T>(&dy), problem.input<T>(&x), problem.output<T>(&dx),
                                       problem.output<T>(pointer(dresidual))};
    compute([&] {
      batch_norm_backward_elemt<T>(problem.extents(), operands, n, f, gradient_sums ? &*gradient_sums : nullptr);
    });
  });
}

// ---- the fast path of the checks

// An argument as an array, if it is what it usually is: plain, native, aligned and contiguous.
std::optional<py::array> usual_array(py::handle argument) {
  if (Py_TYPE(argument.ptr()) != py::detail::npy_api::get().PyArray_Type_) return std::nullopt;
  auto array = py::reinterpret_borrow<py::array>(argument);
  constexpr int needed = py::array::c_style | py::detail::npy_api::NPY_ARRAY_ALIGNED_;
  if ((array.flags() & needed) != needed) return std::nullopt;
  return array;
}

bool share_memory(const py::array& a, const py::array& b) {
  const auto *a_begin = static_cast<const char*>(a.data()), *b_begin = static_cast<const char*>(b.data());
  return a_begin < b_begin + b.nbytes() && b_begin < a_begin + a.nbytes();
}

bool is_same_kind(const py::array& a, const py::array& b) {
  return a.ndim() == b.ndim() && std::equal(a.shape(), a.shape() + a.ndim(), b.shape()) && dtype_of(a) == dtype_of(b);
}

// Whether two arrays are element by element the same memory. Asking an array in Python where it begins takes
// microseconds.
bool is_same_memory(const py::array& a, const py::array& b) {
  if (a.data() != b.data() || a.ndim() != b.ndim() || !std::equal(a.shape(), a.shape() + a.ndim(), b.shape()))
    return false;
  for (py::ssize_t d = 0; d < a.ndim(); ++d)
    if (a.shape(d) > 1 && a.strides(d) != b.strides(d)) return false;
  return a.dtype().equal(b.dtype());
}

// The channel axis of x if all arguments of a forward pass are what they usually are, so that the checks of
// pybn/_arrays.py, which take 10 us, would find nothing; otherwise -1.
py::ssize_t usual_channel_axis(py::handle x_argument, py::handle axis_argument, py::handle training_argument,
                               py::handle momentum, py::handle eps, py::handle weight, py::handle bias,
                               py::handle running_mean, py::handle running_var, py::handle residual_argument,
                               py::handle out_argument) {
  constexpr py::ssize_t unusual = -1;
  const std::optional<py::array> x = usual_array(x_argument);
  if (!x || x->ndim() < 2 || x->size() == 0 || !dtype_of(*x)) return unusual;
  if (!PyLong_CheckExact(axis_argument.ptr())) return unusual;
  const long given = PyLong_AsLong(axis_argument.ptr());
  if (given == -1 && PyErr_Occurred()) throw py::error_already_set();
  if (given != 1 && given != -1) return unusual;
  const py::ssize_t axis = given == 1 ? 1 : x->ndim() - 1;
  const py::ssize_t channels = x->shape(axis);
  if (!PyBool_Check(training_argument.ptr())) return unusual;
  if (!PyFloat_CheckExact(momentum.ptr()) || !PyFloat_CheckExact(eps.ptr())) return unusual;
  const double m = PyFloat_AS_DOUBLE(momentum.ptr()), e = PyFloat_AS_DOUBLE(eps.ptr());
  if (!(0 <= m && m <= 1 && 0 < e && std::isfinite(e))) return unusual;
  const bool training = training_argument.ptr() == Py_True;
  if (training ? x->size() == channels || running_mean.is_none() != running_var.is_none()
               : running_mean.is_none() || running_var.is_none())
    return unusual;

  std::vector<py::array> parameters;
  for (const py::handle argument : {weight, bias, running_mean, running_var}) {
    if (argument.is_none()) continue;
    std::optional<py::array> array = usual_array(argument);
    if (!array || array->ndim() != 1 || array->shape(0) != channels) return unusual;
    const std::optional<DType> dtype = dtype_of(*array);
    if (dtype != DType::float32 && dtype != DType::float64) return unusual;
    parameters.push_back(std::move(*array));
  }
  if (!running_var.is_none()) {
    const py::array &var = parameters.back(), &mean = parameters[parameters.size() - 2];
    if (training && (!mean.writeable() || !var.writeable() || share_memory(mean, var))) return unusual;
    if (first_negative(var) >= 0) return unusual;
  }

  std::optional<py::array> residual;
  if (!residual_argument.is_none()) {
    residual = usual_array(residual_argument);
    if (!residual || !is_same_kind(*residual, *x)) return unusual;
  }
  if (!out_argument.is_none()) {
    const std::optional<py::array> out = usual_array(out_argument);
    if (!out || !out->writeable() || !is_same_kind(*out, *x)) return unusual;
    for (const py::array& parameter : parameters)
      if (share_memory(*out, parameter)) return unusual;
    for (const auto& input : {x, residual})
      if (input && input->data() != out->data() && share_memory(*out, *input)) return unusual;
  }
  return axis;
}

// Whether a backward pass has what it usually has: dy like x, both plain, and an out, if any, that is dy or apart.
bool has_usual_gradient(py::handle dy_argument, py::handle x_argument, py::handle out_argument) {
  const std::optional<py::array> dy = usual_array(dy_argument), x = usual_array(x_argument);
  if (!dy || !x || x->size() == 0 || !is_same_kind(*dy, *x) || !dtype_of(*x)) return false;
  if (out_argument.is_none()) return true;
  const std::optional<py::array> out = usual_array(out_argument);
  return out && out->writeable() && is_same_kind(*out, *x) && !share_memory(*out, *x) &&
         (out->data() == dy->data() || !share_memory(*out, *dy));
}

// The gradient of a parameter from the float64 sums, times `factors` if there are any; beyond float32 it is infinite.
py::array parameter_gradient(const Doubles& sums, const std::optional<Doubles>& factors, bool is_double) {
  const auto channels = static_cast<std::size_t>(sums.size());
  const double *from = doubles(sums, channels), *factor = factors ? doubles(*factors, channels) : nullptr;
  const auto fill = [&](auto result) {
    auto* to = result.mutable_data();
    for (std::size_t c = 0; c < channels; ++c)
      to[c] = static_cast<std::decay_t<decltype(*to)>>(factor ? from[c] * factor[c] : from[c]);
    return py::array(std::move(result));
  };
  if (is_double) return fill(Doubles(sums.size()));
  return fill(py::array_t<float>(sums.size()));
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

// Independent additions per nanosecond of one thread: about four times the clock in GHz where it has the core to
// itself, half of that or less where another program runs on the core's other half.
double additions_per_nanosecond() {
  constexpr int kSteps = 1 << 16, kUnrolled = 8;
  std::size_t a = 0, b = 0, c = 0, d = 0;
  const auto start = std::chrono::steady_clock::now();
  for (int step = 0; step < kSteps; ++step)
#pragma GCC unroll 8
    for (int i = 0; i < kUnrolled; ++i) {
      a += 1, b += 1, c += 1, d += 1;
      asm volatile("" : "+r"(a), "+r"(b), "+r"(c), "+r"(d));  // the compiler would add once
    }
  const std::chrono::duration<double, std::nano> taken = std::chrono::steady_clock::now() - start;
  return static_cast<double>(a + b + c + d) / taken.count();
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

  py::list activations;
  for (const char* name : kActivationNames) activations.append(name);
  m.attr("activations") = py::tuple(activations);

  const auto layout = [](py::ssize_t axis, const py::args& args) -> std::optional<std::array<std::size_t, 3>> {
    std::vector<py::array> arrays;
    for (const py::handle arg : args) arrays.push_back(py::cast<py::array>(arg));
    std::vector<const py::array*> pointers;
    for (const py::array& array : arrays) pointers.push_back(&array);
    const std::optional<Layout> found = layout_of(axis, pointers);
    if (!found) return std::nullopt;
    return std::array<std::size_t, 3>{found->extents.outer, found->extents.channels, found->extents.inner};
  };
  m.def("layout", layout, "axis"_a);
  m.def("usual_channel_axis", &usual_channel_axis, "x"_a, "channel_axis"_a, "training"_a, "momentum"_a, "eps"_a,
        "weight"_a, "bias"_a, "running_mean"_a, "running_var"_a, "residual"_a, "out"_a);
  m.def("is_same_memory", &is_same_memory, "a"_a, "b"_a);
  m.def("has_usual_gradient", &has_usual_gradient, "dy"_a, "x"_a, "out"_a);
  m.def("parameter_gradient", &parameter_gradient, "sums"_a, "factors"_a, "is_double"_a);
  m.def("stats", &stats, "x"_a, "axis"_a);
  m.def("forward", &forward, "x"_a, "y"_a, "axis"_a, "weight"_a, "bias"_a, "running_mean"_a, "running_var"_a,
        py::arg("counter").noconvert(), "training"_a, "momentum"_a, "eps"_a, "activation"_a, "residual"_a, "keeps"_a);
  m.def("first_negative", &first_negative, "values"_a);
  m.def("normalization", &normalization, "like"_a, "mean"_a, "var"_a, "weight"_a, "bias"_a, "eps"_a);
  m.def("elemt", &elemt, "x"_a, "y"_a, "axis"_a, "normalization"_a, "activation"_a, "residual"_a);
  m.def("backward", &backward, "dy"_a, "x"_a, "dx"_a, "dresidual"_a, "axis"_a, "normalization"_a, "activation"_a,
        "residual"_a, "mask"_a, "training"_a, "overwritten"_a = false);
  m.def("backward_reduce", &backward_reduce, "dy"_a, "x"_a, "axis"_a, "normalization"_a, "activation"_a, "residual"_a,
        "mask"_a);
  m.def("backward_elemt", &backward_elemt, "dy"_a, "x"_a, "dx"_a, "dresidual"_a, "axis"_a, "normalization"_a,
        "activation"_a, "residual"_a, "mask"_a, "sums"_a);
  m.def("empty_like", &empty_like, "x"_a);
  m.def("copy", &copy, "source"_a, "target"_a);

  register_torch(m);

  m.def("set_num_threads", &set_num_threads, "limit"_a);
  m.def("get_num_threads", &get_num_threads);
  m.def("additions_per_nanosecond", &additions_per_nanosecond);
  m.def("empty_cache", &empty_buffers);
  m.def("set_cache_limit", &set_buffer_limit, "bytes"_a);
  m.def("cache_statistics", [] {
    const PoolStatistics s = buffer_statistics();
    return std::make_tuple(s.cached_bytes, s.limit_bytes, s.recycled, s.fresh);
  });
  m.def("available_instruction_sets", &available_instruction_sets);
  m.def("instruction_set", [] { return std::string(instruction_set().name); });
  m.def("select_instruction_set", &select_instruction_set, "name"_a);
  m.def("is_amd", &is_amd);
  m.def("set_is_amd", &set_is_amd, "value"_a);
}
