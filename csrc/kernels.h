// The leaf loops: written once over simd.h, compiled once per instruction set by kernels_isa.cpp.
//
// Reductions run in double whatever the data type. Converting costs about 4 cycles per 64-byte line of floats, where a
// core's share of the memory needs 13 or more to deliver one, and buys exactness: no overflow at 1e30, no cancellation.
#pragma once

#include "simd.h"

#include "epilogue.h"
#include "kernel_table.h"

namespace pybn {
namespace {

// Vectors per step of a plane, in a reduction each with accumulators of its own: an add takes 4 cycles and two can
// start in each, so fewer than 8 independent chains (4 of each of two sums) would wait for one another.
constexpr int kUnroll = 4;

// Rows that a reduction takes together: their channels share one load of the sums, and one store. Applications, which
// would share loads of the parameters, take them one by one, in the order of memory, unless a plan says otherwise
// (`Block::rows_together`) or there are many parameters.
constexpr int kRows = 4;

// Channels of a row whose map does not stay in L1 beside the data, so that applications, too, take kRows together where
// runs are not fetched ahead, on an EPYC: inference of 2048 channels takes 0.7 to 0.9 of the time. (Of 1024, up to 1.6;
// backward passes gain nothing.)
constexpr std::size_t kWideRow = 1536;

// How far ahead of its use memory is fetched, also memory that is only written. The hardware's own prefetching leaves a
// core of a Xeon waiting: training forward on 56x56 planes takes 1.4 copies without this, 1.2 with it; 1 to 4 KiB are
// alike. An EPYC's core foresees long runs better than this does (`Block::fetches_runs`).
constexpr std::size_t kAheadBytes = 2048;
constexpr std::size_t kLineBytes = 64;

PYBN_INLINE std::size_t min(std::size_t a, std::size_t b) {
  return a < b ? a : b;
}

// ---- the arithmetic of one vector

template <int N, class A>
struct AffineVectors {
  Vec<A, N> center, scale, shift;

