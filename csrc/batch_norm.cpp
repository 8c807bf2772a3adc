#include "batch_norm.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "dispatch.h"
#include "parallel.h"
#include "plan.h"

namespace pybn {
namespace {

// A value per segment and channel.
//
// Every segment's values begin on lines of their own, and on pairs of lines, which the hardware fetches together:
// kernels update sums at every step, and threads that shared a line would wait for each other (NHWC statistics of 64
// channels took 1.0 copies instead of 0.5).
class Partials {
 public:
  explicit Partials(const Partition& partition)
      : segments_(partition.segments()),
        lines_((partition.extents.channels + kLineDoubles - 1) / kLineDoubles),
        values_(new Line[segments_ * lines_]) {}

  double* at(std::size_t segment, std::size_t channel) {
    return reinterpret_cast<double*>(values_.get() + segment * lines_) + channel;
  }

  // Adds those of all segments to those of the first. The order is that of the segments, and so of the shape alone.
  void merge(std::size_t first_channel, std::size_t channels) {
    double* total = at(0, first_channel);
    for (std::size_t segment = 1; segment < segments_; ++segment) {
      const double* part = at(segment, first_channel);
      for (std::size_t c = 0; c < channels; ++c) total[c] += part[c];
    }
  }

 private:
  static constexpr std::size_t kLineDoubles = 16;
  struct alignas(128) Line {
    double values[kLineDoubles];
  };

  std::size_t segments_, lines_;
  std::unique_ptr<Line[]> values_;
};

// Tasks of a wave are numbered by segment, then by group of channels: neighbours in memory are neighbours in number.
struct Wave {
  const Plan& plan;
  std::size_t first, channels;

  Wave(const Plan& plan, std::size_t number)
      : plan(plan), first(number * plan.wave), channels(std::min(plan.wave, plan.channels() - first)) {}

  std::size_t groups() const { return (channels + plan.group - 1) / plan.group; }
  std::size_t tasks() const { return plan.partition.segments() * groups(); }
  std::size_t segment(std::size_t task) const { return task / groups(); }
  Tile tile(std::size_t task) const {
    const std::size_t begin = task % groups() * plan.group;
    return tile_of(plan, segment(task), first + begin, std::min(plan.group, channels - begin));
  }
};

// A wave that threads share. Each applies first what it has just reduced.
struct SharedWave {
  Wave wave;
  Tasks reductions, applications;
  std::unique_ptr<Latch> merged{new Latch};

  explicit SharedWave(const Wave& wave)
      : wave(wave),
        reductions(wave.tasks(), wave.plan.threads),
        applications(wave.tasks(), wave.plan.threads, Tasks::Order::last_to_first) {}
};

// A whole pass: reduce(tile, segment) for all tiles of a wave, merge(first_channel, channels) their partial results,
// apply(tile) for the same tiles, last first; wave after wave.
template <class Reduce, class Merge, class Apply>
void run(const Plan& plan, const Reduce& reduce, const Merge& merge, const Apply& apply) {
  const std::size_t waves = (plan.channels() + plan.wave - 1) / plan.wave;
  if (plan.private_slabs) {
    parallel_for(waves, plan.threads, [&](std::size_t number) {
      const Wave wave(plan, number);
      for (std::size_t task = 0; task < wave.tasks(); ++task) reduce(wave.tile(task), wave.segment(task));
      merge(wave.first, wave.channels);
      for (std::size_t task = wave.tasks(); task-- > 0;) apply(wave.tile(task));
    });
    return;
  }
  // Who is done with a wave goes on with the next. With a barrier instead, a call took ten times as long when other
  // processes held the cores, because all threads wait at every barrier for one that is not running.
  std::vector<SharedWave> shared;
  shared.reserve(waves);
  for (std::size_t number = 0; number < waves; ++number) shared.emplace_back(Wave(plan, number));
  run_together(plan.threads, [&](Thread& thread) {
    for (SharedWave& s : shared) {
      const Wave& wave = s.wave;
      thread.run(s.reductions, [&](std::size_t task) {
        reduce(wave.tile(task), wave.segment(task));
        s.merged->done(wave.tasks(), [&] { merge(wave.first, wave.channels); });
      });
      thread.wait(*s.merged);
      thread.run(s.applications, [&](std::size_t task) { apply(wave.tile(task)); });
    }
  });
}

// The first half of a pass, and the second, on their own.
template <class Reduce, class Merge>
void run_reduction(const Plan& plan, const Reduce& reduce, const Merge& merge) {
  const Wave all(plan, 0);
  parallel_for(all.tasks(), plan.threads, [&](std::size_t task) { reduce(all.tile(task), all.segment(task)); });
  merge(std::size_t{0}, all.channels);
}

template <class Apply>
void run_application(const Plan& plan, const Apply& apply) {
  const Wave all(plan, 0);
  parallel_for(all.tasks(), plan.threads, [&](std::size_t task) { apply(all.tile(task)); });
}

template <class T>
const Kernels<T>& kernels_for(const Extents& extents) {
  const KernelTable<T>& table = kernels<T>();
  return extents.is_rows() ? table.rows : is_amd() ? table.planes_on_amd : table.planes;
}

// The reduction of a statistics pass and its merge, as steps for run().
//
// That a channel has one shift for all segments makes merging an addition, so sums that are exact stay exact.
template <class T>
class StatsReduction {
 public:
  StatsReduction(const Plan& plan, const Pieces<const T>& x)
      : extents_(plan.partition.extents),
        kernels_(kernels_for<T>(extents_)),
        x_(x),
        shifts_(plan.partition),
        sums_(plan.partition),
        squares_(plan.partition) {}

