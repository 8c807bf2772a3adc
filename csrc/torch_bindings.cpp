// torch tensors -> plain structs, without torch's headers or libraries.
//
// DLPack's C functions read a tensor in 0.03 us and make one in 0.5 us, so that one call from Python has little to do
// besides the kernels. What is not a plain tensor on the CPU, of a type and layout that the kernels can follow, makes
// an entry return None before anything is written; pybn/torch/kernels.py knows what to do then.
#include "torch_bindings.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <optional>
#include <utility>
#include <vector>

#include "batch_norm.h"
#include "buffers.h"
#include "calls.h"
#include "dlpack.h"
#include "layout.h"
#include "parallel.h"

namespace py = pybind11;

namespace pybn {
namespace {

// ---- what torch is, as far as this file knows: its functions of DLPack, and the types that are plain tensors

struct Torch {
  const dlpack::ExchangeApi* api = nullptr;
  PyObject *tensor = nullptr, *parameter = nullptr, *get_num_threads = nullptr;
};
Torch torch;

bool connect_torch(const py::object& capsule, const py::object& tensor, const py::object& parameter,
                   const py::object& get_num_threads) {
  void* pointer = PyCapsule_GetPointer(capsule.ptr(), dlpack::kCapsule);
  if (!pointer) throw py::error_already_set();
  auto* api = static_cast<dlpack::ExchangeApi*>(pointer);
  while (api && api->version.major != 1) api = api->previous;
  if (!api || !api->view) return false;
  // For the rest of the process, as the extension itself.
  torch = {api, py::object(tensor).release().ptr(), py::object(parameter).release().ptr(),
           py::object(get_num_threads).release().ptr()};
  return true;
}

// Asking torch for its number of threads also tells OpenMP of it, if this thread is new to torch.
class TorchThreads {
 public:
  TorchThreads() {
    const auto number = py::reinterpret_steal<py::object>(PyObject_CallNoArgs(torch.get_num_threads));
    if (!number) throw py::error_already_set();
    previous_ = limit_threads_here(static_cast<int>(PyLong_AsLong(number.ptr())));
  }
  ~TorchThreads() { limit_threads_here(previous_); }
  TorchThreads(const TorchThreads&) = delete;
  TorchThreads& operator=(const TorchThreads&) = delete;

 private:
  int previous_;
};

// ---- tensors

struct Tensor : dlpack::Tensor {
  DType type;

  std::size_t size(int d) const { return static_cast<std::size_t>(shape[d]); }
  std::size_t numel() const {
    std::size_t n = 1;
    for (int d = 0; d < ndim; ++d) n *= size(d);
    return n;
  }
  std::size_t itemsize() const { return dtype.bits / 8u; }
  char* bytes() const { return static_cast<char*>(data) + byte_offset; }