  PYBN_INLINE Vec<A, N> operator()(Vec<A, N> x) const { return fma(x - center, scale, shift); }
};

template <int N, class Lanes, class A>
PYBN_INLINE AffineVectors<N, A> load(Lanes lanes, Affine<A> a, std::size_t c) {
  return {load<N>(lanes, a.center + c), load<N>(lanes, a.scale + c), load<N>(lanes, a.shift + c)};
}

template <int N, class A>
struct GradientVectors {
  Vec<A, N> slope, offset;
};

template <int N, class Lanes, class A>
PYBN_INLINE GradientVectors<N, A> load(Lanes lanes, const GradientAffine<A>* g, std::size_t c) {
  if (!g) return {Vec<A, N>{}, Vec<A, N>{}};
  return {load<N>(lanes, g->slope + c), load<N>(lanes, g->offset + c)};
}

// Bits of the N values from the i-th of a plane or a row on; i is a multiple of N, which is at most 16.
template <int N, class Lanes>
PYBN_INLINE std::uint32_t mask_bits(Lanes lanes, const std::uint8_t* mask, std::size_t i) {
  const std::uint8_t* byte = mask + i / kMaskValues;
  std::uint32_t bits = std::uint32_t{byte[0]} >> i % kMaskValues;
  if (N > kMaskValues && lanes.has(kMaskValues)) bits |= std::uint32_t{byte[1]} << kMaskValues;
  return bits;
}
template <int N, class Lanes>
PYBN_INLINE void set_mask_bits(Lanes lanes, std::uint8_t* mask, std::size_t i, std::uint32_t bits) {
  std::uint8_t* byte = mask + i / kMaskValues;
  byte[0] = static_cast<std::uint8_t>(i % kMaskValues == 0 ? bits : byte[0] | bits << i % kMaskValues);
  if (N > kMaskValues && lanes.has(kMaskValues)) byte[1] = static_cast<std::uint8_t>(bits >> kMaskValues);
}

// y of a vector, the i-th of a plane or a row, and its bits of the mask, if there is one.
template <bool kResidual, int N, class Act, class Lanes, class T, class A>
PYBN_INLINE Vec<A, N> apply_forward(const Act& act, Lanes lanes, std::size_t i, const T* x, const T* residual,
                                    std::uint8_t* mask, const AffineVectors<N, A>& a) {
  Vec<A, N> z = a(load<N>(lanes, x));
  if constexpr (kResidual) {
    z += load<N>(lanes, residual);
    if constexpr (Act::kReadsZ)
      if (mask) set_mask_bits<N>(lanes, mask, i, bits_of(act.template passes<N, A>(z)));
  }
  return act.template forward<N, A>(z);
}

// Whether a backward pass may be asked for dz, too: without an activation it is dy, and nothing need be stored.
template <class Act>
constexpr bool kGivesResidual = Act::kReadsResidual || Act::kReadsMask;

// x of a vector in a backward pass; z, where that is what is normalized and the activation has overwritten it.
template <int N, class Act, class Lanes, class T>
PYBN_INLINE auto load_x(const Act& act, Lanes lanes, const T* x) {
  const auto v = load<N>(lanes, x);
  if constexpr (Act::kReadsOutput)
    return act.template inverse<N, Arithmetic<T>>(v);
  else
    return v;
}
template <class Act, class Lanes, class T>
PYBN_INLINE Doubles load_wide_x(const Act& act, Lanes lanes, const T* x) {
  if constexpr (Act::kReadsOutput)
    return widen(load_x<kDoubles>(act, lanes, x));
  else
    return load_wide(lanes, x);
}

// dz of a vector: dy passed back through the activation.
template <int N, class Act, class Lanes, class T, class A>
PYBN_INLINE Vec<A, N> backward_through(const Act& act, Lanes lanes, std::size_t i, const T* dy, const T* residual,
                                       const std::uint8_t* mask, Vec<A, N> x, const AffineVectors<N, A>& a) {
  const Vec<A, N> gradient = load<N>(lanes, dy);
  if constexpr (Act::kReadsMask) {
    return act.template backward_masked<N, A>(lanes_of<A, N>(mask_bits<N>(lanes, mask, i)), gradient);
  } else {
    Vec<A, N> z = x;
    if constexpr (!Act::kReadsOutput) z = a(x);
    if constexpr (Act::kReadsResidual) z += load<N>(lanes, residual);
    return act.template backward<N, A>(z, gradient);
  }
}

// The same, as a reduction adds it up.
template <class Lanes, class T, class A>
PYBN_INLINE Doubles wide_backward_through(const Relu&, Lanes lanes, std::size_t, const T* dy, const T* x, const T*,
                                          const std::uint8_t*, const AffineVectors<kDoubles, A>& a) {
  return load_wide_unless_negative(lanes, a(load<kDoubles>(lanes, x)), dy);
}
template <class Act, class Lanes, class T, class A>
PYBN_INLINE Doubles wide_backward_through(const Act& act, Lanes lanes, std::size_t i, const T* dy, const T* x,
                                          const T* residual, const std::uint8_t* mask,
                                          const AffineVectors<kDoubles, A>& a) {
  constexpr int N = kDoubles;
  if constexpr (!Act::kReadsZ && !Act::kReadsMask) {
    return load_wide(lanes, dy);
  } else {
    Vec<A, N> xv{};
    if constexpr (Act::kReadsZ) xv = load_x<N>(act, lanes, x);
    return widen(backward_through(act, lanes, i, dy, residual, mask, xv, a));
  }
}

// dx of a vector; dz, the gradient of the residual, is stored if it is wanted.
template <bool kTraining, int N, class Act, class Lanes, class T, class A>
PYBN_INLINE Vec<A, N> apply_backward(const Act& act, Lanes lanes, std::size_t i, const T* dy, const T* x,
                                     const T* residual, const std::uint8_t* mask, T* dresidual,
                                     const AffineVectors<N, A>& a, const GradientVectors<N, A>& g) {
  const Vec<A, N> xv = load_x<N>(act, lanes, x);
  const Vec<A, N> dz = backward_through(act, lanes, i, dy, residual, mask, xv, a);
  if constexpr (kGivesResidual<Act>)
    if (dresidual) store<N>(lanes, dresidual, dz);
  if constexpr (kTraining)
    return fma(xv - a.center, g.slope, fma(dz, a.scale, g.offset));
  else
    return dz * a.scale;
}

// Accumulators of one vector of channels or of values: the two sums that a statistics or a backward reduction needs.
struct SumPair {
  Doubles first, second;

  static PYBN_INLINE SumPair zero() { return {Doubles{}, Doubles{}}; }
  PYBN_INLINE void add_value(Doubles x) {
    first += x;
    second = fma(x, x, second);
  }
  PYBN_INLINE void add_gradient(Doubles dz, Doubles x, Doubles mean) {
    first += dz;
    second = fma(x - mean, dz, second);
  }
  PYBN_INLINE void operator+=(const SumPair& other) {
    first += other.first;
    second += other.second;
  }
};

// ---- planes
//
// Planes can be as short as 49 values, seven vectors, so what is done per plane is kept to a few instructions: what can
// be is worked out per block, per group of channels or per span of planes.

// The value of a constant as a type, so that a generic lambda can use it as one.
template <int N>
struct Count {
  static constexpr int value = N;
};

// The same, of one of the vectors of an unrolled step.
template <int N>
struct Unrolled : Count<N> {};

// How a plane is taken: in steps of kUnroll vectors, then in vectors, then in what is left. All planes of a block are
// taken alike, so that their sums run in the same order.
struct Steps {
  std::size_t head;                    // steps with what lies ahead in the same run of memory
  std::size_t unrolled, single, rest;  // the tail: more such steps, vectors, values
};

// Neighbouring channels' planes lie one after the other, in one run of memory per outer index. A run is walked in two
// spans of planes. Most of it has what lies ahead further down the run; the end of a run, kAheadBytes, has it at the
// beginning of the next. That end may be some planes or, of large planes, the tail of the last one.
struct Span {
  std::size_t channel, end_channel;
  std::ptrdiff_t head_ahead, tail_ahead;  // in values
  bool is_end;
};

template <class T, int N>
class Spans {
 public:
  static constexpr std::size_t kAhead = kAheadBytes / sizeof(T);

