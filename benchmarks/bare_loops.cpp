// What training forward and backward cost at least on this machine, with float64 sums: bare loops over NCHW float32,
// two threads, without a library around them, in copies of the tensor as `pybn bench` gives them.
//
//     g++ -O3 -march=native -fopenmp benchmarks/bare_loops.cpp -o bare_loops && ./bare_loops
//
// Every channel is reduced and then applied by one thread, several neighbouring channels at a time: of 4, 16 and 64 the
// number that is fastest on the shape. Statistics are neither checked nor shifted nor merged over segments, nothing is
// returned, and the last vector of a plane overlaps the one before it: sums are not right, but as many. Last, the sums
// alone are timed on one thread, out of L1. Needs GCC or Clang.
#include <omp.h>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

namespace {

constexpr int kThreads = 2, kRounds = 41, kUnroll = 4;
constexpr std::size_t kFloats = 8;

typedef float Floats __attribute__((vector_size(4 * kFloats), aligned(4)));
typedef double Doubles __attribute__((vector_size(8 * kFloats)));

struct Shape {
  std::size_t n, c, plane;
  std::size_t size() const { return n * c * plane; }
};

struct Pair {
  Doubles first{}, second{};
};
struct Sums {
  Pair pairs[kUnroll];
};

const Floats& floats(const float* at) {
  return *reinterpret_cast<const Floats*>(at);
}

// GCC 12 would convert eight floats in two halves, which takes twice as long as one instruction from memory does.
inline Doubles doubles(const float* at) {
#if defined(__AVX512F__)
  asm("" : "+r"(at));  // loaded once more for another use, it would come from a register
  return (Doubles)_mm512_cvtps_pd(_mm256_loadu_ps(at));
#else
  return __builtin_convertvector(floats(at), Doubles);
#endif
}

// Calls step(i) for every vector of a plane; the last one overlaps the one before.
template <class Step>
inline void for_each_vector(std::size_t plane, Step step) {
  std::size_t i = 0;
  for (; i + kUnroll * kFloats <= plane; i += kUnroll * kFloats)
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u) step(i + u * kFloats);
  for (; i + kFloats <= plane; i += kFloats) step(i);
  if (i < plane) step(plane - kFloats);
}

// Keeps the compiler from computing what comes after with `v` before `done`.
inline void in_this_order([[maybe_unused]] Doubles& v, [[maybe_unused]] const Doubles& done) {
#if defined(__AVX512F__)
  asm("" : "+v"(v) : "v"(done));
#endif
}

// Calls step(i, pair) for every vector of a plane, as for_each_vector does, with sums that stay in registers.
template <class Step>
inline void add_up(std::size_t plane, Sums& out, Step step) {
  Pair a = out.pairs[0], b = out.pairs[1], c = out.pairs[2], d = out.pairs[3];
  std::size_t i = 0;
  for (; i + kUnroll * kFloats <= plane; i += kUnroll * kFloats) {
    step(i, a);
    step(i + kFloats, b);
    step(i + 2 * kFloats, c);
    step(i + 3 * kFloats, d);
  }
  for (; i + kFloats <= plane; i += kFloats) step(i, a);
  if (i < plane) step(plane - kFloats, b);
  out.pairs[0] = a, out.pairs[1] = b, out.pairs[2] = c, out.pairs[3] = d;
}

template <bool kAddsFirst = true>
void add_values(const float* x, std::size_t plane, Sums& out) {
  add_up(plane, out, [&](std::size_t i, Pair& sums) {
    Doubles v = doubles(x + i);
    if (kAddsFirst) {
      sums.first += v;
      in_this_order(v, sums.first);
      sums.second += v * v;
    } else {
      sums.second += v * v;
      in_this_order(v, sums.second);
      sums.first += v;
    }
  });
}

void add_gradients(const float* dy, const float* x, double mean, std::size_t plane, Sums& out) {
  add_up(plane, out, [&](std::size_t i, Pair& sums) {
    const Doubles d = doubles(dy + i);
    sums.first += d;
    sums.second += (doubles(x + i) - mean) * d;
  });
}

// One number that depends on all sums, so that none can be left out.
float total(const Sums& s) {
  Doubles all{};
  for (const Pair& pair : s.pairs) all += pair.first + pair.second;
  double sum = 0;
  for (std::size_t i = 0; i < kFloats; ++i) sum += all[i];
  return static_cast<float>(sum);
}

// Calls reduce(offset, sums) for all planes of a group of channels, then apply(offset, number) for the same, last
// first.
template <class Reduce, class Apply>
void pass(const Shape& shape, std::size_t group, Reduce reduce, Apply apply) {
  const auto offset = [&](std::size_t n, std::size_t c) { return (n * shape.c + c) * shape.plane; };
#pragma omp parallel for num_threads(kThreads) schedule(static)
  for (std::size_t first = 0; first < shape.c; first += group) {
    std::vector<Sums> sums(group);
    for (std::size_t n = 0; n < shape.n; ++n)
      for (std::size_t c = 0; c < group; ++c) reduce(offset(n, first + c), sums[c]);
    std::vector<float> numbers(group);
    for (std::size_t c = 0; c < group; ++c) numbers[c] = total(sums[c]);
    for (std::size_t n = shape.n; n-- > 0;)
      for (std::size_t c = 0; c < group; ++c) apply(offset(n, first + c), numbers[c]);
  }
}

