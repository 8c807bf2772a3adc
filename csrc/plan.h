// How a tensor is cut into tasks.
//
// Two things must not be confused. The *partition* of a channel's values into segments decides the order of every sum,
// so it depends on the shape alone. The *schedule* (how many channels a task takes, whether it keeps them from the
// reduction to the application) decides only speed, so it may depend on the cache, the element size and the number of
// threads.
#pragma once

#include <cstddef>

#include "kernel_table.h"
#include "layout.h"
#include "pieces.h"

namespace pybn {

// One channel's values, cut into segments of outer_step x inner_step.
struct Partition {
  Extents extents;
  std::size_t outer_step, inner_step;

  std::size_t outer_count() const { return (extents.outer + outer_step - 1) / outer_step; }
  std::size_t inner_count() const { return (extents.inner + inner_step - 1) / inner_step; }
  std::size_t segments() const { return outer_count() * inner_count(); }
};

// One task: a segment of some neighbouring channels. Where it cuts a plane, or a row, it does so between bytes of a
// mask.
struct Tile {
  std::size_t outer, channel, inner;  // where it begins
  Block block;

  // The part of an operand, or of what follows the map, that belongs to this tile; nothing of nothing.
  template <class T>
  Operand<T> of(const Operand<T>& operand) const {
    if (!operand) return {};
    return {operand.at(outer, channel, inner), operand.outer_stride, operand.channel_stride};
  }
  template <class T>
  Operand<T> of(const Pieces<T>& pieces) const {
    const auto [operand, first] = pieces.at_channel(channel);
    return Tile{outer, channel - first, inner, block}.of(operand);
  }
  Mask of(const Mask& mask) const {
    if (!mask) return {};
    const bool is_rows = mask.plane_stride == 0;
    return {mask.at(outer, channel) + (is_rows ? channel : inner) / kMaskValues, mask.outer_stride, mask.plane_stride};
  }
  template <class T>
  Fusion<T> of(const Fusion<T>& fusion) const {
    return {fusion.activation, fusion.negative_slope, of(fusion.residual), of(fusion.mask)};
  }

  // The same, its outer axis reversed: what a reduction read last is read first, while it is still in the cache. Rows
  // are cut into tiles that stay there whole.
  template <class T>
  Operand<T> reversed(const Operand<T>& operand) const {
    return flipped(of(operand));
  }
  template <class T>
  Operand<T> reversed(const Pieces<T>& pieces) const {
    return flipped(of(pieces));
  }
  template <class T>
  Fusion<T> reversed(const Fusion<T>& fusion) const {
    return {fusion.activation, fusion.negative_slope, flipped(of(fusion.residual)), flipped(of(fusion.mask))};
  }

 private:
  template <class Strided>
  Strided flipped(Strided part) const {
    if (block.inner == 1) return part;
    part.data += static_cast<std::ptrdiff_t>(block.outer - 1) * part.outer_stride;
    part.outer_stride = -part.outer_stride;
    return part;
  }
};

struct Plan {
  Partition partition;
  std::size_t group;   // neighbouring channels that one task handles together
  std::size_t wave;    // channels that are reduced before they are applied; a multiple of group
  bool private_slabs;  // a wave is one group, and one task reduces and applies it; other waves run beside it
  int threads;
  bool rows_together;  // see Block

  std::size_t channels() const { return partition.extents.channels; }
};

Tile tile_of(const Plan&, std::size_t segment, std::size_t first_channel, std::size_t channels);

// For a reduction that is followed by an application to the same data; `bytes_per_value` counts every operand that is
// read twice. Groups are divisors of `common_channels`, if that is not 0: those of operands in pieces.
Plan plan_reduction_and_application(const Extents&, std::size_t bytes_per_value, std::size_t common_channels);

// For a reduction alone.
Plan plan_reduction(const Extents&, std::size_t bytes_per_value, std::size_t common_channels);

// For an application alone: its partition is free, since it sums nothing.
Plan plan_application(const Extents&, std::size_t bytes_per_value, std::size_t common_channels);

}  // namespace pybn