  PYBN_INLINE explicit Spans(const Block& block) {
    constexpr std::size_t kStep = kUnroll * N;
    const std::size_t length = block.channels * block.inner, end = min(length, kAhead);
    const bool are_large = block.inner > kAhead;
    const std::size_t head = are_large ? (block.inner - kAhead) / kStep : 0, tail = block.inner - head * kStep;
    steps_ = {head, tail / kStep, tail % kStep / N, tail % N};
    const std::size_t split = are_large ? block.channels - 1 : (length - end) / block.inner;
    // Of 0 values ahead, what is fetched is what is read next.
    const auto in_run = static_cast<std::ptrdiff_t>(are_large && !block.fetches_runs ? 0 : kAhead);
    const auto to_next_run = static_cast<std::ptrdiff_t>(end) - static_cast<std::ptrdiff_t>(length);
    spans_[0] = {0, split, in_run, in_run, false};
    spans_[1] = {split, block.channels, in_run, to_next_run, true};
  }
  PYBN_INLINE const Steps& steps() const { return steps_; }
  PYBN_INLINE const Span* begin() const { return spans_; }
  PYBN_INLINE const Span* end() const { return spans_ + 2; }

 private:
  Steps steps_;
  Span spans_[2];
};

// Whether rows lie one after the other, in one run of memory.
template <class T>
PYBN_INLINE bool is_run(const Operand<T>& rows, const Block& block) {
  return rows.outer_stride == static_cast<std::ptrdiff_t>(block.channels);
}

// Whole steps of so many rows `together` that are kAheadBytes or more, in values.
template <class T>
PYBN_INLINE std::ptrdiff_t rows_ahead(const Operand<T>& rows, const Block& block, std::size_t together) {
  const std::size_t bytes = together * block.channels * sizeof(T);
  return static_cast<std::ptrdiff_t>(together * ((kAheadBytes + bytes - 1) / bytes)) * rows.outer_stride;
}

// Whether a step is in the head of a plane or in its tail.
struct Head {};
struct Tail {};

// One operand, walked plane by plane along a span of the run of outer index o, or the row of that index, taken as one
// plane that is all tail.
template <class T>
class Walk {
 public:
  PYBN_INLINE Walk(const Operand<T>& operand, const Block& block, std::size_t o, const Span& span)
      : at_(operand.at(o, span.channel, 0)),
        head_ahead_(span.head_ahead),
        tail_ahead_(span.tail_ahead + (span.is_end && o + 1 < block.outer ? operand.outer_stride : 0)),
        stride_(operand.channel_stride) {}
  PYBN_INLINE Walk(const Operand<T>& operand, const Block& block, std::size_t o)
      : at_(operand.at(o, 0, 0)),
        head_ahead_(0),
        tail_ahead_(is_run(operand, block) && !block.fetches_runs ? 0 : rows_ahead(operand, block, 1)),
        stride_(0) {}

  PYBN_INLINE T* plane() const { return at_; }
  PYBN_INLINE void fetch(std::size_t i, Head) const { fetch(i, head_ahead_); }
  PYBN_INLINE void fetch(std::size_t i, Tail) const { fetch(i, tail_ahead_); }
  PYBN_INLINE void next_plane() { at_ += stride_; }

 private:
  PYBN_INLINE void fetch(std::size_t i, std::ptrdiff_t ahead) const {
    __builtin_prefetch(at_ + (ahead + static_cast<std::ptrdiff_t>(i)));
  }

  T* at_;
  std::ptrdiff_t head_ahead_, tail_ahead_, stride_;
};

// An operand as a reduction reads it: at(offset, u) is where the values of a vector are that are to become doubles.
template <class T>
class Reading : public Walk<const T> {
 public:
  using Walk<const T>::Walk;
  template <class U>
  PYBN_INLINE const T* at(std::size_t i, U) const {
    return this->plane() + i;
  }
};

// The same of half types, which are converted to floats in memory first, an unrolled step of them at a time. That takes
// vectors of twice as many values as fit into one of doubles, and floats become doubles in one instruction from memory,
// in two from a register: on a Xeon, statistics of bfloat16 take 0.8 of their time (0.6 with AVX2), of float16 0.9. On
// an EPYC they take 1.1 to 1.3 of it with AVX-512, 0.8 to 1 with AVX2.
template <class T>
class ReadingThroughMemory : public Walk<const T> {
 public:
  using Walk<const T>::Walk;
  template <int U>
  PYBN_INLINE const T* at(std::size_t i, Count<U>) const {
    return this->plane() + i;
  }
  template <int U>
  PYBN_INLINE const float* at(std::size_t i, Unrolled<U>) {
    if (U == 0) {
      constexpr int N = kLanes<T>;
      for (int from = 0; from < kUnroll * kDoubles; from += N)
        store<N>(Whole{}, floats_ + from, load<N>(Whole{}, this->plane() + i + from));
      asm("" : "+m"(floats_));  // the compiler would keep them in registers
    }
    return floats_ + U * kDoubles;
  }

