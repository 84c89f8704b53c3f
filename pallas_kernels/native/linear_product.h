// x times a packed weight: live rows only, in pieces for any number of threads.
#pragma once

#include <atomic>
#include <vector>

#include "linear_rows.h"
#include "linear_tiles.h"
#include "live_rows.h"

namespace jaxserve {

struct ProductCall {
  const char* x;
  RowForm form;
  const char* weight;
  int64_t halves;        // 2 for SwiGLU: all panels of the gate, then all of the up projection
  int64_t panels;        // of a half
  int64_t panel_stride;  // bytes
  int64_t blocks;
  Epilogue epilogue;
  char* out;
  int64_t size_out;
  LiveRows live;
};

// Memory of the calling thread, kept from call to call.
template <int kPurpose>
char* scratch(int64_t bytes) {
  thread_local std::vector<char> memory;
  if (static_cast<int64_t>(memory.size()) < bytes) memory.resize(bytes);
  return memory.data();
}

// The pieces of a call: first rows are prepared, then multiplied by groups of panels, then dead rows zeroed.
class ProductPieces {
 public:
  ProductPieces(const ProductCall& call, const Tiles& tiles, int64_t threads)
      : call_(call),
        tiles_(tiles),
        threads_(threads),
        rows_(call.live.count()),
        identity_(call.form.is_identity()),
        groups_((call.panels + kMaxPanels - 1) / kMaxPanels),
        dead_pieces_(std::min(threads, call.live.dead_count())) {
    // Pieces enough to go round evenly, with rows enough in each to be worth the reading of the weights.
    const int64_t wanted = (4 * threads + groups_ - 1) / groups_;
    const int64_t rows = std::clamp<int64_t>((rows_ + wanted - 1) / wanted, kLeastChunk, kMostChunk);
    chunk_ = (rows + tiles.max_rows - 1) / tiles.max_rows * tiles.max_rows;
    chunks_ = (rows_ + chunk_ - 1) / chunk_;
    if (identity_) return;
    preparations_ = std::min((rows_ + 1) / 2, 2 * threads);
    prepared_ = scratch<0>(rows_ * (call.form.stride + sizeof(float)));
    scales_ = reinterpret_cast<float*>(prepared_ + rows_ * call.form.stride);
  }

  int64_t count() const { return preparations_ + chunks_ * groups_ + dead_pieces_; }

  void operator()(int64_t piece) {
    if (piece < preparations_) return prepare(piece);
    piece -= preparations_;
    if (piece >= chunks_ * groups_) return zero_dead_rows(piece - chunks_ * groups_);
    // Pieces are taken in order: all of the preparation is in the hands of threads that run.
    while (done_.load(std::memory_order_acquire) < preparations_) simd::pause();
    multiply(piece / groups_ * chunk_, piece % groups_);
  }

 private:
  static constexpr int64_t kLeastChunk = 64;
  static constexpr int64_t kMostChunk = 256;

  void prepare(int64_t piece) {
    float* work = reinterpret_cast<float*>(scratch<1>((call_.form.size + kBlockInputs) * sizeof(float)));
    const int64_t row_bytes = call_.form.size * size_of(call_.form.type);
    for (int64_t row = piece * rows_ / preparations_; row < (piece + 1) * rows_ / preparations_; ++row) {
      char* to = prepared_ + row * call_.form.stride;
      scales_[row] = prepare_row(call_.form, call_.x + call_.live.token(row) * row_bytes, to, work);
    }
    done_.fetch_add(1, std::memory_order_release);
  }