  void reduce(const Tile& tile, std::size_t segment) {
    double* shifts = shifts_.at(segment, tile.channel);
    const bool are_used = kernels<T>().channels.shifts(tile.block.channels, sample(tile.channel), shifts);
    kernels_.stats(tile.block, tile.of(x_), are_used ? shifts : nullptr, sums_.at(segment, tile.channel),
                   squares_.at(segment, tile.channel));
  }

  // `remainder`, if given, gets what rounding takes from the mean.
  void merge(std::size_t first, std::size_t channels, double* mean, double* var, double* remainder = nullptr) {
    sums_.merge(first, channels);
    squares_.merge(first, channels);
    kernels<T>().channels.statistics(channels, static_cast<double>(extents_.per_channel()), shifts_.at(0, first),
                                     sums_.at(0, first), squares_.at(0, first), mean + first, var + first,
                                     remainder ? remainder + first : nullptr);
  }

 private:
  // Values of a channel, and of its neighbours: far apart, because those side by side are often alike.
  Operand<const T> sample(std::size_t channel) const {
    const auto [operand, first] = x_.at_channel(channel);
    const auto stride = extents_.is_rows()
                            ? static_cast<std::ptrdiff_t>(extents_.outer / kSampled) * operand.outer_stride
                            : static_cast<std::ptrdiff_t>(extents_.inner / kSampled);
    return {operand.at(0, channel - first, 0), stride, operand.channel_stride};
  }

  const Extents& extents_;
  const Kernels<T>& kernels_;
  const Pieces<const T>& x_;
  Partials shifts_, sums_, squares_;
};

// The reduction of a backward pass and its merge.
template <class T>
class GradientReduction {
 public:
  GradientReduction(const Plan& plan, Operand<const T> dy, const Pieces<const T>& x,
                    const Normalization<T>& normalization, const Fusion<T>& fusion)
      : kernels_(kernels_for<T>(plan.partition.extents)),
        dy_(dy),
        x_(x),
        normalization_(normalization),
        fusion_(fusion),
        sums_dy_(plan.partition),
        sums_dy_xmu_(plan.partition) {}

  void reduce(const Tile& tile, std::size_t segment) {
    kernels_.backward_reduce(tile.block, tile.of(dy_), tile.of(x_), normalization_.mean + tile.channel,
                             normalization_.affine().from(tile.channel), tile.of(fusion_),
                             sums_dy_.at(segment, tile.channel), sums_dy_xmu_.at(segment, tile.channel));
  }

  void merge(std::size_t first_channel, std::size_t channels, double* sum_dy, double* sum_dy_xmu) {
    sums_dy_.merge(first_channel, channels);
    sums_dy_xmu_.merge(first_channel, channels);
    std::copy_n(sums_dy_.at(0, first_channel), channels, sum_dy + first_channel);
    std::copy_n(sums_dy_xmu_.at(0, first_channel), channels, sum_dy_xmu + first_channel);
  }