  // In which order of axes the elements lie without gaps; a size of 1 has any stride.
  bool has_strides(const std::int64_t* expected) const {
    for (int d = 0; d < ndim; ++d)
      if (shape[d] != 1 && strides[d] != expected[d]) return false;
    return true;
  }
};

std::optional<DType> dtype_of(const dlpack::DataType& t) {
  if (t.lanes != 1) return std::nullopt;
  if (t.code == dlpack::kFloat && t.bits == 32) return DType::float32;
  if (t.code == dlpack::kFloat && t.bits == 64) return DType::float64;
  if (t.code == dlpack::kFloat && t.bits == 16) return DType::float16;
  if (t.code == dlpack::kBfloat && t.bits == 16) return DType::bfloat16;
  return std::nullopt;
}

// A plain tensor on the CPU, with memory, or nothing.
std::optional<Tensor> view(py::handle object) {
  auto* const type = reinterpret_cast<PyObject*>(Py_TYPE(object.ptr()));
  if (type != torch.tensor && type != torch.parameter) return std::nullopt;
  Tensor tensor{};
  if (torch.api->view(object.ptr(), &tensor) != 0) {  // sparse, or on a device that DLPack does not know
    PyErr_Clear();
    return std::nullopt;
  }
  if (tensor.device.type != dlpack::kCpu || !tensor.data) return std::nullopt;
  return tensor;
}

// One of a type that is computed with.
std::optional<Tensor> floating(py::handle object) {
  std::optional<Tensor> tensor = view(object);
  const std::optional<DType> type = tensor ? dtype_of(tensor->dtype) : std::nullopt;
  if (!type) return std::nullopt;
  tensor->type = *type;
  return tensor;
}

constexpr int kMaxAxes = 8;
using Axes = std::array<std::int64_t, kMaxAxes>;

Axes contiguous_strides(const Tensor& like) {
  Axes strides{};
  std::int64_t step = 1;
  for (int d = like.ndim; d-- > 0;) {
    strides[d] = step;
    step *= like.shape[d];
  }
  return strides;
}

Axes channels_last_strides(const Tensor& like) {
  Axes strides{};
  strides[1] = 1;
  std::int64_t step = like.shape[1];
  for (int d = like.ndim; d-- > 2;) {
    strides[d] = step;
    step *= like.shape[d];
  }
  strides[0] = step;
  return strides;
}

// Whether the order of the strides is that of channels_last, gaps or not, as torch decides it.
bool is_like_channels_last(const Tensor& x) {
  if ((x.ndim != 4 && x.ndim != 5) || x.strides[1] == 0) return false;
  std::int64_t least = 0;
  const auto lies_outside = [&](int d) {
    const bool result = x.shape[d] > 0 && x.strides[d] >= least;
    least = x.strides[d] * std::max<std::int64_t>(x.shape[d], 1);
    return result;
  };
  if (!lies_outside(1)) return false;
  for (int d = x.ndim; d-- > 2;)
    if (!lies_outside(d)) return false;
  return least != x.strides[1] && lies_outside(0);  // all sizes but the batch's are 1: ambiguous, and contiguous then
}

// ---- new tensors

// Memory of a tensor: of the pool, or behind this struct itself, in one block of malloc's.
struct Memory {
  dlpack::ManagedTensor managed;
  Axes shape, strides;
  Buffer buffer;  // no data if the elements follow

