#include "layout.h"

#include <algorithm>
#include <cstdlib>

namespace pybn {
namespace {

// One axis, or several merged: its size and its stride in every operand.
struct Axis {
  std::ptrdiff_t size;
  std::vector<std::ptrdiff_t> strides;

  bool is_contiguous() const {
    return std::all_of(strides.begin(), strides.end(), [](std::ptrdiff_t s) { return s == 1; });
  }
};

// Whether stepping `outer` once equals stepping through all of `inner`, in every operand.
bool can_merge(const Axis& outer, const Axis& inner) {
  for (std::size_t k = 0; k < outer.strides.size(); ++k)
    if (outer.strides[k] != inner.size * inner.strides[k]) return false;
  return true;
}

// The axes other than the channel axis, from the largest stride to the smallest, merged where possible.
std::vector<Axis> merged_axes(std::vector<Axis> axes) {
  std::stable_sort(axes.begin(), axes.end(),
                   [](const Axis& a, const Axis& b) { return lies_outside(a.strides[0], b.strides[0]); });
  std::vector<Axis> merged;
  for (Axis& axis : axes) {
    if (!merged.empty() && can_merge(merged.back(), axis)) {
      merged.back().size *= axis.size;
      merged.back().strides = std::move(axis.strides);
    } else {
      merged.push_back(std::move(axis));
    }
  }
  return merged;
}

}  // namespace

std::optional<Layout> find_layout(const std::vector<std::ptrdiff_t>& shape, std::size_t channel_axis,
                                  const std::vector<std::vector<std::ptrdiff_t>>& strides) {
  const std::size_t operands = strides.size();
  const auto axis_of = [&](std::size_t d) {
    Axis axis{shape[d], {}};
    for (const auto& s : strides) axis.strides.push_back(s[d]);
    return axis;
  };

  Axis channel = axis_of(channel_axis);
  std::vector<Axis> others;
  bool empty = channel.size == 0;
  for (std::size_t d = 0; d < shape.size(); ++d) {
    empty = empty || shape[d] == 0;
    if (d != channel_axis && shape[d] != 1) others.push_back(axis_of(d));
  }
  const auto extents = [&](std::ptrdiff_t outer, std::ptrdiff_t inner) {
    return Extents{static_cast<std::size_t>(outer), static_cast<std::size_t>(channel.size),
                   static_cast<std::size_t>(inner)};
  };
  if (empty) return Layout{extents(0, 1), std::vector<Strides>(operands, Strides{0, 0})};

  const Axis none{1, std::vector<std::ptrdiff_t>(operands, 0)};
  std::vector<Axis> axes = merged_axes(std::move(others));
  const auto layout = [&](const Axis& outer, const Axis& inner) {
    Layout result{extents(outer.size, inner.size), {}};
    for (std::size_t k = 0; k < operands; ++k) result.operands.push_back({outer.strides[k], channel.strides[k]});
    return result;
  };

  if (axes.empty()) axes.push_back(none);
  if (axes.size() <= 2 && axes.back().is_contiguous())
    return layout(axes.size() == 2 ? axes.front() : none, axes.back());
  if (axes.size() == 1 && (channel.is_contiguous() || channel.size == 1)) return layout(axes.front(), none);
  return std::nullopt;
}

bool lies_outside(std::ptrdiff_t a, std::ptrdiff_t b) {
  if (a == 0 || b == 0) return a == 0 && b != 0;
  return std::abs(a) > std::abs(b);
}

}  // namespace pybn