 private:
  const Kernels<T>& kernels_;
  Operand<const T> dy_;
  const Pieces<const T>& x_;
  const Normalization<T>& normalization_;
  const Fusion<T>& fusion_;
  Partials sums_dy_, sums_dy_xmu_;
};

// What dx depends on besides dz, x and the normalization.
template <class T>
struct GradientCoefficients {
  using A = Arithmetic<T>;
  std::vector<A> slope, offset;

  explicit GradientCoefficients(std::size_t channels) : slope(channels), offset(channels) {}

  void set(std::size_t first, std::size_t channels, const Normalization<T>& n, const GradientSums& sums) {
    kernels<T>().channels.gradient(channels, sums.count, sums.sum_dy + first, sums.sum_dy_xmu + first, n.from(first),
                                   slope.data() + first, offset.data() + first);
  }
  GradientAffine<A> from(std::size_t c) const { return {slope.data() + c, offset.data() + c}; }
};

}  // namespace

template <class T>
void normalize(std::size_t first, std::size_t channels, const double* var, Parameter weight, Parameter bias, double eps,
               const Normalization<T>& normalization) {
  double weights[kGroup], biases[kGroup];
  for (const std::size_t end = first + channels; first < end; first += kGroup) {
    const std::size_t count = std::min(kGroup, end - first);
    weight.read(first, count, 1, weights);
    bias.read(first, count, 0, biases);
    kernels<T>().channels.normalize(count, var + first, weights, biases, eps, normalization.from(first));
  }
}

template <class T>
void batch_norm_stats(const Extents& extents, Operand<const T> x, double* mean, double* var, double* remainder) {
  const Plan plan = plan_reduction(extents, sizeof(T), 0);
  const Pieces<const T> pieces(x);
  StatsReduction<T> stats(plan, pieces);
  run_reduction(
      plan, [&](const Tile& tile, std::size_t segment) { stats.reduce(tile, segment); },
      [&](std::size_t first, std::size_t channels) { stats.merge(first, channels, mean, var, remainder); });
}

template <class T>
void batch_norm_forward(const Extents& extents, const Pieces<const T>& x, Operand<T> y, Parameter weight,
                        Parameter bias, double eps, const Fusion<T>& fusion, double* var,
                        const Normalization<T>& normalization) {
  const Plan plan = plan_reduction_and_application(extents, sizeof(T), x.common_channels());
  const Kernels<T>& kernels = kernels_for<T>(extents);
  StatsReduction<T> stats(plan, x);
  run(
      plan, [&](const Tile& tile, std::size_t segment) { stats.reduce(tile, segment); },
      [&](std::size_t first, std::size_t channels) {
        stats.merge(first, channels, normalization.mean, var);
        normalize<T>(first, channels, var, weight, bias, eps, normalization);
      },
      [&](const Tile& tile) {
        kernels.elemt(tile.block, tile.reversed(x), tile.reversed(y), normalization.affine().from(tile.channel),
                      tile.reversed(fusion));
      });
}

template <class T>
void batch_norm_elemt(const Extents& extents, const Pieces<const T>& x, Operand<T> y,
                      const Normalization<T>& normalization, const Fusion<T>& fusion) {
  const Kernels<T>& kernels = kernels_for<T>(extents);
  run_application(plan_application(extents, sizeof(T), x.common_channels()), [&](const Tile& tile) {
    kernels.elemt(tile.block, tile.of(x), tile.of(y), normalization.affine().from(tile.channel), tile.of(fusion));
  });
}

template <class T>
void batch_norm_backward(const Extents& extents, const GradientOperands<T>& operands,
                         const Normalization<T>& normalization, const Fusion<T>& fusion, bool training, double* sum_dy,
                         double* sum_dy_xmu) {
  const Plan plan = plan_reduction_and_application(extents, 2 * sizeof(T), operands.x.common_channels());
  const Kernels<T>& kernels = kernels_for<T>(extents);
  const double count = static_cast<double>(extents.per_channel());
  GradientReduction<T> sums(plan, operands.dy, operands.x, normalization, fusion);
  GradientCoefficients<T> coefficients(extents.channels);
  run(
      plan, [&](const Tile& tile, std::size_t segment) { sums.reduce(tile, segment); },
      [&](std::size_t first, std::size_t channels) {
        sums.merge(first, channels, sum_dy, sum_dy_xmu);
        coefficients.set(first, channels, normalization, {sum_dy, sum_dy_xmu, count});
      },
      [&](const Tile& tile) {
        const auto gradient = coefficients.from(tile.channel);
        kernels.backward_elemt(tile.block, tile.reversed(operands.dy), tile.reversed(operands.x),
                               tile.reversed(operands.dx), tile.reversed(operands.dresidual),
                               normalization.affine().from(tile.channel), training ? &gradient : nullptr,
                               tile.reversed(fusion));
      });
}

template <class T>
void batch_norm_backward_reduce(const Extents& extents, Operand<const T> dy, const Pieces<const T>& x,
                                const Normalization<T>& normalization, const Fusion<T>& fusion, double* sum_dy,
                                double* sum_dy_xmu) {
  const Plan plan = plan_reduction(extents, 2 * sizeof(T), x.common_channels());
  GradientReduction<T> sums(plan, dy, x, normalization, fusion);
  run_reduction(
      plan, [&](const Tile& tile, std::size_t segment) { sums.reduce(tile, segment); },
      [&](std::size_t first, std::size_t channels) { sums.merge(first, channels, sum_dy, sum_dy_xmu); });
}

template <class T>
void batch_norm_backward_elemt(const Extents& extents, const GradientOperands<T>& operands,
                               const Normalization<T>& normalization, const Fusion<T>& fusion,
                               const GradientSums* sums) {
  const Kernels<T>& kernels = kernels_for<T>(extents);
  GradientCoefficients<T> coefficients(sums ? extents.channels : 0);
  if (sums) coefficients.set(0, extents.channels, normalization, *sums);
  const Plan plan = plan_application(extents, 2 * sizeof(T), operands.x.common_channels());
  run_application(plan, [&](const Tile& tile) {
    const auto gradient = coefficients.from(tile.channel);
    kernels.backward_elemt(tile.block, tile.of(operands.dy), tile.of(operands.x), tile.of(operands.dx),
                           tile.of(operands.dresidual), normalization.affine().from(tile.channel),
                           sums ? &gradient : nullptr, tile.of(fusion));
  });
}

void RunningStatistic::update(std::size_t channels, const double* batch, double factor, double momentum) const {
  const auto blend = [&](double old, std::size_t c) { return (1 - momentum) * old + momentum * (factor * batch[c]); };
  for (std::size_t c = 0; c < channels; ++c) {
    char* at = data + static_cast<std::ptrdiff_t>(c) * byte_stride;
    if (is_double)
      *reinterpret_cast<double*>(at) = blend(*reinterpret_cast<double*>(at), c);
    else
      *reinterpret_cast<float*>(at) = static_cast<float>(blend(*reinterpret_cast<float*>(at), c));
  }
}

#define PYBN_INSTANTIATE(T)                                                                                          \
  template void normalize(std::size_t, std::size_t, const double*, Parameter, Parameter, double,                     \
                          const Normalization<T>&);                                                                  \
  template void batch_norm_stats(const Extents&, Operand<const T>, double*, double*, double*);                       \
  template void batch_norm_forward(const Extents&, const Pieces<const T>&, Operand<T>, Parameter, Parameter, double, \
                                   const Fusion<T>&, double*, const Normalization<T>&);                              \
  template void batch_norm_elemt(const Extents&, const Pieces<const T>&, Operand<T>, const Normalization<T>&,        \
                                 const Fusion<T>&);                                                                  \
  template void batch_norm_backward(const Extents&, const GradientOperands<T>&, const Normalization<T>&,             \
                                    const Fusion<T>&, bool, double*, double*);                                       \
  template void batch_norm_backward_reduce(const Extents&, Operand<const T>, const Pieces<const T>&,                 \
                                           const Normalization<T>&, const Fusion<T>&, double*, double*);             \
  template void batch_norm_backward_elemt(const Extents&, const GradientOperands<T>&, const Normalization<T>&,       \
                                          const Fusion<T>&, const GradientSums*);

PYBN_INSTANTIATE(float)
PYBN_INSTANTIATE(double)
PYBN_INSTANTIATE(Float16)
PYBN_INSTANTIATE(BFloat16)

}  // namespace pybn
