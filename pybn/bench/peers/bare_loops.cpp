// The least that a batch norm with float64 sums consists of: no checks, no shifts against cancellation, no running
// statistics, no masks, no order of sums that is the same for any number of threads, and none but the easiest shapes
// and types.
// `bare.py` compiles it for the machine that it runs on. Needs GCC or Clang.
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <vector>

namespace {

constexpr std::size_t kLanes = 8, kUnroll = 4, kRows = 4, kBlockRows = 256, kAhead = 512;

// What a thread reduces before it applies the result: little enough to be there still.
constexpr std::size_t kSlabBytes = 4 << 20, kMostChannels = 64;

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef float AnyFloats __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef double Doubles __attribute__((vector_size(8 * kLanes)));
typedef long long Mask __attribute__((vector_size(8 * kLanes)));

Floats floats(const float* at) {
  return *reinterpret_cast<const AnyFloats*>(at);
}
void store(float* at, Floats v) {
  *reinterpret_cast<AnyFloats*>(at) = v;
}

// GCC 12 would convert eight floats in two halves, which takes twice as long as one instruction from memory does.
Doubles doubles(const float* at) {
#if defined(__AVX512F__)
  asm("" : "+r"(at));  // loaded once more for another use, it would come from a register
  return (Doubles)_mm512_cvtps_pd(_mm256_loadu_ps(at));
#else
  return __builtin_convertvector(floats(at), Doubles);
#endif
}

// NCHW is outer x channels x inner; channels last are rows, with an inner extent of 1.
struct Tensor {
  std::size_t outer, channels, inner;
  int threads;
};

// z = (x - center) * scale + shift, and dx = (x - center) * slope + (dz * scale + offset).
template <class V>
struct Map {
  V center, scale, shift, slope, offset;
};

struct Maps : Map<std::vector<float>> {
  explicit Maps(std::size_t c) {
    for (std::vector<float>* values : {&center, &scale, &shift, &slope, &offset}) values->resize(c);
  }
  void set(std::size_t c, double mean, double var, double eps, float weight, float bias) {
    center[c] = static_cast<float>(mean);
    scale[c] = static_cast<float>(weight / std::sqrt(var + eps));
    shift[c] = bias;
  }
  // Of one channel in every lane, and of as many channels as there are lanes.
  Map<Floats> of_channel(std::size_t c) const {
    const Floats zero{};
    return {zero + center[c], zero + scale[c], zero + shift[c], zero + slope[c], zero + offset[c]};
  }
  Map<Floats> of_channels(std::size_t c) const {
    return {floats(&center[c]), floats(&scale[c]), floats(&shift[c]), floats(&slope[c]), floats(&offset[c])};
  }
};

Floats map(const Map<Floats>& m, const float* x) {
  return (floats(x) - m.center) * m.scale + m.shift;
}

// What follows the map: nothing, ReLU, or the sum with a residual and then ReLU.
enum class Fused { nothing, relu, add_relu };

struct ForwardOperands {
  const float *x, *residual;
  float* y;

  template <Fused kFused>
  void apply(const Map<Floats>& m, std::size_t at) const {
    Floats z = map(m, x + at);
    if (kFused == Fused::add_relu) z += floats(residual + at);
    if (kFused != Fused::nothing) z = z > 0 ? z : Floats{};
    store(y + at, z);
  }
};

struct Sums {
  Doubles first{}, second{};

  void add_value(Doubles x) {
    first += x;
    second += x * x;
  }
  void add_gradient(Doubles dz, Doubles x, Doubles mean) {
    first += dz;
    second += (x - mean) * dz;
  }
};

struct BackwardOperands {
  const float *dy, *x;
  float* dx;