 private:
  alignas(kLineBytes) float floats_[kUnroll * kDoubles];
};

// An operand as an application writes it, two vectors of an unrolled step at a time: two of bfloat16 are packed in as
// many instructions as one.
template <class T>
class Writing : public Walk<T> {
 public:
  using Walk<T>::Walk;
  template <class Lanes, class V, int U>
  PYBN_INLINE void put(Lanes lanes, std::size_t i, Count<U>, V v) {
    store<kLanes<T>>(lanes, this->plane() + i, v);
  }
  template <class V, int U>
  PYBN_INLINE void put(Whole, std::size_t i, Unrolled<U>, V v) {
    if (U % 2 == 0)
      first_ = v;
    else
      store_pair(this->plane() + (i - kLanes<T>), first_, v);
  }

 private:
  Vec<Arithmetic<T>, kLanes<T>> first_;
};

// Calls fetch(offset, Head or Tail), once for every cache line or more often, and step(lanes, offset, u) for every
// vector of a plane. `u` is a Count below kUnroll; successive steps have different ones.
template <class T, int N, class Fetch, class Step>
PYBN_INLINE void for_each_vector(const Steps& steps, Fetch fetch, Step step) {
  static_assert(kUnroll == 4);
  std::size_t i = 0;
  const auto unrolled = [&](std::size_t count, auto part) PYBN_INLINE_LAMBDA {
    for (; count > 0; --count, i += kUnroll * N) {
      for (std::size_t line = 0; line < kUnroll * N; line += kLineBytes / sizeof(T)) fetch(i + line, part);
      step(Whole{}, i, Unrolled<0>{});
      step(Whole{}, i + N, Unrolled<1>{});
      step(Whole{}, i + 2 * N, Unrolled<2>{});
      step(Whole{}, i + 3 * N, Unrolled<3>{});
    }
  };
  unrolled(steps.head, Head{});
  unrolled(steps.unrolled, Tail{});
  for (std::size_t n = steps.single; n > 0; --n, i += N) {
    fetch(i, Tail{});
    step(Whole{}, i, Count<0>{});
  }
  if (steps.rest > 0) {
    fetch(i, Tail{});
    step(First{steps.rest}, i, Count<1>{});
  }
}

// Calls group(first, block) for every kGroup channels of a block.
template <class Group>
PYBN_INLINE void for_each_group(const Block& block, Group group) {
  for (std::size_t first = 0; first < block.channels; first += kGroup) {
    Block part = block;
    part.channels = min(kGroup, block.channels - first);
    group(first, part);
  }
}
template <class T>
PYBN_INLINE Operand<T> from_channel(Operand<T> operand, std::size_t first) {
  operand.data += static_cast<std::ptrdiff_t>(first) * operand.channel_stride;
  return operand;
}

// The accumulators of a plane, in so many chains of additions that need not wait for one another. Their index is a
// type, not a number, so that they are registers: GCC 12 keeps an array that any loop indexes in memory.
template <int kChains>
struct Parts {
  SumPair part[kChains];

  template <int U>
  PYBN_INLINE SumPair& operator[](Count<U>) {
    return part[U % kChains];
  }
};

// Planes of at most this many values have one chain: those of the next planes fill the time it waits, and to join four
// would take as long as a third of a 7x7 plane.
constexpr std::size_t kOneChainValues = 64;

// Adds up every channel of a group in memory order: plane(parts, c) adds the next plane of a walk, channel c's.
struct GroupSums {
  SumPair sums[kGroup];
  bool one_chain;

  PYBN_INLINE explicit GroupSums(const Block& block) : one_chain(block.inner <= kOneChainValues) {
    for (std::size_t c = 0; c < block.channels; ++c) sums[c] = SumPair::zero();
  }
  template <class Plane>
  PYBN_INLINE void add(std::size_t c, Plane plane) {
    if (one_chain) {
      Parts<1> parts{{sums[c]}};
      plane(parts);
      sums[c] = parts.part[0];
    } else {
      Parts<kUnroll> parts{{SumPair::zero(), SumPair::zero(), SumPair::zero(), SumPair::zero()}};
      plane(parts);
      parts.part[0] += parts.part[1];
      parts.part[2] += parts.part[3];
      parts.part[0] += parts.part[2];
      sums[c] += parts.part[0];  // at the end: short chains round less
    }
  }
  PYBN_INLINE void store(std::size_t channels, double* first, double* second) const {
    for (std::size_t c = 0; c < channels; ++c) {
      first[c] = sum_of_lanes(sums[c].first);
      second[c] = sum_of_lanes(sums[c].second);
    }
  }
};

// The maps of a group of channels, each channel's values side by side.
template <class A>
struct GroupMaps {
  struct Map {
    A center, scale, shift, slope, offset;
  } maps[kGroup];