  static constexpr std::size_t kAlignment = 64;  // as torch's own
  static constexpr std::size_t offset() { return (sizeof(Memory) + kAlignment - 1) / kAlignment * kAlignment; }
};

void free_memory(dlpack::ManagedTensor* managed) {
  auto* memory = static_cast<Memory*>(managed->context);
  if (memory->buffer.data) release_buffer(memory->buffer);
  std::free(memory);
}

// A new tensor and a view of it.
struct NewTensor {
  py::object object;
  Tensor view;
};

NewTensor new_tensor(dlpack::DataType dtype, int ndim, const std::int64_t* shape, const Axes& strides) {
  std::size_t bytes = dtype.bits / 8u;
  for (int d = 0; d < ndim; ++d) bytes *= static_cast<std::size_t>(shape[d]);
  const bool is_pooled = bytes >= kPooledBytes;
  const std::size_t block = Memory::offset() + (is_pooled ? 0 : bytes);
  void* raw = std::aligned_alloc(Memory::kAlignment,
                                 (block + Memory::kAlignment - 1) / Memory::kAlignment * Memory::kAlignment);
  if (!raw) throw std::bad_alloc();
  auto* memory = new (raw) Memory{};
  if (is_pooled) {
    try {
      memory->buffer = acquire_buffer(bytes);
    } catch (...) {
      std::free(raw);
      throw;
    }
  }
  std::copy(shape, shape + ndim, memory->shape.begin());
  memory->strides = strides;
  void* const data = is_pooled ? memory->buffer.data : static_cast<char*>(raw) + Memory::offset();
  memory->managed = {{1, 0},
                     memory,
                     free_memory,
                     0,
                     {data, {dlpack::kCpu, 0}, ndim, dtype, memory->shape.data(), memory->strides.data(), 0}};
  NewTensor result;
  void* object = nullptr;
  if (torch.api->import_managed(&memory->managed, &object) != 0) throw py::error_already_set();
  result.object = py::reinterpret_steal<py::object>(static_cast<PyObject*>(object));
  static_cast<dlpack::Tensor&>(result.view) = memory->managed.tensor;
  result.view.type = dtype_of(dtype).value_or(DType::float32);
  return result;
}

NewTensor new_like(const Tensor& like, const Axes& strides) {
  return new_tensor(like.dtype, like.ndim, like.shape, strides);
}

constexpr dlpack::DataType kByte{dlpack::kUInt, 8, 1};

NewTensor new_vector(dlpack::DataType dtype, std::size_t size) {
  const auto n = static_cast<std::int64_t>(size);
  return new_tensor(dtype, 1, &n, Axes{1});
}

// ---- layouts

// How the kernels see x and what is of its shape: x with its own strides, everything else with `target`'s, which are
// contiguous or channels_last, as torch's own batch norm chooses them.
struct Problem {
  Extents extents;
  Strides x, others;
  Axes target;
};

bool fits(const Tensor& x, const Tensor& other, const Problem& problem) {
  return other.ndim == x.ndim && other.type == x.type && std::equal(x.shape, x.shape + x.ndim, other.shape) &&
         other.has_strides(problem.target.data());
}

std::optional<Problem> problem_of(const Tensor& x) {
  if (x.ndim < 2 || x.ndim > kMaxAxes) return std::nullopt;
  const std::size_t values = x.numel(), channels = x.size(1);
  if (values == 0) return std::nullopt;
  const Axes planes = contiguous_strides(x);
  const bool may_be_rows = x.ndim == 4 || x.ndim == 5;
  const Axes rows = may_be_rows ? channels_last_strides(x) : planes;
  // The usual cases, soon done. With one channel there is more to merge.
  if (channels > 1 && x.has_strides(planes.data())) {
    const std::size_t inner = values / (x.size(0) * channels);
    const Strides strides{static_cast<std::ptrdiff_t>(channels * inner), static_cast<std::ptrdiff_t>(inner)};
    return Problem{{x.size(0), channels, inner}, strides, strides, planes};
  }
  if (channels > 1 && may_be_rows && x.has_strides(rows.data())) {
    const Strides strides{static_cast<std::ptrdiff_t>(channels), 1};
    return Problem{{values / channels, channels, 1}, strides, strides, rows};
  }
  const Axes& target = !x.has_strides(planes.data()) && is_like_channels_last(x) ? rows : planes;
  const std::vector<std::ptrdiff_t> shape(x.shape, x.shape + x.ndim), own(x.strides, x.strides + x.ndim),
      others(target.begin(), target.begin() + x.ndim);
  const std::optional<Layout> layout = find_layout(shape, 1, {own, others});
  if (!layout) return std::nullopt;
  return Problem{layout->extents, layout->operands[0], layout->operands[1], target};
}

template <class T>
Operand<T> operand(const Tensor* tensor, const Strides& strides) {
  if (!tensor) return {};
  return {reinterpret_cast<T*>(tensor->bytes()), strides.outer, strides.channel};
}

// x as Python gives it: a tensor, or a tuple of contiguous ones that would be x if they were concatenated along the
// channels.
class Source {
 public:
  // Nothing if it cannot be used, or its pieces do not fit together.
  static std::optional<Source> read(py::handle object) {
    Source source;
    source.is_whole_ = !PyTuple_Check(object.ptr());
    const auto add = [&](py::handle piece) {
      const std::optional<Tensor> tensor = floating(piece);
      if (tensor) source.pieces_.push_back(*tensor);
      return tensor.has_value();
    };
    if (source.is_whole_) return add(object) ? std::optional(std::move(source)) : std::nullopt;
    for (const py::handle piece : py::reinterpret_borrow<py::tuple>(object))
      if (!add(piece)) return std::nullopt;
    return source.concatenate() ? std::optional(std::move(source)) : std::nullopt;
  }