  // The rows of a chunk, from `begin`, times the panels of a group.
  void multiply(int64_t begin, int64_t group) {
    const int64_t chunk_end = std::min(begin + chunk_, rows_);
    const int64_t panel = group * kMaxPanels, panels = std::min<int64_t>(kMaxPanels, call_.panels - panel);
    const int64_t next = std::min(group + threads_, groups_ - 1) * kMaxPanels;
    // The group that this thread will probably take next is fetched meanwhile, a part in each pass over this one.
    const int64_t passes = (chunk_end - begin + tiles_.max_rows - 1) / tiles_.max_rows;
    TileArguments arguments;
    arguments.row_stride = call_.form.stride;
    arguments.panel_stride = call_.panel_stride;
    arguments.blocks = call_.blocks;
    arguments.prefetch_step = kMaxPanels * kBlockBytes / passes;
    int64_t fetched = 0, rows_set = 0;
    alignas(64) char sums[2][kTileBytes];
    for (int64_t row = begin, rows; row < chunk_end; row += rows) {
      rows = std::min<int64_t>(tiles_.max_rows, std::min(call_.live.neighbours_end(row), chunk_end) - row);
      arguments.rows = rows;
      if (tiles_.set_rows && rows != rows_set) tiles_.set_rows(rows_set = rows);
      arguments.x = identity_ ? call_.x + call_.live.token(row) * call_.form.stride : prepared_ + row * call_.form.stride;
      for (int64_t half = 0; half < call_.halves; ++half) {
        const char* weight = call_.weight + half * call_.panels * call_.panel_stride;
        arguments.prefetch = weight + next * call_.panel_stride + fetched;
        arguments.panels = weight + panel * call_.panel_stride;
        multiply_tile(arguments, rows, panels, sums[half]);
      }
      fetched += arguments.prefetch_step * call_.blocks;
      finish(row, rows, panel, panels, sums[0], sums[1]);
    }
    if (tiles_.set_rows) tiles_.set_rows(0);
  }

  void multiply_tile(TileArguments arguments, int64_t rows, int64_t panels, char* sums) const {
    arguments.out = sums;
    if (panels == kMaxPanels) return tiles_.wide[rows - 1](arguments);
    for (int64_t p = 0; p < panels; ++p) {
      tiles_.narrow[rows - 1](arguments);
      arguments.panels += call_.panel_stride;
      arguments.out = static_cast<char*>(arguments.out) + rows * kPanel * 4;
    }
  }

  // Writes a tile's outputs, what there is of them.
  void finish(int64_t row, int64_t rows, int64_t panel, int64_t panels, const char* sums, const char* up_sums) const {
    const Epilogue epilogue = call_.epilogue;
    const bool gated = call_.halves == 2;
    const int64_t size_out = call_.size_out, item = size_of(epilogue.type), token = call_.live.token(row);
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t column = (panel + p) * kPanel, count = std::min<int64_t>(kPanel, size_out - column);
      for (int64_t i = 0; i < rows; ++i, sums += kPanel * 4, up_sums += kPanel * 4) {
        const float scale = identity_ ? 1.0f : scales_[row + i];
        const int64_t at = ((token + i) * size_out + column) * item;
        Lanes lanes = scaled(epilogue, sums, scale, column, count);
        if (gated) lanes = swiglu(lanes, scaled(epilogue, up_sums, scale, size_out + column, count));
        if (epilogue.residual) {
          const Lanes residual = load_lanes(epilogue.residual + at, epilogue.type, count);
          for (int v = 0; v < kVectors; ++v) lanes.at[v] += residual.at[v];
        }
        store_lanes(call_.out + at, epilogue.type, lanes, count);
      }
    }
  }

  void zero_dead_rows(int64_t piece) const {
    const int64_t row_bytes = call_.size_out * size_of(call_.epilogue.type);
    const int64_t dead = call_.live.dead_count();
    for (int64_t i = piece * dead / dead_pieces_; i < (piece + 1) * dead / dead_pieces_; ++i)
      std::memset(call_.out + call_.live.dead_token(i) * row_bytes, 0, row_bytes);
  }

  static constexpr int kTileBytes = Tiles::kMostRows * kMaxPanels * kPanel * 4;

  const ProductCall& call_;
  const Tiles& tiles_;
  const int64_t threads_;
  const int64_t rows_;
  const bool identity_;
  const int64_t groups_;
  const int64_t dead_pieces_;
  int64_t chunk_, chunks_;
  int64_t preparations_ = 0;
  char* prepared_ = nullptr;
  float* scales_ = nullptr;
  std::atomic<int64_t> done_{0};
};

}  // namespace jaxserve