  PYBN_INLINE GroupMaps(std::size_t first, std::size_t channels, Affine<A> a, const GradientAffine<A>* g = nullptr) {
    for (std::size_t c = 0; c < channels; ++c) {
      const std::size_t from = first + c;
      maps[c] = {a.center[from], a.scale[from], a.shift[from], g ? g->slope[from] : A{}, g ? g->offset[from] : A{}};
    }
  }
  template <int N>
  PYBN_INLINE AffineVectors<N, A> affine(std::size_t c) const {
    const Map& m = maps[c];
    return {broadcast<N>(m.center), broadcast<N>(m.scale), broadcast<N>(m.shift)};
  }
  template <int N>
  PYBN_INLINE GradientVectors<N, A> gradient(std::size_t c) const {
    return {broadcast<N>(maps[c].slope), broadcast<N>(maps[c].offset)};
  }
};

// Planes whose reductions read by Reading or by ReadingThroughMemory.
template <template <class> class Reader>
struct PlanesBy {
  template <bool kShifted, class T>
  static void stats(Block whole, Operand<const T> all_x, const double* shift, double* sum, double* squares) noexcept {
    constexpr int N = kDoubles;
    for_each_group(whole, [&](std::size_t first, const Block& block) {
      const Operand<const T> x = from_channel(all_x, first);
      GroupSums sums(block);
      const Spans<T, N> spans(block);
      for (std::size_t o = 0; o < block.outer; ++o)
        for (const Span& span : spans) {
          Reader<T> xs(x, block, o, span);
          for (std::size_t c = span.channel; c < span.end_channel; ++c, xs.next_plane())
            sums.add(c, [&](auto& parts) PYBN_INLINE_LAMBDA {
              Doubles channel_shift{};
              if (kShifted) channel_shift = broadcast<N>(shift[first + c]);
              for_each_vector<T, N>(
                  spans.steps(), [&](std::size_t i, auto part) PYBN_INLINE_LAMBDA { xs.fetch(i, part); },
                  [&](auto lanes, std::size_t i, auto u) PYBN_INLINE_LAMBDA {
                    Doubles value = load_wide(lanes, xs.at(i, u));
                    if (kShifted) value = lanes.or_else(value, channel_shift) - channel_shift;
                    parts[u].add_value(value);
                  });
            });
        }
      sums.store(block.channels, sum + first, squares + first);
    });
  }

  template <class Act, bool kResidual, class T>
  static void elemt(Block whole, Operand<const T> all_x, Operand<T> all_y, Affine<Arithmetic<T>> affine,
                    const Fusion<T>& fusion) noexcept {
    constexpr int N = kLanes<T>;
    const Act act(fusion);
    for_each_group(whole, [&](std::size_t first, const Block& block) {
      const Operand<const T> x = from_channel(all_x, first);
      const Operand<const T> residual = kResidual ? from_channel(fusion.residual, first) : x;
      const Operand<T> y = from_channel(all_y, first);
      const GroupMaps<Arithmetic<T>> maps(first, block.channels, affine);
      const Spans<T, N> spans(block);
      for (std::size_t o = 0; o < block.outer; ++o)
        for (const Span& span : spans) {
          Walk<const T> xs(x, block, o, span), residuals(residual, block, o, span);
          Writing<T> ys(y, block, o, span);
          for (std::size_t c = span.channel; c < span.end_channel; ++c) {
            const auto a = maps.template affine<N>(c);
            std::uint8_t* mask = nullptr;
            if (kResidual && Act::kReadsZ && fusion.mask) mask = fusion.mask.at(o, first + c);
            for_each_vector<T, N>(
                spans.steps(),
                [&](std::size_t i, auto part) PYBN_INLINE_LAMBDA {
                  xs.fetch(i, part);
                  if (kResidual) residuals.fetch(i, part);
                  ys.fetch(i, part);
                },
                [&](auto lanes, std::size_t i, auto u) PYBN_INLINE_LAMBDA {
                  ys.put(lanes, i, u,
                         apply_forward<kResidual>(act, lanes, i, xs.plane() + i, residuals.plane() + i, mask, a));
                });
            xs.next_plane();
            residuals.next_plane();
            ys.next_plane();
          }
        }
    });
  }

  template <class Act, class T>
  static void backward_reduce(Block whole, Operand<const T> all_dy, Operand<const T> all_x, const double* mean,
                              Affine<Arithmetic<T>> affine, const Fusion<T>& fusion, double* sum_dy,
                              double* sum_dy_xmu) noexcept {
    constexpr int N = kDoubles;
    const Act act(fusion);
    for_each_group(whole, [&](std::size_t first, const Block& block) {
      const Operand<const T> dy = from_channel(all_dy, first), x = from_channel(all_x, first);
      const Operand<const T> residual = Act::kReadsResidual ? from_channel(fusion.residual, first) : x;
      const GroupMaps<Arithmetic<T>> maps(first, block.channels, affine);
      GroupSums sums(block);
      const Spans<T, N> spans(block);
      for (std::size_t o = 0; o < block.outer; ++o)
        for (const Span& span : spans) {
          Reader<T> dys(dy, block, o, span), xs(x, block, o, span), residuals(residual, block, o, span);
          for (std::size_t c = span.channel; c < span.end_channel; ++c) {
            const auto a = maps.template affine<N>(c);
            const Doubles wide_mean = broadcast<N>(mean[first + c]);
            const std::uint8_t* mask = nullptr;
            if (Act::kReadsMask) mask = fusion.mask.at(o, first + c);
            sums.add(c, [&](auto& parts) PYBN_INLINE_LAMBDA {
              for_each_vector<T, N>(
                  spans.steps(),
                  [&](std::size_t i, auto part) PYBN_INLINE_LAMBDA {
                    dys.fetch(i, part);
                    xs.fetch(i, part);
                    if (Act::kReadsResidual) residuals.fetch(i, part);
                  },
                  [&](auto lanes, std::size_t i, auto u) PYBN_INLINE_LAMBDA {
                    const auto* x_at = xs.at(i, u);
                    const auto* residual_at = Act::kReadsResidual ? residuals.at(i, u) : x_at;
                    const Doubles dz = wide_backward_through(act, lanes, i, dys.at(i, u), x_at, residual_at, mask, a);
                    parts[u].add_gradient(lanes.or_else(dz, Doubles{}), load_wide_x(act, lanes, x_at), wide_mean);
                  });
            });
            dys.next_plane();
            xs.next_plane();
            residuals.next_plane();
          }
        }
      sums.store(block.channels, sum_dy + first, sum_dy_xmu + first);
    });
  }

