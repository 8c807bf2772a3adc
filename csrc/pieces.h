// An operand, or several that are neighbours along the channels: a concatenation that is nowhere made.
#pragma once

#include <algorithm>
#include <cstddef>
#include <numeric>
#include <utility>
#include <vector>

#include "kernel_table.h"

namespace pybn {

template <class T>
struct Piece {
  std::size_t first_channel, channels;
  Operand<T> operand;
};

template <class T>
class Pieces {
 public:
  Pieces(Operand<T> whole) : whole_(whole) {}  // not explicit: one operand is the usual case
  explicit Pieces(std::vector<Piece<T>> pieces) : whole_(pieces.front().operand), pieces_(std::move(pieces)) {}

  // The operand that has a channel, and the first channel that it has.
  std::pair<Operand<T>, std::size_t> at_channel(std::size_t channel) const {
    if (pieces_.empty()) return {whole_, 0};
    const auto after = std::upper_bound(pieces_.begin(), pieces_.end(), channel,
                                        [](std::size_t c, const Piece<T>& piece) { return c < piece.first_channel; });
    const Piece<T>& piece = *(after - 1);
    return {piece.operand, piece.first_channel};
  }

  // A divisor of every piece's number of channels: groups of so many lie in one piece each. 0 if there is but one.
  std::size_t common_channels() const {
    std::size_t common = 0;
    for (const Piece<T>& piece : pieces_) common = std::gcd(common, piece.channels);
    return common;
  }

 private:
  Operand<T> whole_;
  std::vector<Piece<T>> pieces_;
};

}  // namespace pybn
