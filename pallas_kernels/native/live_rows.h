// Which rows of a call count: the first of its leading rows and the first of the others. Live rows are numbered without
// gaps; a token is a row of the call.
#pragma once

#include <algorithm>
#include <cstdint>

namespace jaxserve {

class LiveRows {
 public:
  // All of them.
  explicit LiveRows(int64_t tokens) : tokens_(tokens), leading_(tokens), first_(tokens), second_(0) {}

  // [0, counts[0]) and [leading, leading + counts[1]), as far as they exist.
  LiveRows(int64_t tokens, const int32_t* counts, int64_t leading)
      : tokens_(tokens),
        leading_(std::clamp<int64_t>(leading, 0, tokens)),
        first_(std::clamp<int64_t>(counts[0], 0, leading_)),
        second_(std::clamp<int64_t>(counts[1], 0, tokens - leading_)) {}

  int64_t count() const { return first_ + second_; }
  int64_t token(int64_t row) const { return row < first_ ? row : leading_ + row - first_; }
  // The end of the live rows that are neighbours of `row`, in the call too.
  int64_t neighbours_end(int64_t row) const { return row < first_ ? first_ : count(); }

  int64_t dead_count() const { return tokens_ - count(); }
  int64_t dead_token(int64_t dead) const {
    const int64_t gap = leading_ - first_;
    return dead < gap ? first_ + dead : count() + dead;
  }

 private:
  int64_t tokens_, leading_, first_, second_;
};

}  // namespace jaxserve