  template <class Act, bool kTraining, class T>
  static void backward_elemt(Block whole, Operand<const T> all_dy, Operand<const T> all_x, Operand<T> all_dx,
                             Operand<T> all_dresidual, Affine<Arithmetic<T>> affine,
                             const GradientAffine<Arithmetic<T>>* gradient_affine, const Fusion<T>& fusion) noexcept {
    constexpr int N = kLanes<T>;
    constexpr bool kReadsX = kTraining || Act::kReadsZ;
    const Act act(fusion);
    const bool has_dresidual = kGivesResidual<Act> && all_dresidual;
    for_each_group(whole, [&](std::size_t first, const Block& block) {
      const Operand<const T> dy = from_channel(all_dy, first), x = kReadsX ? from_channel(all_x, first) : dy;
      const Operand<const T> residual = Act::kReadsResidual ? from_channel(fusion.residual, first) : dy;
      const Operand<T> dx = from_channel(all_dx, first);
      const Operand<T> dresidual = has_dresidual ? from_channel(all_dresidual, first) : dx;
      const GroupMaps<Arithmetic<T>> maps(first, block.channels, affine, gradient_affine);
      const Spans<T, N> spans(block);
      for (std::size_t o = 0; o < block.outer; ++o)
        for (const Span& span : spans) {
          Walk<const T> dys(dy, block, o, span), xs(x, block, o, span), residuals(residual, block, o, span);
          Writing<T> dxs(dx, block, o, span);
          Walk<T> dresiduals(dresidual, block, o, span);
          for (std::size_t c = span.channel; c < span.end_channel; ++c) {
            const auto a = maps.template affine<N>(c);
            const auto g = maps.template gradient<N>(c);
            const std::uint8_t* mask = nullptr;
            if (Act::kReadsMask) mask = fusion.mask.at(o, first + c);
            for_each_vector<T, N>(
                spans.steps(),
                [&](std::size_t i, auto part) PYBN_INLINE_LAMBDA {
                  dys.fetch(i, part);
                  if (kReadsX) xs.fetch(i, part);
                  if (Act::kReadsResidual) residuals.fetch(i, part);
                  dxs.fetch(i, part);
                  if (kGivesResidual<Act>) dresiduals.fetch(i, part);
                },
                [&](auto lanes, std::size_t i, auto u) PYBN_INLINE_LAMBDA {
                  T* dresidual_at = has_dresidual ? dresiduals.plane() + i : nullptr;
                  dxs.put(lanes, i, u,
                          apply_backward<kTraining>(act, lanes, i, dys.plane() + i, xs.plane() + i,
                                                    residuals.plane() + i, mask, dresidual_at, a, g));
                });
            dys.next_plane();
            xs.next_plane();
            residuals.next_plane();
            dxs.next_plane();
            dresiduals.next_plane();
          }
        }
    });
  }
};

// ---- rows

// One operand of the rows that a reduction takes together, walked along the channels. If they lie one after the other,
// what lies ahead is fetched in the order of memory; in the order of reading, statistics of 56x56x256 take twice as
// long on an EPYC.
template <class T, int N>
class RowsWalk {
 public:
  PYBN_INLINE RowsWalk(const Operand<T>& operand, const Block& block, std::size_t o)
      : at_(operand.at(o, 0, 0)), stride_(operand.outer_stride), is_run_(is_run(operand, block)) {
    // In a run, further by the rows that the first step reads.
    constexpr std::size_t kAhead = kAheadBytes / sizeof(T);
    ahead_ = is_run_ ? static_cast<std::ptrdiff_t>(kAhead + (kRows - 1) * block.channels)
                     : rows_ahead(operand, block, kRows);
  }

  PYBN_INLINE T* row(int r) const { return at_ + r * stride_; }
  PYBN_INLINE void advance() { at_ += N; }

