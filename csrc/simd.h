// The vector type the leaf loops are written in.
//
// GCC and Clang vector extensions give arithmetic, comparison and selection for every target; what they lack (fused
// multiply-add, conversions of half types, loads and stores of the first n lanes) is a few overloads per instruction
// set below. This file is compiled once per instruction set, so it includes nothing but fixed-width integers and
// intrinsics, and everything in it has internal linkage: an inline function shared between two sets could be merged by
// the linker into its AVX-512 copy and crash an older CPU.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "dtypes.h"

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

// The signed integer as wide as a lane: what comparisons give, -1 for true.
template <class A>
struct LaneInt;
template <>
struct LaneInt<float> {
  using type = std::int32_t;
};
template <>
struct LaneInt<double> {
  using type = std::int64_t;
};
template <class A, int N>
using Ints = Vec<typename LaneInt<A>::type, N>;

// Doubles per step of a reduction.
#if defined(__AVX512F__)
constexpr int kDoubles = 8;
#else
constexpr int kDoubles = 4;
#endif

// Values per step of an application, as many as fill a register with what they are computed with. AVX-512 could take 64
// bytes, but NumPy's large arrays lie 16 bytes off a cache line, so that every 64-byte access would touch two lines
// (measured 7 to 25 % slower). Half types fill such a register with 32 bytes of memory (0.6 of the time with 32 bytes).
#if defined(__AVX2__)
constexpr int kApplicationBytes = 32;
#else
constexpr int kApplicationBytes = 16;
#endif
template <class T>
#if defined(__AVX512F__)
constexpr int kLanes = kApplicationBytes / sizeof(T);
#else
constexpr int kLanes = kApplicationBytes / sizeof(Arithmetic<T>);
#endif

using Doubles = Vec<double, kDoubles>;

template <int N, class A>
PYBN_INLINE Vec<A, N> broadcast(A value) {
  return value - Vec<A, N>{};  // not "+": -0.0 + 0.0 would lose the sign
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

template <class V>
PYBN_INLINE V plain_nan(V v) {
  return v == v ? v : V{} + static_cast<decltype(v[0] + 0)>(__builtin_nan(""));
}

template <class A>
PYBN_INLINE Vec<A, kDoubles> narrow(Doubles v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4) return (Vec<float, 8>)_mm512_cvtpd_ps((__m512d)v);
#elif defined(__AVX2__)
  if constexpr (sizeof(A) == 4) return (Vec<float, 4>)_mm256_cvtpd_ps((__m256d)v);
#endif
  return __builtin_convertvector(v, Vec<A, kDoubles>);
}

PYBN_INLINE Doubles square_root(Doubles v) {
#if defined(__AVX512F__)
  return (Doubles)_mm512_sqrt_pd((__m512d)v);
#elif defined(__AVX2__)
  return (Doubles)_mm256_sqrt_pd((__m256d)v);
#else
  for (int i = 0; i < kDoubles; ++i) v[i] = __builtin_sqrt(v[i]);
  return v;
#endif
}