void copy(const float* from, float* to, std::size_t size) {
#pragma omp parallel num_threads(kThreads)
  {
    const std::size_t share = size / kThreads, begin = share * static_cast<std::size_t>(omp_get_thread_num());
    std::memcpy(to + begin, from + begin, share * sizeof(float));
  }
}

// 16 bytes off a cache line, as NumPy's large arrays lie.
float* new_array(std::size_t size) {
  auto* memory = static_cast<char*>(std::aligned_alloc(4096, (size * sizeof(float) / 4096 + 2) * 4096));
  auto* array = reinterpret_cast<float*>(memory + 16);
  for (std::size_t i = 0; i < size; ++i) array[i] = static_cast<float>(i % 7) - 3;
  return array;
}

template <class F>
double seconds(F f) {
  const auto start = std::chrono::steady_clock::now();
  f();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

double median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + values.size() / 2, values.end());
  return values[values.size() / 2];
}

// Forward and backward in copies, timed in turns with a copy, each after a copy of its input to elsewhere.
struct Result {
  double copy_us, forward, backward;
};
Result measure(const Shape& shape) {
  const std::size_t size = shape.size();
  float *x = new_array(size), *dy = new_array(size), *y = new_array(size), *elsewhere = new_array(size);
  Result best{0, std::numeric_limits<double>::infinity(), std::numeric_limits<double>::infinity()};
  for (const std::size_t group : {4, 16, 64}) {
    if (group * 2 * kThreads > shape.c) continue;
    const auto forward = [&] {
      pass(
          shape, group, [&](std::size_t at, Sums& sums) { add_values<>(x + at, shape.plane, sums); },
          [&](std::size_t at, float shift) {
            for_each_vector(shape.plane, [&](std::size_t i) {
              *reinterpret_cast<Floats*>(y + at + i) = (floats(x + at + i) - shift) * 2.f + 1.f;
            });
          });
    };
    const auto backward = [&] {
      pass(
          shape, group, [&](std::size_t at, Sums& sums) { add_gradients(dy + at, x + at, 0.5, shape.plane, sums); },
          [&](std::size_t at, float slope) {
            for_each_vector(shape.plane, [&](std::size_t i) {
              *reinterpret_cast<Floats*>(y + at + i) =
                  (floats(x + at + i) - .5f) * slope + (floats(dy + at + i) * 2.f + 1.f);
            });
          });
    };
    std::vector<double> copies, forwards, backwards;
    for (int round = 0; round < kRounds; ++round) {
      const auto timed = [&](const float* input, auto call) {
        copy(input, elsewhere, size);
        const double unit = seconds([&] { copy(input, y, size); });
        copies.push_back(unit);
        copy(input, elsewhere, size);
        return seconds(call) / unit;
      };
      forwards.push_back(timed(x, forward));
      backwards.push_back(timed(dy, backward));
    }
    best = {median(copies) * 1e6, std::min(best.forward, median(forwards)), std::min(best.backward, median(backwards))};
  }
  for (float* array : {x, dy, y, elsewhere}) std::free(reinterpret_cast<char*>(array) - 16);
  return best;
}

void print_means(const char* name, const std::vector<Shape>& shapes) {
  double forward = 0, backward = 0;
  for (const Shape& shape : shapes) {
    const Result r = measure(shape);
    std::printf("%3zux%zu, planes of %4zu: copy %5.0f us, forward %.2f, backward %.2f copies\n", shape.n, shape.c,
                shape.plane, r.copy_us, r.forward, r.backward);
    std::fflush(stdout);
    forward += std::log(r.forward) / static_cast<double>(shapes.size());
    backward += std::log(r.backward) / static_cast<double>(shapes.size());
  }
  std::printf("%s, geometric means: forward %.2f, backward %.2f copies\n", name, std::exp(forward), std::exp(backward));
}

// Values per nanosecond that reduce(x, dy, size, sums) takes out of L1, on one thread, at best.
template <class Reduce>
double rate(Reduce reduce) {
  constexpr std::size_t kSize = 3072, kRepeats = 1000;
  float* x = new_array(2 * kSize);
  Sums sums;
  double best = std::numeric_limits<double>::infinity();
  for (int round = 0; round < kRounds; ++round)
    best = std::min(best, seconds([&] {
                      for (std::size_t repeat = 0; repeat < kRepeats; ++repeat) reduce(x, x + kSize, kSize, sums);
                    }));
  volatile float result = total(sums);
  static_cast<void>(result);
  std::free(reinterpret_cast<char*>(x) - 16);
  return kSize * kRepeats / best * 1e-9;
}

}  // namespace

int main() {
  print_means("fits L2", {{32, 64, 56 * 56},
                          {32, 256, 56 * 56},
                          {32, 128, 28 * 28},
                          {32, 512, 28 * 28},
                          {32, 256, 14 * 14},
                          {32, 1024, 14 * 14}});
  print_means("7x7 planes", {{32, 512, 7 * 7}, {32, 2048, 7 * 7}});
  std::printf(
      "out of L1, values per ns: statistics %.1f, with the multiply-add first %.1f, sums of backward %.1f\n",
      rate([](const float* x, const float*, std::size_t size, Sums& s) { add_values<true>(x, size, s); }),
      rate([](const float* x, const float*, std::size_t size, Sums& s) { add_values<false>(x, size, s); }),
      rate([](const float* x, const float* dy, std::size_t size, Sums& s) { add_gradients(dy, x, 0.5, size, s); }));
}