  template <Fused kFused>
  Doubles wide_dz(const Map<Floats>& m, std::size_t at) const {
    if (kFused == Fused::nothing) return doubles(dy + at);
#if defined(__AVX512VL__)
    const __mmask8 passes = _mm256_cmp_ps_mask((__m256)map(m, x + at), _mm256_setzero_ps(), _CMP_GT_OQ);
    return (Doubles)_mm512_maskz_cvtps_pd(passes, _mm256_loadu_ps(dy + at));
#else
    return __builtin_convertvector(dz<kFused>(m, at), Doubles);
#endif
  }
  template <Fused kFused>
  Floats dz(const Map<Floats>& m, std::size_t at) const {
    if (kFused == Fused::nothing) return floats(dy + at);
    return map(m, x + at) > 0 ? floats(dy + at) : Floats{};
  }
  template <Fused kFused>
  void apply(const Map<Floats>& m, std::size_t at) const {
    store(dx + at, (floats(x + at) - m.center) * m.slope + (dz<kFused>(m, at) * m.scale + m.offset));
  }
};

double total(Doubles v) {
  double sum = 0;
  for (std::size_t i = 0; i < kLanes; ++i) sum += v[i];
  return sum;
}

struct PlaneSums {
  Sums part[kUnroll];
};

// Calls add(i, sums, keep) for every vector of a plane. The last one overlaps the one before, and keep() is 0 there.
template <class Add>
void reduce_plane(std::size_t inner, PlaneSums& out, Add add) {
  const auto all = [](Doubles v) { return v; };
  Sums a = out.part[0], b = out.part[1], c = out.part[2], d = out.part[3];  // an array would stay in memory
  std::size_t i = 0;
  for (; i + kUnroll * kLanes <= inner; i += kUnroll * kLanes) {
    add(i, a, all);
    add(i + kLanes, b, all);
    add(i + 2 * kLanes, c, all);
    add(i + 3 * kLanes, d, all);
  }
  for (; i + kLanes <= inner; i += kLanes) add(i, a, all);
  if (i < inner) {
    const auto rest = static_cast<long long>(inner - i), lanes = static_cast<long long>(kLanes);
    const Mask is_new = Mask{0, 1, 2, 3, 4, 5, 6, 7} >= lanes - rest;
    add(inner - kLanes, b, [&](Doubles v) { return (Doubles)((Mask)v & is_new); });
  }
  out.part[0] = a, out.part[1] = b, out.part[2] = c, out.part[3] = d;
}
template <class Apply>
void apply_plane(std::size_t inner, Apply apply) {
  std::size_t i = 0;
  for (; i + kUnroll * kLanes <= inner; i += kUnroll * kLanes)
#pragma GCC unroll 4
    for (std::size_t u = 0; u < kUnroll; ++u) apply(i + u * kLanes);
  for (; i + kLanes <= inner; i += kLanes) apply(i);
  if (i < inner) apply(inner - kLanes);
}

// reduce(at, c, sums) for all planes of some channels, conclude(c, first, second), apply(at, c), last planes first.
template <class Reduce, class Conclude, class Apply>
void pass_planes(const Tensor& t, std::size_t slabs, Reduce reduce, Conclude conclude, Apply apply) {
  const std::size_t fitting = kSlabBytes / (slabs * sizeof(float) * t.outer * t.inner);
  std::size_t group = kMostChannels;  // a power of two, so that threads have the same number of most shapes
  while (group > 1 && (group > fitting || group * 2 * static_cast<std::size_t>(t.threads) > t.channels)) group /= 2;
#pragma omp parallel for num_threads(t.threads) schedule(static)
  for (std::size_t first = 0; first < t.channels; first += group) {
    const std::size_t end = std::min(first + group, t.channels);
    std::vector<PlaneSums> sums(end - first);
    for (std::size_t o = 0; o < t.outer; ++o)
      for (std::size_t c = first; c < end; ++c) reduce((o * t.channels + c) * t.inner, c, sums[c - first]);
    for (std::size_t c = first; c < end; ++c) {
      Sums all;
      for (const Sums& s : sums[c - first].part) all.first += s.first, all.second += s.second;
      conclude(c, total(all.first), total(all.second));
    }
    for (std::size_t o = t.outer; o-- > 0;)
      for (std::size_t c = first; c < end; ++c) apply((o * t.channels + c) * t.inner, c);
  }
}

// Every thread has its share of the rows: add(at, c, sums) for a vector of channels of a row, conclude(c, first,
// second), apply(at, c) for the same vectors, last rows first.
template <class Add, class Conclude, class Apply>
void pass_rows(const Tensor& t, const std::vector<const float*>& read_ahead, Add add, Conclude conclude, Apply apply) {
  std::vector<std::vector<Sums>> of_threads(t.threads);
#pragma omp parallel num_threads(t.threads)
  {
    const auto thread = static_cast<std::size_t>(omp_get_thread_num());
    const std::size_t begin = t.outer * thread / t.threads, end = t.outer * (thread + 1) / t.threads;
    std::vector<Sums>& sums = of_threads[thread];
    sums.resize(t.channels / kLanes);
    std::size_t o = begin;
    for (; o + kRows <= end; o += kRows)  // together, to share loads and stores of the sums
      for (std::size_t c = 0; c < t.channels; c += kLanes) {
        // In the order of memory: an EPYC's own prefetching is misled by rows that are read in turns.
        for (const float* x : read_ahead)
          for (std::size_t line = 0; line < kRows * kLanes; line += 16)
            __builtin_prefetch(x + (o + kRows - 1) * t.channels + kAhead + kRows * c + line);
        Sums s = sums[c / kLanes];
#pragma GCC unroll 4
        for (std::size_t r = 0; r < kRows; ++r) add((o + r) * t.channels + c, c, s);
        sums[c / kLanes] = s;
      }
    for (; o < end; ++o)
      for (std::size_t c = 0; c < t.channels; c += kLanes) add(o * t.channels + c, c, sums[c / kLanes]);
#pragma omp barrier
#pragma omp for
    for (std::size_t c = 0; c < t.channels; c += kLanes) {
      Sums all;
      for (const std::vector<Sums>& s : of_threads)
        all.first += s[c / kLanes].first, all.second += s[c / kLanes].second;
      for (std::size_t i = 0; i < kLanes; ++i) conclude(c + i, all.first[i], all.second[i]);
    }
    // Last blocks first, because they may be in the cache still; rows of a block in order, as hardware foresees them.
    for (std::size_t last = end; last > begin; last = o) {
      o = last - begin > kBlockRows ? last - kBlockRows : begin;
      for (std::size_t row = o; row < last; ++row)
        for (std::size_t c = 0; c < t.channels; c += kLanes) apply(row * t.channels + c, c);
    }
  }
}

template <Fused kFused>
void infer(const Tensor& t, const ForwardOperands& operands, const Maps& maps) {
#pragma omp parallel for num_threads(t.threads) schedule(static)
  for (std::size_t o = 0; o < t.outer; ++o) {
    if (t.inner == 1) {
      for (std::size_t c = 0; c < t.channels; c += kLanes)
        operands.apply<kFused>(maps.of_channels(c), o * t.channels + c);
    } else {
      for (std::size_t c = 0; c < t.channels; ++c) {
        const Map<Floats> m = maps.of_channel(c);
        const std::size_t at = (o * t.channels + c) * t.inner;
        apply_plane(t.inner, [&](std::size_t i) { operands.apply<kFused>(m, at + i); });
      }
    }
  }
}

template <Fused kFused>
void forward(const Tensor& t, const ForwardOperands& operands, const float* weight, const float* bias, double eps) {
  Maps maps(t.channels);
  const float* x = operands.x;
  const double count = static_cast<double>(t.outer * t.inner);
  const auto conclude = [&](std::size_t c, double sum, double squares) {
    const double mean = sum / count;
    maps.set(c, mean, squares / count - mean * mean, eps, weight[c], bias[c]);
  };
  if (t.inner == 1) {
    pass_rows(
        t, {x}, [&](std::size_t at, std::size_t, Sums& s) { s.add_value(doubles(x + at)); }, conclude,
        [&](std::size_t at, std::size_t c) { operands.apply<kFused>(maps.of_channels(c), at); });
  } else {
    pass_planes(
        t, 1,
        [&](std::size_t at, std::size_t, PlaneSums& out) {
          reduce_plane(t.inner, out,
                       [&](std::size_t i, Sums& s, auto keep) { s.add_value(keep(doubles(x + at + i))); });
        },
        conclude,
        [&](std::size_t at, std::size_t c) {
          const Map<Floats> m = maps.of_channel(c);
          apply_plane(t.inner, [&](std::size_t i) { operands.apply<kFused>(m, at + i); });
        });
  }
}

struct Normalization {
  const double *mean, *var;
  const float *weight, *bias;
  double eps;
};

template <Fused kFused>
void backward(const Tensor& t, const BackwardOperands& operands, const Normalization& n, float* dweight, float* dbias) {
  Maps maps(t.channels);
  const double count = static_cast<double>(t.outer * t.inner);
  for (std::size_t c = 0; c < t.channels; ++c) maps.set(c, n.mean[c], n.var[c], n.eps, n.weight[c], n.bias[c]);
  const auto conclude = [&](std::size_t c, double sum_dz, double sum_dz_xmu) {
    const double invstd = 1 / std::sqrt(n.var[c] + n.eps);
    maps.slope[c] = static_cast<float>(-invstd * invstd * sum_dz_xmu / count) * maps.scale[c];
    maps.offset[c] = static_cast<float>(-sum_dz / count) * maps.scale[c];
    dweight[c] = static_cast<float>(sum_dz_xmu * invstd);
    dbias[c] = static_cast<float>(sum_dz);
  };
  if (t.inner == 1) {
    pass_rows(
        t, {operands.dy, operands.x},
        [&](std::size_t at, std::size_t c, Sums& s) {
          Doubles mean;
          __builtin_memcpy(&mean, n.mean + c, sizeof mean);
          s.add_gradient(operands.wide_dz<kFused>(maps.of_channels(c), at), doubles(operands.x + at), mean);
        },
        conclude, [&](std::size_t at, std::size_t c) { operands.apply<kFused>(maps.of_channels(c), at); });
  } else {
    pass_planes(
        t, 2,
        [&](std::size_t at, std::size_t c, PlaneSums& out) {
          const Map<Floats> m = maps.of_channel(c);
          const Doubles mean = Doubles{} + n.mean[c];
          reduce_plane(t.inner, out, [&](std::size_t i, Sums& s, auto keep) {
            s.add_gradient(keep(operands.wide_dz<kFused>(m, at + i)), doubles(operands.x + at + i), mean);
          });
        },
        conclude,
        [&](std::size_t at, std::size_t c) {
          const Map<Floats> m = maps.of_channel(c);
          apply_plane(t.inner, [&](std::size_t i) { operands.apply<kFused>(m, at + i); });
        });
  }
}

}  // namespace