  // Fetches as much as is read of the vectors at c, once per line.
  template <int kCount>
  PYBN_INLINE void fetch(std::size_t c, Count<kCount>) const {
    constexpr std::size_t kLine = kLineBytes / sizeof(T);
    if (is_run_) {
      if (c * kCount % kLine == 0)
        for (std::size_t i = 0; i < N * kCount; i += kLine) fetch(static_cast<std::ptrdiff_t>(c * (kCount - 1) + i));
    } else if (c % kLine == 0) {
      for (int r = 0; r < kCount; ++r) fetch(r * stride_);
    }
  }

 private:
  PYBN_INLINE void fetch(std::ptrdiff_t i) const { __builtin_prefetch(at_ + (ahead_ + i)); }

  T* at_;
  std::ptrdiff_t stride_, ahead_;
  bool is_run_;
};

// Calls rows(o, count) for kRows rows at a time, then for the rest one by one; `count` is a Count.
template <class Rows>
PYBN_INLINE void for_each_rows(std::size_t outer, Rows rows) {
  std::size_t o = 0;
  for (; o + kRows <= outer; o += kRows) rows(o, Count<kRows>{});
  for (; o < outer; ++o) rows(o, Count<1>{});
}

// How an application takes a row.
template <int N>
PYBN_INLINE Steps row_steps(const Block& block) {
  constexpr std::size_t kStep = kUnroll * N;
  return {0, block.channels / kStep, block.channels % kStep / N, block.channels % N};
}

// Calls vector(lanes, c) for every vector of N channels.
template <int N, class Vector>
PYBN_INLINE void for_each_channel_vector(std::size_t channels, Vector vector) {
  std::size_t c = 0;
  for (std::size_t n = channels / N; n > 0; --n, c += N) vector(Whole{}, c);
  if (channels % N > 0) vector(First{channels % N}, c);
}

// The sums of a vector of channels, in memory between rows.
template <class Lanes, class Add>
PYBN_INLINE void add_to_sums(Lanes lanes, double* first, double* second, Add add) {
  SumPair sums{load<kDoubles>(lanes, first), load<kDoubles>(lanes, second)};
  add(sums);
  store<kDoubles>(lanes, first, sums.first);
  store<kDoubles>(lanes, second, sums.second);
}
PYBN_INLINE void set_to_zero(const Block& block, double* first, double* second) {
  for (std::size_t c = 0; c < block.channels; ++c) first[c] = second[c] = 0;
}

struct Rows {
  template <bool kShifted, class T>
  static void stats(Block block, Operand<const T> x, const double* shift, double* sum, double* squares) noexcept {
    constexpr int N = kDoubles;
    set_to_zero(block, sum, squares);
    for_each_rows(block.outer, [&](std::size_t o, auto count) {
      RowsWalk<const T, N> xs(x, block, o);
      for_each_channel_vector<N>(block.channels, [&](auto lanes, std::size_t c) {
        Doubles channel_shift{};
        if (kShifted) channel_shift = load<N>(lanes, shift + c);
        xs.fetch(c, count);
        add_to_sums(lanes, sum + c, squares + c, [&](SumPair& sums) {
          for (int r = 0; r < decltype(count)::value; ++r) {
            const Doubles value = load_wide(lanes, xs.row(r));
            sums.add_value(kShifted ? value - channel_shift : value);
          }
        });
        xs.advance();
      });
    });
  }

  template <class Act, bool kResidual, class T>
  static void elemt(Block block, Operand<const T> x, Operand<T> y, Affine<Arithmetic<T>> affine,
                    const Fusion<T>& fusion) noexcept {
    constexpr int N = kLanes<T>;
    const Act act(fusion);
    const Operand<const T> residual = kResidual ? fusion.residual : x;
    const auto mask_of = [&](std::size_t o) PYBN_INLINE_LAMBDA {
      return kResidual && Act::kReadsZ && fusion.mask ? fusion.mask.at(o, 0) : nullptr;
    };
    if (block.rows_together || (block.channels >= kWideRow && !block.fetches_runs)) {
      for_each_rows(block.outer, [&](std::size_t o, auto count) {
        RowsWalk<const T, N> xs(x, block, o), residuals(residual, block, o);
        RowsWalk<T, N> ys(y, block, o);
        for_each_channel_vector<N>(block.channels, [&](auto lanes, std::size_t c) {
          const auto a = load<N>(lanes, affine, c);
          for (int r = 0; r < decltype(count)::value; ++r)
            store<N>(lanes, ys.row(r),
                     apply_forward<kResidual>(act, lanes, c, xs.row(r), residuals.row(r), mask_of(o + r), a));
          xs.advance();
          residuals.advance();
          ys.advance();
        });
      });
      return;
    }
    const Steps steps = row_steps<N>(block);
    for (std::size_t o = 0; o < block.outer; ++o) {
      const Walk<const T> xs(x, block, o), residuals(residual, block, o);
      Writing<T> ys(y, block, o);
      std::uint8_t* const mask = mask_of(o);
      for_each_vector<T, N>(
          steps,
          [&](std::size_t c, auto part) PYBN_INLINE_LAMBDA {
            xs.fetch(c, part);
            if (kResidual) residuals.fetch(c, part);
            ys.fetch(c, part);
          },
          [&](auto lanes, std::size_t c, auto u) PYBN_INLINE_LAMBDA {
            const auto a = load<N>(lanes, affine, c);
            ys.put(lanes, c, u,
                   apply_forward<kResidual>(act, lanes, c, xs.plane() + c, residuals.plane() + c, mask, a));
          });
    }
  }

