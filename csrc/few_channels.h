// Rows of few channels: several of them are taken as one row of as many times the channels, so that vectors are full.
// Three channels would otherwise leave five lanes of eight idle.
#pragma once

#include "kernels.h"

namespace pybn {
namespace {

class FewChannels {
  // Rows together are a multiple of eight, whatever the set, so that their number does not depend on it.
  static constexpr std::size_t kVector = 8, kMostChannels = kVector * kFewChannels;

 public:
  PYBN_INLINE explicit FewChannels(const Block& block) : block_(block) {
    if (block.channels >= kFewChannels) return;
    std::size_t step = 1;
    while (step * block.channels % kVector != 0) step *= 2;
    const std::size_t channels = step * block.channels;
    rows_ = step * ((kFewChannels + channels - 1) / channels);
  }

  // Whether the rows of every operand that is there lie one after the other.
  template <class... Operands>
  PYBN_INLINE bool apply_to(const Operands&... operands) const {
    return rows_ > 1 && block_.outer >= rows_ && (is_dense(operands) && ...);
  }

  // Rows taken together, and the rows that are left.
  PYBN_INLINE Block together() const { return part(block_.outer / rows_, rows_ * block_.channels); }
  PYBN_INLINE Block rest() const { return part(block_.outer % rows_, block_.channels); }

  template <class T>
  PYBN_INLINE Operand<T> together(Operand<T> operand) const {
    operand.outer_stride *= static_cast<std::ptrdiff_t>(rows_);
    return operand;
  }
  template <class T>
  PYBN_INLINE Operand<T> rest(Operand<T> operand) const {
    if (operand) operand.data = operand.at(block_.outer / rows_ * rows_, 0, 0);
    return operand;
  }
  template <class T>
  PYBN_INLINE Fusion<T> together(Fusion<T> fusion) const {
    fusion.residual = together(fusion.residual);
    fusion.mask.outer_stride *= static_cast<std::ptrdiff_t>(rows_);
    return fusion;
  }
  template <class T>
  PYBN_INLINE Fusion<T> rest(Fusion<T> fusion) const {
    fusion.residual = rest(fusion.residual);
    if (fusion.mask) fusion.mask.data = fusion.mask.at(block_.outer / rows_ * rows_, 0);
    return fusion;
  }

  // Per-channel values, once for each of the rows.
  template <class V>
  struct Repeated {
    V values[kMostChannels];
    PYBN_INLINE Repeated(const FewChannels& few, const V* from) {
      const std::size_t channels = few.block_.channels;
      for (std::size_t k = 0; k < few.rows_; ++k)
        for (std::size_t c = 0; c < channels; ++c) values[k * channels + c] = from[c];
    }
  };
  template <class A>
  struct RepeatedAffine {
    Repeated<A> center, scale, shift;
    PYBN_INLINE RepeatedAffine(const FewChannels& few, Affine<A> a)
        : center(few, a.center), scale(few, a.scale), shift(few, a.shift) {}
    PYBN_INLINE Affine<A> affine() const { return {center.values, scale.values, shift.values}; }
  };

  struct Sums {
    double first[kMostChannels], second[kMostChannels];
    // Adds the sums of each of the rows to those of the rest.
    PYBN_INLINE void add_to(const FewChannels& few, double* rest_first, double* rest_second) const {
      const std::size_t channels = few.block_.channels;
      for (std::size_t k = 0; k < few.rows_; ++k)
        for (std::size_t c = 0; c < channels; ++c) {
          rest_first[c] += first[k * channels + c];
          rest_second[c] += second[k * channels + c];
        }
    }
  };

 private:
  PYBN_INLINE Block part(std::size_t outer, std::size_t channels) const {
    Block part = block_;
    part.outer = outer;
    part.channels = channels;
    return part;
  }
  template <class T>
  PYBN_INLINE bool is_dense(const Operand<T>& operand) const {
    return !operand || operand.outer_stride == static_cast<std::ptrdiff_t>(block_.channels);
  }
  template <class T>
  PYBN_INLINE bool is_dense(const Fusion<T>& fusion) const {
    return is_dense(fusion.residual) && (!fusion.mask || block_.channels % kVector == 0);
  }

