// The types of data. Half types are stored as bits and computed with in float32.
//
// Everything here has internal linkage, because files compiled for different instruction sets include it (see simd.h).
#pragma once

#include <cstdint>

// Also what every file compiled for an instruction set calls: a copy of its own, never a shared function (see simd.h).
#define PYBN_INLINE inline __attribute__((always_inline))

namespace pybn {

struct Float16 {  // IEEE 754 binary16
  std::uint16_t bits;
};
struct BFloat16 {  // the upper half of a binary32
  std::uint16_t bits;
};

// What values of T are computed with.
template <class T>
struct ArithmeticOf {
  using type = T;
};
template <>
struct ArithmeticOf<Float16> {
  using type = float;
};
template <>
struct ArithmeticOf<BFloat16> {
  using type = float;
};
template <class T>
using Arithmetic = typename ArithmeticOf<T>::type;

namespace {

inline double to_double(double value) {
  return value;
}
inline double to_double(float value) {
  return static_cast<double>(value);
}
inline double to_double(BFloat16 value) {
  const std::uint32_t bits = std::uint32_t{value.bits} << 16;
  float result;
  __builtin_memcpy(&result, &bits, sizeof result);
  return static_cast<double>(result);
}
inline double to_double(Float16 value) {
  const int exponent = value.bits >> 10 & 31;
  const double fraction = value.bits & 1023;
  const double magnitude = exponent == 31  ? (fraction == 0 ? __builtin_inf() : __builtin_nan(""))
                           : exponent == 0 ? __builtin_ldexp(fraction, -24)
                                           : __builtin_ldexp(1024 + fraction, exponent - 25);
  return value.bits >> 15 ? -magnitude : magnitude;
}

}  // namespace
}  // namespace pybn