  template <class Act, class T>
  static void backward_reduce(Block block, Operand<const T> dy, Operand<const T> x, const double* mean,
                              Affine<Arithmetic<T>> affine, const Fusion<T>& fusion, double* sum_dy,
                              double* sum_dy_xmu) noexcept {
    constexpr int N = kDoubles;
    const Act act(fusion);
    const Operand<const T> residual = Act::kReadsResidual ? fusion.residual : x;
    set_to_zero(block, sum_dy, sum_dy_xmu);
    for_each_rows(block.outer, [&](std::size_t o, auto count) {
      RowsWalk<const T, N> dys(dy, block, o), xs(x, block, o), residuals(residual, block, o);
      for_each_channel_vector<N>(block.channels, [&](auto lanes, std::size_t c) {
        const auto a = load<N>(lanes, affine, c);
        const Doubles wide_mean = load<N>(lanes, mean + c);
        dys.fetch(c, count);
        xs.fetch(c, count);
        if (Act::kReadsResidual) residuals.fetch(c, count);
        add_to_sums(lanes, sum_dy + c, sum_dy_xmu + c, [&](SumPair& sums) {
          for (int r = 0; r < decltype(count)::value; ++r) {
            const std::uint8_t* mask = Act::kReadsMask ? fusion.mask.at(o + r, 0) : nullptr;
            const Doubles dz = wide_backward_through(act, lanes, c, dys.row(r), xs.row(r), residuals.row(r), mask, a);
            sums.add_gradient(dz, load_wide_x(act, lanes, xs.row(r)), wide_mean);
          }
        });
        dys.advance();
        xs.advance();
        residuals.advance();
      });
    });
  }

  template <class Act, bool kTraining, class T>
  static void backward_elemt(Block block, Operand<const T> dy, Operand<const T> x, Operand<T> dx, Operand<T> dresidual,
                             Affine<Arithmetic<T>> affine, const GradientAffine<Arithmetic<T>>* gradient_affine,
                             const Fusion<T>& fusion) noexcept {
    constexpr int N = kLanes<T>;
    constexpr bool kReadsX = kTraining || Act::kReadsZ;
    if (!kReadsX) x = dy;
    const Act act(fusion);
    const Operand<const T> residual = Act::kReadsResidual ? fusion.residual : x;
    const bool has_dresidual = kGivesResidual<Act> && dresidual;
    if (!has_dresidual) dresidual = dx;
    if (block.rows_together) {
      for_each_rows(block.outer, [&](std::size_t o, auto count) {
        RowsWalk<const T, N> dys(dy, block, o), xs(x, block, o), residuals(residual, block, o);
        RowsWalk<T, N> dxs(dx, block, o), dresiduals(dresidual, block, o);
        for_each_channel_vector<N>(block.channels, [&](auto lanes, std::size_t c) {
          const auto a = load<N>(lanes, affine, c);
          const auto g = load<N>(lanes, gradient_affine, c);
          for (int r = 0; r < decltype(count)::value; ++r) {
            const std::uint8_t* mask = Act::kReadsMask ? fusion.mask.at(o + r, 0) : nullptr;
            T* dresidual_at = has_dresidual ? dresiduals.row(r) : nullptr;
            store<N>(lanes, dxs.row(r),
                     apply_backward<kTraining>(act, lanes, c, dys.row(r), xs.row(r), residuals.row(r), mask,
                                               dresidual_at, a, g));
          }
          dys.advance();
          xs.advance();
          residuals.advance();
          dxs.advance();
          dresiduals.advance();
        });
      });
      return;
    }
    const Steps steps = row_steps<N>(block);
    for (std::size_t o = 0; o < block.outer; ++o) {
      const Walk<const T> dys(dy, block, o), xs(x, block, o), residuals(residual, block, o);
      Writing<T> dxs(dx, block, o);
      const Walk<T> dresiduals(dresidual, block, o);
      const std::uint8_t* const mask = Act::kReadsMask ? fusion.mask.at(o, 0) : nullptr;
      for_each_vector<T, N>(
          steps,
          [&](std::size_t c, auto part) PYBN_INLINE_LAMBDA {
            dys.fetch(c, part);
            if (kReadsX) xs.fetch(c, part);
            if (Act::kReadsResidual) residuals.fetch(c, part);
            dxs.fetch(c, part);
            if (kGivesResidual<Act>) dresiduals.fetch(c, part);
          },
          [&](auto lanes, std::size_t c, auto u) PYBN_INLINE_LAMBDA {
            const auto a = load<N>(lanes, affine, c);
            const auto g = load<N>(lanes, gradient_affine, c);
            T* dresidual_at = has_dresidual ? dresiduals.plane() + c : nullptr;
            dxs.put(lanes, c, u,
                    apply_backward<kTraining>(act, lanes, c, dys.plane() + c, xs.plane() + c, residuals.plane() + c,
                                              mask, dresidual_at, a, g));
          });
    }
  }
};

}  // namespace
}  // namespace pybn
