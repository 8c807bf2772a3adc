// The vector type the leaf loops are written in.
//
// GCC and Clang vector extensions give arithmetic, comparison and selection for every target; what they lack (fused
// multiply-add, loads and stores of the first n lanes) is a few overloads per instruction set below. This file is
// compiled once per instruction set, so it includes nothing but fixed-width integers and intrinsics, and everything in
// it has internal linkage: an inline function shared between two sets could be merged by the linker into its AVX-512
// copy and crash an older CPU.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define PYBN_INLINE inline __attribute__((always_inline))

// Needed where a lambda only prefetches: GCC takes such a function for one without effect and drops calls that are not
// inlined at once.
#define PYBN_INLINE_LAMBDA __attribute__((always_inline))

namespace pybn {
namespace {

template <class T, int N>
struct VectorOf {
  typedef T type __attribute__((vector_size(N * sizeof(T))));
};
template <class T, int N>
using Vec = typename VectorOf<T, N>::type;

// Doubles per step of a reduction, bytes per step of an application. AVX-512 applies 32 bytes at a time: NumPy's large
// arrays lie 16 bytes off a cache line, so every 64-byte access would touch two lines (measured 7 to 25 % slower). The
// baseline takes two registers for four doubles, so that four floats fill one.
#if defined(__AVX512F__)
constexpr int kDoubles = 8;
constexpr int kApplicationBytes = 32;
#elif defined(__AVX2__)
constexpr int kDoubles = 4;
constexpr int kApplicationBytes = 32;
#else
constexpr int kDoubles = 4;
constexpr int kApplicationBytes = 16;
#endif
template <class T>
constexpr int kLanes = kApplicationBytes / sizeof(T);

using Doubles = Vec<double, kDoubles>;

template <int N, class T>
PYBN_INLINE Vec<T, N> broadcast(T value) {
  return value - Vec<T, N>{};  // not "+": -0.0 + 0.0 would lose the sign
}

// Not __builtin_convertvector where a register's worth is converted: GCC 12 does that in halves and joins them.
PYBN_INLINE Doubles widen(Doubles v) {
  return v;
}
PYBN_INLINE Doubles widen(Vec<float, kDoubles> v) {
#if defined(__AVX512F__)
  return (Doubles)_mm512_cvtps_pd((__m256)v);
#elif defined(__AVX2__)
  return (Doubles)_mm256_cvtps_pd((__m128)v);
#else
  return __builtin_convertvector(v, Doubles);
#endif
}

// Loads and stores of the first `count` lanes, 0 < count < N; the lanes beyond are `fill` and their memory is not
// touched.
template <int N, class T>
struct Partial {
  static PYBN_INLINE Vec<T, N> load(const T* from, std::size_t count, Vec<T, N> fill) {
    T lanes[N];
    __builtin_memcpy(lanes, &fill, sizeof lanes);
    for (std::size_t i = 0; i < count; ++i) lanes[i] = from[i];
    Vec<T, N> v;
    __builtin_memcpy(&v, lanes, sizeof v);
    return v;
  }
  static PYBN_INLINE void store(T* to, std::size_t count, Vec<T, N> v) {
    T lanes[N];
    __builtin_memcpy(lanes, &v, sizeof lanes);
    for (std::size_t i = 0; i < count; ++i) to[i] = lanes[i];
  }
};

template <class V>
PYBN_INLINE V fma(V a, V b, V c) {
  return a * b + c;  // a set without the instruction; -ffp-contract=off keeps it two roundings everywhere
}

#if defined(__AVX512F__)

PYBN_INLINE __mmask8 first_lanes(std::size_t count) {
  return static_cast<__mmask8>((1u << count) - 1u);
}

template <>
struct Partial<8, float> {
  static PYBN_INLINE Vec<float, 8> load(const float* from, std::size_t count, Vec<float, 8> fill) {
    return (Vec<float, 8>)_mm256_mask_loadu_ps((__m256)fill, first_lanes(count), from);
  }
  static PYBN_INLINE void store(float* to, std::size_t count, Vec<float, 8> v) {
    _mm256_mask_storeu_ps(to, first_lanes(count), (__m256)v);
  }
};
template <>
struct Partial<4, double> {
  static PYBN_INLINE Vec<double, 4> load(const double* from, std::size_t count, Vec<double, 4> fill) {
    return (Vec<double, 4>)_mm256_mask_loadu_pd((__m256d)fill, first_lanes(count), from);
  }
  static PYBN_INLINE void store(double* to, std::size_t count, Vec<double, 4> v) {
    _mm256_mask_storeu_pd(to, first_lanes(count), (__m256d)v);
  }
};
template <>
struct Partial<8, double> {
  static PYBN_INLINE Vec<double, 8> load(const double* from, std::size_t count, Vec<double, 8> fill) {
    return (Vec<double, 8>)_mm512_mask_loadu_pd((__m512d)fill, first_lanes(count), from);
  }
  static PYBN_INLINE void store(double* to, std::size_t count, Vec<double, 8> v) {
    _mm512_mask_storeu_pd(to, first_lanes(count), (__m512d)v);
  }
};

PYBN_INLINE Vec<double, 8> fma(Vec<double, 8> a, Vec<double, 8> b, Vec<double, 8> c) {
  return (Vec<double, 8>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
}

#elif defined(__AVX2__)

// A mask of `count` set lanes is read from the middle of this table.
alignas(64) constexpr std::int32_t kMask32[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};

PYBN_INLINE __m256i first_lanes_256(std::size_t count) {
  return _mm256_loadu_si256((const __m256i*)(kMask32 + 8 - count));
}

template <>
struct Partial<8, float> {
  static PYBN_INLINE Vec<float, 8> load(const float* from, std::size_t count, Vec<float, 8> fill) {
    const __m256i mask = first_lanes_256(count);
    return (Vec<float, 8>)_mm256_blendv_ps((__m256)fill, _mm256_maskload_ps(from, mask), (__m256)mask);
  }
  static PYBN_INLINE void store(float* to, std::size_t count, Vec<float, 8> v) {
    _mm256_maskstore_ps(to, first_lanes_256(count), (__m256)v);
  }
};
template <>
struct Partial<4, float> {
  static PYBN_INLINE Vec<float, 4> load(const float* from, std::size_t count, Vec<float, 4> fill) {
    const __m128i mask = _mm_loadu_si128((const __m128i*)(kMask32 + 8 - count));
    return (Vec<float, 4>)_mm_blendv_ps((__m128)fill, _mm_maskload_ps(from, mask), (__m128)mask);
  }
};
template <>
struct Partial<4, double> {
  static PYBN_INLINE Vec<double, 4> load(const double* from, std::size_t count, Vec<double, 4> fill) {
    const __m256i mask = first_lanes_256(2 * count);
    return (Vec<double, 4>)_mm256_blendv_pd((__m256d)fill, _mm256_maskload_pd(from, mask), (__m256d)mask);
  }
  static PYBN_INLINE void store(double* to, std::size_t count, Vec<double, 4> v) {
    _mm256_maskstore_pd(to, first_lanes_256(2 * count), (__m256d)v);
  }
};

#elif defined(__aarch64__)

PYBN_INLINE Vec<float, 4> fma(Vec<float, 4> a, Vec<float, 4> b, Vec<float, 4> c) {
  return (Vec<float, 4>)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
PYBN_INLINE Vec<double, 2> fma(Vec<double, 2> a, Vec<double, 2> b, Vec<double, 2> c) {
  return (Vec<double, 2>)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
}
PYBN_INLINE Vec<double, 4> fma(Vec<double, 4> a, Vec<double, 4> b, Vec<double, 4> c) {
  Vec<double, 4> r;
  for (int i = 0; i < 4; ++i) r[i] = __builtin_fma(a[i], b[i], c[i]);
  return r;
}

#endif

#if defined(__AVX2__)
PYBN_INLINE Vec<float, 8> fma(Vec<float, 8> a, Vec<float, 8> b, Vec<float, 8> c) {
  return (Vec<float, 8>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
PYBN_INLINE Vec<float, 4> fma(Vec<float, 4> a, Vec<float, 4> b, Vec<float, 4> c) {
  return (Vec<float, 4>)_mm_fmadd_ps((__m128)a, (__m128)b, (__m128)c);
}
PYBN_INLINE Vec<double, 4> fma(Vec<double, 4> a, Vec<double, 4> b, Vec<double, 4> c) {
  return (Vec<double, 4>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
}
#endif

// How much of a vector a step touches. Loops are written once over this and called with Whole, then with First for the
// tail.
struct Whole {
  template <int N, class T>
  PYBN_INLINE Vec<T, N> load(const T* from, Vec<T, N> = Vec<T, N>{}) const {
    Vec<T, N> v;
    __builtin_memcpy(&v, from, sizeof v);
    return v;
  }
  template <int N, class T>
  PYBN_INLINE void store(T* to, Vec<T, N> v) const {
    __builtin_memcpy(to, &v, sizeof v);
  }
};
struct First {
  std::size_t count;  // 0 < count < N

  template <int N, class T>
  PYBN_INLINE Vec<T, N> load(const T* from, Vec<T, N> beyond = Vec<T, N>{}) const {
    return Partial<N, T>::load(from, count, beyond);
  }
  template <int N, class T>
  PYBN_INLINE void store(T* to, Vec<T, N> v) const {
    Partial<N, T>::store(to, count, v);
  }
};

// The lanes' sum, always over the same tree.
PYBN_INLINE double sum_of_lanes(Doubles v) {
  double lanes[kDoubles];
  __builtin_memcpy(lanes, &v, sizeof lanes);
  for (int width = kDoubles / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

}  // namespace
}  // namespace pybn
