// Weights [out, in] to panels, and rows of what was packed. See linear_tiles.h for the form.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "linear_tiles.h"

namespace jaxserve {

// Where a packed weight's words of 4 bytes lie.
struct PackedLayout {
  char* data;
  int64_t panels;
  int64_t blocks;  // of a panel, the header among them
  int64_t header;  // blocks before the weights

  char* word(int64_t panel, int64_t block, int64_t lane) const {
    return data + ((panel * blocks + header + block) * kPanel + lane) * kRowBlockBytes;
  }
};

// Packs outputs [first, first + 16) of `outputs` as a panel. Words before `whole` lie wholly in a row.
inline void pack_panel(const PackedLayout& to, int64_t panel, const char* weight, int64_t outputs, int64_t row_bytes) {
  const int64_t whole = row_bytes / kRowBlockBytes, words = to.blocks - to.header;
  char* header = to.data + panel * to.blocks * kBlockBytes;
  if (outputs < kPanel || whole < words || to.header) std::memset(header, 0, to.blocks * kBlockBytes);
  for (int64_t block = 0; block < whole; ++block)
    for (int64_t lane = 0; lane < outputs; ++lane)
      std::memcpy(to.word(panel, block, lane), weight + lane * row_bytes + block * kRowBlockBytes, kRowBlockBytes);
  for (int64_t lane = 0; lane < outputs; ++lane) {
    const char* row = weight + lane * row_bytes;
    if (whole < words)
      std::memcpy(to.word(panel, whole, lane), row + whole * kRowBlockBytes, row_bytes - whole * kRowBlockBytes);
    if (!to.header) continue;
    int32_t sum = 0;
    for (int64_t i = 0; i < row_bytes; ++i) sum += static_cast<int8_t>(row[i]);
    std::memcpy(header + lane * sizeof sum, &sum, sizeof sum);
  }
}

// Copies a row of the weight that was packed; an id past the end reads the last row, as XLA's gather does.
inline void unpack_row(const PackedLayout& from, int64_t id, int64_t row_bytes, char* to) {
  id = std::clamp<int64_t>(id, 0, from.panels * kPanel - 1);
  for (int64_t at = 0; at < row_bytes; at += kRowBlockBytes)
    std::memcpy(to + at, from.word(id / kPanel, at / kRowBlockBytes, id % kPanel),
                std::min<int64_t>(kRowBlockBytes, row_bytes - at));
}

}  // namespace jaxserve