  Block block_;
  std::size_t rows_ = 1;
};

// The kernels of Rows, with rows of few channels taken together.
struct RowsOfAnyLength {
  template <bool kShifted, class T>
  static void stats(Block block, Operand<const T> x, const double* shift, double* sum, double* squares) noexcept {
    const FewChannels few(block);
    if (!few.apply_to(x)) return Rows::stats<kShifted>(block, x, shift, sum, squares);
    FewChannels::Sums sums;
    if constexpr (kShifted) {
      const FewChannels::Repeated<double> shifts(few, shift);
      Rows::stats<true>(few.together(), few.together(x), shifts.values, sums.first, sums.second);
    } else {
      Rows::stats<false>(few.together(), few.together(x), nullptr, sums.first, sums.second);
    }
    Rows::stats<kShifted>(few.rest(), few.rest(x), shift, sum, squares);
    sums.add_to(few, sum, squares);
  }

  template <class Act, bool kResidual, class T>
  static void elemt(Block block, Operand<const T> x, Operand<T> y, Affine<Arithmetic<T>> affine,
                    const Fusion<T>& fusion) noexcept {
    const FewChannels few(block);
    if (!few.apply_to(x, y, fusion)) return Rows::elemt<Act, kResidual>(block, x, y, affine, fusion);
    const FewChannels::RepeatedAffine<Arithmetic<T>> repeated(few, affine);
    Rows::elemt<Act, kResidual>(few.together(), few.together(x), few.together(y), repeated.affine(),
                                few.together(fusion));
    Rows::elemt<Act, kResidual>(few.rest(), few.rest(x), few.rest(y), affine, few.rest(fusion));
  }

  template <class Act, class T>
  static void backward_reduce(Block block, Operand<const T> dy, Operand<const T> x, const double* mean,
                              Affine<Arithmetic<T>> affine, const Fusion<T>& fusion, double* sum_dy,
                              double* sum_dy_xmu) noexcept {
    const FewChannels few(block);
    if (!few.apply_to(dy, x, fusion))
      return Rows::backward_reduce<Act>(block, dy, x, mean, affine, fusion, sum_dy, sum_dy_xmu);
    const FewChannels::Repeated<double> means(few, mean);
    const FewChannels::RepeatedAffine<Arithmetic<T>> repeated(few, affine);
    FewChannels::Sums sums;
    Rows::backward_reduce<Act>(few.together(), few.together(dy), few.together(x), means.values, repeated.affine(),
                               few.together(fusion), sums.first, sums.second);
    Rows::backward_reduce<Act>(few.rest(), few.rest(dy), few.rest(x), mean, affine, few.rest(fusion), sum_dy,
                               sum_dy_xmu);
    sums.add_to(few, sum_dy, sum_dy_xmu);
  }

  template <class Act, bool kTraining, class T>
  static void backward_elemt(Block block, Operand<const T> dy, Operand<const T> x, Operand<T> dx, Operand<T> dresidual,
                             Affine<Arithmetic<T>> affine, const GradientAffine<Arithmetic<T>>* gradient_affine,
                             const Fusion<T>& fusion) noexcept {
    using A = Arithmetic<T>;
    const FewChannels few(block);
    if (!few.apply_to(dy, x, dx, dresidual, fusion))
      return Rows::backward_elemt<Act, kTraining>(block, dy, x, dx, dresidual, affine, gradient_affine, fusion);
    const FewChannels::RepeatedAffine<A> repeated(few, affine);
    const A* none = affine.scale;  // what an absent gradient affine is filled with, unread
    const FewChannels::Repeated<A> slope(few, gradient_affine ? gradient_affine->slope : none);
    const FewChannels::Repeated<A> offset(few, gradient_affine ? gradient_affine->offset : none);
    const GradientAffine<A> repeated_gradient{slope.values, offset.values};
    Rows::backward_elemt<Act, kTraining>(few.together(), few.together(dy), few.together(x), few.together(dx),
                                         few.together(dresidual), repeated.affine(),
                                         gradient_affine ? &repeated_gradient : nullptr, few.together(fusion));
    Rows::backward_elemt<Act, kTraining>(few.rest(), few.rest(dy), few.rest(x), few.rest(dx), few.rest(dresidual),
                                         affine, gradient_affine, few.rest(fusion));
  }
};

}  // namespace
}  // namespace pybn