  bool is_whole() const { return is_whole_; }

  // While this is there. A concatenation has its shape, type and strides, and the data of its first piece only.
  Tensor whole() {
    Tensor x = pieces_.front();
    if (!is_whole_) x.shape = shape_.data(), x.strides = strides_.data();
    return x;
  }

  template <class T>
  Pieces<const T> operands(const Problem& problem) const {
    if (is_whole_) return operand<const T>(&pieces_.front(), problem.x);
    return side_by_side<const T>(pieces_, problem);
  }

  // New tensors for a result in x's pieces.
  std::vector<NewTensor> new_tensors(const Problem& problem) const {
    std::vector<NewTensor> result;
    for (const Tensor& piece : pieces_)
      result.push_back(new_like(piece, is_whole_ ? problem.target : contiguous_strides(piece)));
    return result;
  }
  template <class T>
  Pieces<T> operands(const std::vector<NewTensor>& tensors, const Problem& problem) const {
    if (is_whole_) return operand<T>(&tensors.front().view, problem.others);
    std::vector<Tensor> views;
    for (const NewTensor& tensor : tensors) views.push_back(tensor.view);
    return side_by_side<T>(views, problem);
  }

 private:
  // Sets shape and strides of the whole.
  bool concatenate() {
    if (pieces_.empty()) return false;
    Tensor x = pieces_.front();
    if (x.ndim < 3 || x.ndim > kMaxAxes) return false;
    std::copy(x.shape, x.shape + x.ndim, shape_.begin());
    shape_[1] = 0;
    for (const Tensor& piece : pieces_) {
      const bool fits = piece.type == x.type && piece.ndim == x.ndim && piece.shape[0] == x.shape[0] &&
                        std::equal(piece.shape + 2, piece.shape + x.ndim, x.shape + 2);
      if (!fits || piece.numel() == 0 || !piece.has_strides(contiguous_strides(piece).data())) return false;
      shape_[1] += piece.shape[1];
    }
    x.shape = shape_.data();
    strides_ = contiguous_strides(x);
    return x.numel() > x.size(0) * x.size(1);  // planes of one value would be rows, which are not in pieces
  }

  template <class T>
  static Pieces<T> side_by_side(const std::vector<Tensor>& tensors, const Problem& problem) {
    std::vector<Piece<T>> pieces;
    std::size_t first = 0;
    for (const Tensor& tensor : tensors) {
      const auto inner = static_cast<std::ptrdiff_t>(problem.extents.inner);
      const std::size_t channels = tensor.size(1);
      const Strides strides{static_cast<std::ptrdiff_t>(channels) * inner, inner};
      pieces.push_back({first, channels, operand<T>(&tensor, strides)});
      first += channels;
    }
    return Pieces<T>(std::move(pieces));
  }