extern "C" void bare_inference(const Tensor* t, const float* x, const float* residual, int relu, float* y,
                               const float* mean, const float* var, const float* weight, const float* bias,
                               double eps) {
  Maps maps(t->channels);
  for (std::size_t c = 0; c < t->channels; ++c) maps.set(c, mean[c], var[c], eps, weight[c], bias[c]);
  const auto function = residual ? infer<Fused::add_relu> : relu ? infer<Fused::relu> : infer<Fused::nothing>;
  function(*t, {x, residual, y}, maps);
}

extern "C" void bare_forward(const Tensor* t, const float* x, const float* residual, int relu, float* y,
                             const float* weight, const float* bias, double eps) {
  const auto function = residual ? forward<Fused::add_relu> : relu ? forward<Fused::relu> : forward<Fused::nothing>;
  function(*t, {x, residual, y}, weight, bias, eps);
}

extern "C" void bare_backward(const Tensor* t, const float* dy, const float* x, int relu, float* dx, const double* mean,
                              const double* var, const float* weight, const float* bias, double eps, float* dweight,
                              float* dbias) {
  const auto function = relu ? backward<Fused::relu> : backward<Fused::nothing>;
  function(*t, {dy, x, dx}, {mean, var, weight, bias, eps}, dweight, dbias);
}