template <class V>
PYBN_INLINE V fma(V a, V b, V c) {
  return a * b + c;  // a set without the instruction; -ffp-contract=off keeps it two roundings everywhere
}

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
#if defined(__AVX512F__)
PYBN_INLINE Vec<float, 16> fma(Vec<float, 16> a, Vec<float, 16> b, Vec<float, 16> c) {
  return (Vec<float, 16>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
PYBN_INLINE Vec<double, 8> fma(Vec<double, 8> a, Vec<double, 8> b, Vec<double, 8> c) {
  return (Vec<double, 8>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
}
#endif
#if defined(__aarch64__)
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

// ---- half types: from 16 bits per lane to float and back, rounded to the nearest, ties to even

template <int N>
using Bits16 = Vec<std::uint16_t, N>;
template <int N>
using Bits32 = Vec<std::uint32_t, N>;

template <class V>
PYBN_INLINE auto zero_extend(V v) {
  return __builtin_convertvector(v, Bits32<sizeof(V) / 2>);
}
template <class V>
PYBN_INLINE auto low_halves(V v) {
  return __builtin_convertvector(v, Bits16<sizeof(V) / 4>);
}
#if defined(__AVX2__)  // GCC 12 takes several instructions for each of these
PYBN_INLINE Bits32<8> zero_extend(Bits16<8> v) {
  return (Bits32<8>)_mm256_cvtepu16_epi32((__m128i)v);
}
PYBN_INLINE Bits32<4> zero_extend(Bits16<4> v) {
  return (Bits32<4>)_mm_cvtepu16_epi32(_mm_cvtsi64_si128((long long)v));
}
PYBN_INLINE Bits16<8> low_halves(Bits32<8> v) {
#if defined(__AVX512VL__)
  return (Bits16<8>)_mm256_cvtepi32_epi16((__m256i)v);
#else
  const __m256i packed = _mm256_packus_epi32((__m256i)v, (__m256i)v);  // values are below 65536
  return (Bits16<8>)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
#endif
}
#endif

#if defined(__AVX512F__)
PYBN_INLINE Bits32<16> zero_extend(Bits16<16> v) {
  return (Bits32<16>)_mm512_cvtepu16_epi32((__m256i)v);
}
PYBN_INLINE Bits16<16> low_halves(Bits32<16> v) {
  return (Bits16<16>)_mm512_cvtepi32_epi16((__m512i)v);
}
#endif

template <class V>
PYBN_INLINE auto high_halves(V v) {
  return low_halves(v >> 16);
}
#if defined(__AVX2__)
PYBN_INLINE Bits16<8> high_halves(Bits32<8> v) {
  const __m256i each = _mm256_setr_epi8(2, 3, 6, 7, 10, 11, 14, 15, -1, -1, -1, -1, -1, -1, -1, -1,  //
                                        2, 3, 6, 7, 10, 11, 14, 15, -1, -1, -1, -1, -1, -1, -1, -1);
  const __m256i halves = _mm256_shuffle_epi8((__m256i)v, each);
  return (Bits16<8>)_mm256_castsi256_si128(_mm256_permute4x64_epi64(halves, 0x08));
}
#endif

template <class V>
PYBN_INLINE auto from_bits(V bits, BFloat16) {
  constexpr int N = sizeof(V) / 2;
  return (Vec<float, N>)(zero_extend(bits) << 16);
}
#if defined(__AVX2__)
// The same, in one instruction that needs an arithmetic unit.
PYBN_INLINE Vec<float, 8> from_bits(Bits16<8> bits, BFloat16) {
  const __m256i each = _mm256_setr_epi8(-1, -1, 0, 1, -1, -1, 2, 3, -1, -1, 4, 5, -1, -1, 6, 7,  //
                                        -1, -1, 8, 9, -1, -1, 10, 11, -1, -1, 12, 13, -1, -1, 14, 15);
  return (Vec<float, 8>)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256((__m128i)bits), each);
}
#endif
// Rounding keeps a NaN whose lower half is 0, and could turn another into a number. No other comes here: operations
// pass on the NaN that they are given, of bfloat16 data or of maps that plain_nan() has been through.
template <class V>
PYBN_INLINE auto to_bits(V v, BFloat16) {
  constexpr int N = sizeof(V) / 4;
  const Bits32<N> bits = (Bits32<N>)v;
  return high_halves(bits + 0x7fff + ((bits >> 16) & 1));
}
#if defined(__AVX512F__)
// The same in one instruction less, and without the last step.
PYBN_INLINE __m512i rounded_to_high_halves(Vec<float, 16> v) {
  const __mmask16 is_odd = _mm512_test_epi32_mask((__m512i)v, _mm512_set1_epi32(0x10000));
  const __m512i half = _mm512_mask_blend_epi32(is_odd, _mm512_set1_epi32(0x7fff), _mm512_set1_epi32(0x8000));
  return _mm512_add_epi32((__m512i)v, half);
}
PYBN_INLINE Bits16<16> to_bits(Vec<float, 16> v, BFloat16) {
  return high_halves((Bits32<16>)rounded_to_high_halves(v));
}
#endif

// Without F16C: exponents are rebiased as integers; subnormals go through one exact float operation, which normalizes
// or rounds them. Functions of their own: inlined into every loop they would double the time that the library takes to
// build.
template <class V>
__attribute__((noinline)) auto from_bits(V bits, Float16) {
  constexpr int N = sizeof(V) / 2;
  constexpr std::uint32_t kExponent = 0x7c00u << 13, kRebias = (127u - 15u) << 23;
  const Bits32<N> wide = zero_extend(bits);
  const Bits32<N> magnitude = (wide & 0x7fff) << 13;
  const Bits32<N> exponent = magnitude & kExponent;
  const Bits32<N> normal = magnitude + kRebias;
  const Bits32<N> special = (magnitude + 2 * kRebias) | (magnitude > kExponent ? Bits32<N>{} + 0x400000 : Bits32<N>{});
  constexpr std::uint32_t kSmallest = kRebias + (1u << 23);  // 2^-14
  const Bits32<N> offset = Bits32<N>{} + kSmallest;
  const Bits32<N> subnormal = (Bits32<N>)((Vec<float, N>)(magnitude + kSmallest) - (Vec<float, N>)offset);
  const Bits32<N> value = exponent == kExponent ? special : exponent == 0 ? subnormal : normal;
  return (Vec<float, N>)(value | ((wide & 0x8000) << 16));
}
template <class V>
__attribute__((noinline)) auto to_bits(V v, Float16) {
  constexpr int N = sizeof(V) / 4;
  constexpr std::uint32_t kRebias = (127u - 15u) << 23, kInfinity = 0x7f800000u;
  const Bits32<N> bits = (Bits32<N>)v;
  const Bits32<N> magnitude = bits & 0x7fffffff;
  const Bits32<N> normal = (magnitude - kRebias + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const Bits32<N> offset = Bits32<N>{} + ((127u - 1u) << 23);  // 0.5, whose last place is that of the subnormals
  const Bits32<N> subnormal = (Bits32<N>)((Vec<float, N>)magnitude + (Vec<float, N>)offset) - offset;
  const Bits32<N> nan = 0x7e00 | ((magnitude >> 13) & 0x3ff);
  const Bits32<N> finite = magnitude < kRebias + (1u << 23) ? subnormal : normal;
  const Bits32<N> infinity = Bits32<N>{} + 0x7c00;
  const Bits32<N> large = magnitude > kInfinity ? nan : infinity;
  return low_halves((magnitude >= ((127u + 16u) << 23) ? large : finite) | (bits >> 16 & 0x8000));
}
#if defined(__F16C__)
PYBN_INLINE Vec<float, 8> from_bits(Bits16<8> bits, Float16) {
  return (Vec<float, 8>)_mm256_cvtph_ps((__m128i)bits);
}
PYBN_INLINE Vec<float, 4> from_bits(Bits16<4> bits, Float16) {
  return (Vec<float, 4>)_mm_cvtph_ps(_mm_cvtsi64_si128((long long)bits));
}
PYBN_INLINE Bits16<8> to_bits(Vec<float, 8> v, Float16) {
  return (Bits16<8>)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
}
#endif
#if defined(__AVX512F__)
PYBN_INLINE Vec<float, 16> from_bits(Bits16<16> bits, Float16) {
  return (Vec<float, 16>)_mm512_cvtph_ps((__m256i)bits);
}
PYBN_INLINE Bits16<16> to_bits(Vec<float, 16> v, Float16) {
  return (Bits16<16>)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
}
#endif

// ---- loads and stores

// Stores the first `count` lanes, 0 < count < N, in pieces of 4, 2 and 1: AMD's processors take long for a masked store
// of AVX2.
template <int N, class T>
PYBN_INLINE void store_first(T* to, std::size_t count, Vec<T, N> v) {
  if constexpr (N > 1) {
    constexpr int kHalf = N / 2;
    Vec<T, kHalf> halves[2];
    __builtin_memcpy(halves, &v, sizeof v);
    if (count & kHalf) {
      __builtin_memcpy(to, &halves[0], sizeof halves[0]);
      to += kHalf;
      halves[0] = halves[1];
    }
    store_first<kHalf>(to, count, halves[0]);
  }
}

// The first `count` lanes, 0 < count < N; the memory of the others is not touched.
template <int N, class T>
struct Partial {
  static PYBN_INLINE Vec<T, N> load(const T* from, std::size_t count) {
    T lanes[N] = {};
    for (std::size_t i = 0; i < count; ++i) lanes[i] = from[i];
    Vec<T, N> v;
    __builtin_memcpy(&v, lanes, sizeof v);
    return v;
  }
  static PYBN_INLINE void store(T* to, std::size_t count, Vec<T, N> v) { store_first<N>(to, count, v); }
};

#if defined(__AVX512F__)

PYBN_INLINE __mmask16 first_lanes(std::size_t count) {
  return static_cast<__mmask16>((1u << count) - 1u);
}

template <>
struct Partial<8, float> {
  static PYBN_INLINE Vec<float, 8> load(const float* from, std::size_t count) {
    return (Vec<float, 8>)_mm256_maskz_loadu_ps(first_lanes(count), from);
  }
  static PYBN_INLINE void store(float* to, std::size_t count, Vec<float, 8> v) {
    _mm256_mask_storeu_ps(to, first_lanes(count), (__m256)v);
  }
};
template <>
struct Partial<4, double> {
  static PYBN_INLINE Vec<double, 4> load(const double* from, std::size_t count) {
    return (Vec<double, 4>)_mm256_maskz_loadu_pd(first_lanes(count), from);
  }
  static PYBN_INLINE void store(double* to, std::size_t count, Vec<double, 4> v) {
    _mm256_mask_storeu_pd(to, first_lanes(count), (__m256d)v);
  }
};
template <>
struct Partial<8, double> {
  static PYBN_INLINE Vec<double, 8> load(const double* from, std::size_t count) {
    return (Vec<double, 8>)_mm512_maskz_loadu_pd(first_lanes(count), from);
  }
  static PYBN_INLINE void store(double* to, std::size_t count, Vec<double, 8> v) {
    _mm512_mask_storeu_pd(to, first_lanes(count), (__m512d)v);
  }
};
template <>
struct Partial<16, float> {
  static PYBN_INLINE Vec<float, 16> load(const float* from, std::size_t count) {
    return (Vec<float, 16>)_mm512_maskz_loadu_ps(first_lanes(count), from);
  }
};
template <>
struct Partial<16, std::uint16_t> {
  static PYBN_INLINE Bits16<16> load(const std::uint16_t* from, std::size_t count) {
    return (Bits16<16>)_mm256_maskz_loadu_epi16(first_lanes(count), from);
  }
  static PYBN_INLINE void store(std::uint16_t* to, std::size_t count, Bits16<16> v) {
    _mm256_mask_storeu_epi16(to, first_lanes(count), (__m256i)v);
  }
};
template <>
struct Partial<8, std::uint16_t> {
  static PYBN_INLINE Bits16<8> load(const std::uint16_t* from, std::size_t count) {
    return (Bits16<8>)_mm_maskz_loadu_epi16(first_lanes(count), from);
  }
  static PYBN_INLINE void store(std::uint16_t* to, std::size_t count, Bits16<8> v) {
    _mm_mask_storeu_epi16(to, first_lanes(count), (__m128i)v);
  }
};

#elif defined(__AVX2__)

// A mask of `count` set lanes is read from the middle of this table.
alignas(64) constexpr std::int32_t kMask32[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};

PYBN_INLINE __m256i first_lanes_256(std::size_t count) {
  return _mm256_loadu_si256((const __m256i*)(kMask32 + 8 - count));
}

template <>
struct Partial<8, float> {
  static PYBN_INLINE Vec<float, 8> load(const float* from, std::size_t count) {
    return (Vec<float, 8>)_mm256_maskload_ps(from, first_lanes_256(count));
  }
  static PYBN_INLINE void store(float* to, std::size_t count, Vec<float, 8> v) { store_first<8>(to, count, v); }
};
template <>
struct Partial<4, float> {
  static PYBN_INLINE Vec<float, 4> load(const float* from, std::size_t count) {
    return (Vec<float, 4>)_mm_maskload_ps(from, _mm_loadu_si128((const __m128i*)(kMask32 + 8 - count)));
  }
  static PYBN_INLINE void store(float* to, std::size_t count, Vec<float, 4> v) { store_first<4>(to, count, v); }
};
template <>
struct Partial<4, double> {
  static PYBN_INLINE Vec<double, 4> load(const double* from, std::size_t count) {
    return (Vec<double, 4>)_mm256_maskload_pd(from, first_lanes_256(2 * count));
  }
  static PYBN_INLINE void store(double* to, std::size_t count, Vec<double, 4> v) { store_first<4>(to, count, v); }
};

#endif

// How much of a vector a step touches. Loops are written once over this and called with Whole, then with First for the
// tail. What is loaded is what values are computed with; what is stored is rounded to the type of the data.
struct Whole {
  PYBN_INLINE bool has(std::size_t) const { return true; }
  template <int N, class T>
  PYBN_INLINE Vec<T, N> load_bits(const T* from) const {
    Vec<T, N> v;
    __builtin_memcpy(&v, from, sizeof v);
    return v;
  }
  template <int N, class T>
  PYBN_INLINE void store_bits(T* to, Vec<T, N> v) const {
    __builtin_memcpy(to, &v, sizeof v);
  }
  template <class V>
  PYBN_INLINE V or_else(V v, V) const {
    return v;
  }
};
struct First {
  std::size_t count;  // 0 < count < N

  PYBN_INLINE bool has(std::size_t lane) const { return lane < count; }
  template <int N, class T>
  PYBN_INLINE Vec<T, N> load_bits(const T* from) const {
    return Partial<N, T>::load(from, count);
  }
  template <int N, class T>
  PYBN_INLINE void store_bits(T* to, Vec<T, N> v) const {
    Partial<N, T>::store(to, count, v);
  }
  // `beyond` in the lanes that were not loaded.
  PYBN_INLINE Doubles or_else(Doubles v, Doubles beyond) const {
#if defined(__AVX512F__)
    return (Doubles)_mm512_mask_mov_pd((__m512d)beyond, first_lanes(count), (__m512d)v);
#elif defined(__AVX2__)
    return (Doubles)_mm256_blendv_pd((__m256d)beyond, (__m256d)v, (__m256d)first_lanes_256(2 * count));
#else
    Ints<double, kDoubles> lane;
    for (int i = 0; i < kDoubles; ++i) lane[i] = i;
    return lane < static_cast<std::int64_t>(count) ? v : beyond;
#endif
  }
};

template <int N, class Lanes, class T>
PYBN_INLINE Vec<Arithmetic<T>, N> load(Lanes lanes, const T* from) {
  if constexpr (sizeof(T) == 2)
    return from_bits(lanes.template load_bits<N>(&from->bits), T{});
  else
    return lanes.template load_bits<N>(from);
}
template <int N, class Lanes, class T>
PYBN_INLINE void store(Lanes lanes, T* to, Vec<Arithmetic<T>, N> v) {
  if constexpr (sizeof(T) == 2)
    lanes.template store_bits<N>(&to->bits, to_bits(v, T{}));
  else
    lanes.template store_bits<N>(to, v);
}

// Two vectors, one after the other.
template <class T, class V>
PYBN_INLINE void store_pair(T* to, V first, V second) {
  constexpr int N = sizeof(V) / sizeof(Arithmetic<T>);
  store<N>(Whole{}, to, first);
  store<N>(Whole{}, to + N, second);
}
#if defined(__AVX512F__)
PYBN_INLINE void store_pair(BFloat16* to, Vec<float, 16> first, Vec<float, 16> second) {
  Vec<std::uint16_t, 32> odd;
  for (int i = 0; i < 32; ++i) odd[i] = static_cast<std::uint16_t>(2 * i + 1);
  const __m512i halves =
      _mm512_permutex2var_epi16(rounded_to_high_halves(first), (__m512i)odd, rounded_to_high_halves(second));
  _mm256_storeu_si256((__m256i*)to, _mm512_castsi512_si256(halves));
  _mm256_storeu_si256((__m256i*)(to + 16), _mm512_extracti64x4_epi64(halves, 1));
}
#endif

// All lanes the one value at `from`.
template <int N, class T>
PYBN_INLINE Vec<Arithmetic<T>, N> splat(const T* from) {
  if constexpr (sizeof(T) == 2)
    return from_bits(Bits16<N>{} + from->bits, T{});
  else
    return broadcast<N>(*from);
}

// The first `count` values of those that lie `stride` apart; lanes beyond have the last of them. In one expression,
// which becomes insertions into a register: of lanes that were stored one by one, a load would have to wait.
template <class T>
PYBN_INLINE Vec<Arithmetic<T>, kDoubles> load_strided(const T* from, std::ptrdiff_t stride, std::size_t count) {
  const auto at = [&](std::size_t i) PYBN_INLINE_LAMBDA {
    const T* value = from + static_cast<std::ptrdiff_t>(i < count ? i : count - 1) * stride;
    if constexpr (sizeof(T) == 2)
      return value->bits;
    else
      return *value;
  };
  using Lanes = Vec<decltype(at(0)), kDoubles>;
  Lanes v;
  if constexpr (kDoubles == 8)
    v = Lanes{at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7)};
  else
    v = Lanes{at(0), at(1), at(2), at(3)};
  if constexpr (sizeof(T) == 2)
    return from_bits(v, T{});
  else
    return v;
}

// ---- loads of what a reduction adds up

template <class Lanes, class T>
PYBN_INLINE Doubles load_wide(Lanes lanes, const T* from) {
  return widen(load<kDoubles>(lanes, from));
}
#if defined(__AVX512F__)
// Converting from memory takes half of what converting from a register does, where it is even worth loading twice. The
// compiler would merge the two loads if it knew that both pointers are the same.
PYBN_INLINE Doubles load_wide(Whole, const float* from) {
  asm("" : "+r"(from));
  return (Doubles)_mm512_cvtps_pd(_mm256_loadu_ps(from));
}
#endif

// The same, 0 where z <= 0.
template <class Lanes, class T, class V>
PYBN_INLINE Doubles load_wide_unless_negative(Lanes lanes, V z, const T* from) {
  return widen(z <= V{} ? V{} : load<kDoubles>(lanes, from));
}
#if defined(__AVX512F__)
PYBN_INLINE Doubles load_wide_unless_negative(Whole, Vec<float, 8> z, const float* from) {
  const __mmask8 lanes = _mm256_cmp_ps_mask((__m256)z, _mm256_setzero_ps(), _CMP_NLE_UQ);
  return (Doubles)_mm512_maskz_cvtps_pd(lanes, _mm256_loadu_ps(from));
}
#endif

// ---- lanes

// One bit per lane of a comparison, and back.
template <class V>
PYBN_INLINE std::uint32_t bits_of(V lanes) {
  constexpr int N = sizeof(V) / sizeof(lanes[0]);
  std::uint32_t bits = 0;
  for (int i = 0; i < N; ++i) bits |= static_cast<std::uint32_t>(lanes[i] & 1) << i;
  return bits;
}
#if defined(__AVX512F__)
PYBN_INLINE std::uint32_t bits_of(Ints<float, 16> lanes) {
  return _mm512_movepi32_mask((__m512i)lanes);
}
#endif
#if defined(__AVX2__)
PYBN_INLINE std::uint32_t bits_of(Ints<float, 8> lanes) {
  return static_cast<std::uint32_t>(_mm256_movemask_ps((__m256)lanes));
}
PYBN_INLINE std::uint32_t bits_of(Ints<double, 4> lanes) {
  return static_cast<std::uint32_t>(_mm256_movemask_pd((__m256d)lanes));
}
#elif defined(__SSE2__)
PYBN_INLINE std::uint32_t bits_of(Ints<float, 4> lanes) {
  return static_cast<std::uint32_t>(_mm_movemask_ps((__m128)lanes));
}
PYBN_INLINE std::uint32_t bits_of(Ints<double, 2> lanes) {
  return static_cast<std::uint32_t>(_mm_movemask_pd((__m128d)lanes));
}
#endif
template <class A, int N>
PYBN_INLINE Ints<A, N> lanes_of(std::uint32_t bits) {
  Ints<A, N> one_bit;
  for (int i = 0; i < N; ++i) one_bit[i] = 1 << i;
  return ((Ints<A, N>{} + static_cast<typename LaneInt<A>::type>(bits)) & one_bit) != 0;
}

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