  bool is_whole_ = true;
  std::vector<Tensor> pieces_;
  Axes shape_{}, strides_{};
};

// ---- per-channel values

// float32 or float64, of x's number of channels. None is an absent one; nothing is one that cannot be used.
std::optional<Parameter> parameter(py::handle object, std::size_t channels) {
  if (object.is_none()) return Parameter{};
  const std::optional<Tensor> tensor = floating(object);
  if (!tensor || tensor->ndim != 1 || tensor->size(0) != channels) return std::nullopt;
  const bool is_double = tensor->type == DType::float64;
  if (!is_double && tensor->type != DType::float32) return std::nullopt;
  return Parameter{tensor->bytes(), static_cast<std::ptrdiff_t>(tensor->strides[0]) * (is_double ? 8 : 4), is_double};
}

RunningStatistic running(const Parameter& p) {
  return {const_cast<char*>(p.data), p.byte_stride, p.is_double};
}

// What a backward pass needs besides tensors: mean and invstd, and the affine map that was applied, float64 (5, C).
using SavedArray = py::array_t<double>;

template <class T>
SavedArray saved(const Normalization<T>& n, std::size_t channels) {
  SavedArray array({static_cast<py::ssize_t>(kStatisticsRows + kAffineRows), static_cast<py::ssize_t>(channels)});
  double* to = std::copy_n(n.mean, kStatisticsRows * channels, array.mutable_data());
  std::copy_n(n.center, kAffineRows * channels, to);  // floats are doubles, too
  return array;
}

template <class T>
OwnNormalization<T> restored(const SavedArray& array, std::size_t channels) {
  require(array.ndim() == 2 && array.shape(0) == kStatisticsRows + kAffineRows &&
              static_cast<std::size_t>(array.shape(1)) == channels && (array.flags() & py::array::c_style),
          "saved statistics of another shape");
  OwnNormalization<T> own(channels);
  const Normalization<T> n = own.view();
  const double* affine = array.data() + kStatisticsRows * channels;
  std::copy(array.data(), affine, n.mean);
  std::transform(affine, affine + kAffineRows * channels, n.center,
                 [](double v) { return static_cast<Arithmetic<T>>(v); });
  return own;
}

template <class T>
Fusion<T> fusion(const Problem& problem, ActivationArguments activation, const Tensor* residual, const Tensor* mask) {
  require(activation.first >= 0 && activation.first < static_cast<int>(std::size(kActivationNames)),
          "an unknown activation");
  Fusion<T> result{
      static_cast<Activation>(activation.first), activation.second, operand<const T>(residual, problem.others), {}};
  if (mask) {
    const auto [plane, outer] = mask_strides(problem.extents);
    require(mask->dtype.bits == 8 && mask->ndim == 1 && mask->size(0) == problem.extents.outer * outer &&
                (mask->size(0) == 1 || mask->strides[0] == 1),
            "a mask of another layout");
    result.mask = {reinterpret_cast<std::uint8_t*>(mask->bytes()), static_cast<std::ptrdiff_t>(outer),
                   static_cast<std::ptrdiff_t>(plane)};
  }
  return result;
}

// A tensor that may be absent: nothing is one that cannot be used.
template <class Read>
bool read_optional(py::handle object, std::optional<Tensor>& tensor, const Read& read) {
  if (object.is_none()) return true;
  tensor = read(object);
  return tensor.has_value();
}

const Tensor* pointer(const std::optional<Tensor>& tensor) {
  return tensor ? &*tensor : nullptr;
}

// ---- the operations

// Training or evaluation: y, and, if it `keeps` what a backward pass needs, the saved array and a mask or None.
std::optional<std::tuple<py::object, py::object, py::object>> forward(py::handle x_object, py::handle weight,
                                                                      py::handle bias, py::handle running_mean,
                                                                      py::handle running_var, py::handle counter_object,
                                                                      py::handle residual_object, bool training,
                                                                      double momentum, double eps,
                                                                      ActivationArguments activation, bool keeps) {
  std::optional<Source> source = Source::read(x_object);
  if (!source) return std::nullopt;
  const Tensor x = source->whole();
  const std::optional<Problem> found = problem_of(x);
  if (!found) return std::nullopt;
  const Problem& problem = *found;
  const Extents& extents = problem.extents;
  const std::size_t channels = extents.channels;
  const auto w = parameter(weight, channels), b = parameter(bias, channels);
  const auto mean = parameter(running_mean, channels), var = parameter(running_var, channels);
  if (!w || !b || !mean || !var || bool(*mean) != bool(*var)) return std::nullopt;
  if (!(eps > 0 && std::isfinite(eps))) return std::nullopt;
  if (training ? extents.per_channel() == 1 : !*mean) return std::nullopt;
  std::optional<Tensor> residual, counter;
  if (!read_optional(residual_object, residual, floating) || !read_optional(counter_object, counter, view))
    return std::nullopt;
  if (residual && !fits(x, *residual, problem)) return std::nullopt;
  if (counter && (counter->ndim != 0 || counter->dtype.code != dlpack::kInt || counter->dtype.bits != 64))
    return std::nullopt;

  const TorchThreads threads;
  NewTensor y = new_like(x, problem.target);
  std::optional<NewTensor> mask;
  if (keeps && residual && has_mask(static_cast<Activation>(activation.first)))
    mask = new_vector(kByte, extents.outer * mask_strides(extents).second);

  return with_dtype(x.type, [&](auto zero) {
    using T = decltype(zero);
    const OwnNormalization<T> normalization(channels);
    const Normalization<T> n = normalization.view();
    const Fusion<T> f = fusion<T>(problem, activation, pointer(residual), mask ? &mask->view : nullptr);
    const auto input = source->operands<T>(problem);
    const auto output = operand<T>(&y.view, problem.others);
    if (training) {
      std::vector<double> batch_var(channels);
      compute([&] { batch_norm_forward<T>(extents, input, output, *w, *b, eps, f, batch_var.data(), n); });
      // Committed last and together, so that an error or an interrupt leaves all of them as they were.
      if (PyErr_CheckSignals() != 0) throw py::error_already_set();
      if (counter) ++*reinterpret_cast<std::int64_t*>(counter->bytes());
      if (*mean && momentum != 0) {
        const double count = static_cast<double>(extents.per_channel());
        running(*mean).update(channels, n.mean, 1, momentum);
        running(*var).update(channels, batch_var.data(), count / (count - 1), momentum);
      }
    } else {
      normalize_with(*mean, *var, *w, *b, eps, channels, n);
      compute([&] { batch_norm_elemt<T>(extents, input, output, n, f); });
    }
    py::object kept = keeps ? py::object(saved(n, channels)) : py::none();
    return std::optional(std::make_tuple(std::move(y.object), std::move(kept), mask ? mask->object : py::none()));
  });
}

// The gradient of a parameter from the float64 sums, times `factors` if there are any; beyond float32 it is infinite.
py::object parameter_gradient(const double* sums, const double* factors, std::size_t channels, bool is_double) {
  NewTensor gradient = new_vector({dlpack::kFloat, static_cast<std::uint8_t>(is_double ? 64 : 32), 1}, channels);
  const auto fill = [&](auto* to) {
    for (std::size_t c = 0; c < channels; ++c)
      to[c] = static_cast<std::decay_t<decltype(*to)>>(factors ? sums[c] * factors[c] : sums[c]);
  };
  is_double ? fill(reinterpret_cast<double*>(gradient.view.bytes()))
            : fill(reinterpret_cast<float*>(gradient.view.bytes()));
  return std::move(gradient.object);
}

// The tensor, or a tuple of those that are in pieces.
py::object objects_of(std::vector<NewTensor>& tensors, bool is_whole) {
  if (is_whole) return std::move(tensors.front().object);
  py::tuple objects(tensors.size());
  for (std::size_t i = 0; i < tensors.size(); ++i) objects[i] = std::move(tensors[i].object);
  return std::move(objects);
}

// dx, dweight, dbias and dresidual, each None if it is not wanted: the parameters are given if their gradients are.
std::optional<std::tuple<py::object, py::object, py::object, py::object>> backward(
    py::handle dy_object, py::handle x_object, py::handle residual_object, py::handle mask_object,
    const SavedArray& saved, py::handle weight, py::handle bias, bool training, ActivationArguments activation,
    bool wants_dx, bool wants_dresidual) {
  std::optional<Source> source = Source::read(x_object);
  const std::optional<Tensor> dy = floating(dy_object);
  if (!source || !dy) return std::nullopt;
  const Tensor x = source->whole();
  const std::optional<Problem> found = problem_of(x);
  if (!found || !fits(x, *dy, *found)) return std::nullopt;
  const Problem& problem = *found;
  const Extents& extents = problem.extents;
  const std::size_t channels = extents.channels;
  const auto w = parameter(weight, channels), b = parameter(bias, channels);
  if (!w || !b) return std::nullopt;
  std::optional<Tensor> residual, mask;
  if (!read_optional(residual_object, residual, floating) || !read_optional(mask_object, mask, view))
    return std::nullopt;
  if (residual && !fits(x, *residual, problem)) return std::nullopt;
  require(!wants_dresidual || residual || mask, "a residual's gradient without a residual or a mask");

  const TorchThreads threads;
  std::vector<NewTensor> dx;
  std::optional<NewTensor> dresidual;
  if (wants_dx || wants_dresidual) dx = source->new_tensors(problem);  // the kernels write both
  if (wants_dresidual) dresidual = new_like(x, problem.target);
  const bool wants_sums = *w || *b;
  std::vector<double> sums(2 * channels);
  return with_dtype(x.type, [&](auto zero) {
    using T = decltype(zero);
    const OwnNormalization<T> normalization = restored<T>(saved, channels);
    const Normalization<T> n = normalization.view();
    const Fusion<T> f = fusion<T>(problem, activation, pointer(residual), pointer(mask));
    const auto gradient = operand<const T>(&*dy, problem.others);
    const auto input = source->operands<T>(problem);
    double *sum_dy = sums.data(), *sum_dy_xmu = sum_dy + channels;
    if (!dx.empty()) {
      const GradientOperands<T> operands{gradient, input, source->operands<T>(dx, problem),
                                         operand<T>(dresidual ? &dresidual->view : nullptr, problem.others)};
      if (training || wants_sums)
        compute([&] { batch_norm_backward<T>(extents, operands, n, f, training, sum_dy, sum_dy_xmu); });
      else
        compute([&] { batch_norm_backward_elemt<T>(extents, operands, n, f, nullptr); });
    } else if (wants_sums) {
      compute([&] { batch_norm_backward_reduce<T>(extents, gradient, input, n, f, sum_dy, sum_dy_xmu); });
    }
    return std::optional(
        std::make_tuple(wants_dx ? objects_of(dx, source->is_whole()) : py::none(),
                        *w ? parameter_gradient(sum_dy_xmu, n.invstd, channels, w->is_double) : py::none(),
                        *b ? parameter_gradient(sum_dy, nullptr, channels, b->is_double) : py::none(),
                        wants_dresidual ? std::move(dresidual->object) : py::none()));
  });
}

// An uninitialized tensor like x, as an operation's result would be.
std::optional<py::object> empty_like(py::handle x_object) {
  const std::optional<Tensor> x = floating(x_object);
  const std::optional<Problem> problem = x ? problem_of(*x) : std::nullopt;
  if (!problem) return std::nullopt;
  return new_like(*x, problem->target).object;
}

}  // namespace

void register_torch(py::module_& m) {
  using namespace py::literals;
  m.def("connect_torch", &connect_torch, "exchange_api"_a, "tensor_type"_a, "parameter_type"_a, "get_num_threads"_a);
  m.def("torch_forward", &forward, "x"_a, "weight"_a, "bias"_a, "running_mean"_a, "running_var"_a, "counter"_a,
        "residual"_a, "training"_a, "momentum"_a, "eps"_a, "activation"_a, "keeps"_a);
  m.def("torch_backward", &backward, "dy"_a, "x"_a, "residual"_a, "mask"_a, "saved"_a, "weight"_a, "bias"_a,
        "training"_a, "activation"_a, "wants_dx"_a, "wants_dresidual"_a);
  m.def("torch_empty_like", &empty_like, "x"_a);
}

}  // namespace pybn
