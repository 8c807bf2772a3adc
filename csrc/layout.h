// Reduces a strided array of any rank to the three extents that the kernels know.
#pragma once

#include <cstddef>
#include <optional>
#include <vector>

namespace pybn {

// outer x channels x inner, see kernel_table.h.
struct Extents {
  std::size_t outer, channels, inner;

  bool is_rows() const { return inner == 1; }
  bool is_empty() const { return outer == 0 || channels == 0 || inner == 0; }
  std::size_t per_channel() const { return outer * inner; }
};

// Where one operand's elements lie, in elements; the inner axis is contiguous.
struct Strides {
  std::ptrdiff_t outer, channel;
};

struct Layout {
  Extents extents;
  std::vector<Strides> operands;
};

// The layout of arrays of one shape, each with its own strides (in elements), or nothing if some array cannot be
// described by one outer and one contiguous inner axis. The order of the axes other than the channel axis does not
// matter to batch norm, so they are sorted and merged by the strides of the first array: an NHWC view of NCHW memory
// becomes planes.
std::optional<Layout> find_layout(const std::vector<std::ptrdiff_t>& shape, std::size_t channel_axis,
                                  const std::vector<std::vector<std::ptrdiff_t>>& strides);

// Whether an axis of stride a belongs outside one of stride b: larger strides do, and repeated elements (0) first of
// all.
bool lies_outside(std::ptrdiff_t a, std::ptrdiff_t b);

}  // namespace pybn
