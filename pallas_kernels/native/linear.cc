// x times a packed weight, as an XLA custom call: live rows only, split by panels over XLA's own threads.

#include <atomic>
#include <vector>

#include "linear_rows.h"
#include "linear_tiles.h"
#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace jaxserve {
namespace {

namespace ffi = xla::ffi;

// Rows [begin, begin + count) of x and out; `first` is the number of live rows before them.
struct LiveRange {
  int64_t begin, count, first;
};

struct Call {
  const char* x;
  RowForm form;
  const char* weight;
  int64_t halves;  // 2 for SwiGLU: all panels of the gate, then of the up projection
  int64_t panels;  // of a half
  int64_t panel_stride;
  int64_t blocks;
  Epilogue epilogue;
  char* out;
  int64_t tokens;
  int64_t size_out;
  LiveRange live[2];

  int64_t live_rows() const { return live[0].count + live[1].count; }
};

const Tiles& tiles_for(Type weights) {
  static const Tiles bfloat16 = bfloat16_tiles(), floats = float_tiles(), int8 = int8_tiles();
  return weights == Type::kBfloat16 ? bfloat16 : weights == Type::kFloat ? floats : int8;
}

class Product {
 public:
  Product(const Call& call, int64_t threads)
      : call_(call), tiles_(tiles_for(call.form.weights)), threads_(threads), identity_(call.form.is_identity()) {
    const int64_t rows = call.live_rows();
    groups_ = (call.panels + kMaxPanels - 1) / kMaxPanels;
    // Enough pieces to go round evenly, but rows enough in each to be worth the reading of the weights.
    const int64_t wanted = (4 * threads + groups_ - 1) / groups_;
    chunk_ = std::max<int64_t>(kChunkRows, (rows + wanted - 1) / wanted);
    chunk_ = std::min((chunk_ + kMaxRows - 1) / kMaxRows * kMaxRows, kMostChunkRows);
    chunks_ = (rows + chunk_ - 1) / chunk_;
    if (!identity_) {
      preparations_ = std::min((rows + kMaxRows - 1) / kMaxRows, 2 * threads);
      prepared_ = scratch(rows * call.form.stride + rows * sizeof(float));
      scales_ = reinterpret_cast<float*>(prepared_ + rows * call.form.stride);
    }
  }

  int64_t pieces() const { return preparations_ + chunks_ * groups_ + 1; }

  void run(int64_t piece) {
    if (piece < preparations_) return prepare(piece);
    // Pieces are taken in order: all of the preparation is in the hands of threads that run.
    while (done_.load(std::memory_order_acquire) < preparations_) cpu_relax();
    piece -= preparations_;
    if (piece == chunks_ * groups_) return zero_dead_rows();
    multiply(piece / groups_ * chunk_, piece % groups_);
  }

 private:
  static constexpr int64_t kChunkRows = 64;
  static constexpr int64_t kMostChunkRows = 256;

  // Memory of the calling thread, kept from call to call.
  static char* scratch(int64_t bytes) {
    thread_local std::vector<char> memory;
    if (static_cast<int64_t>(memory.size()) < bytes) memory.resize(bytes);
    return memory.data();
  }

  void prepare(int64_t piece) {
    const int64_t rows = call_.live_rows();
    std::vector<float> work((call_.form.size + kPanel - 1) / kPanel * kPanel);
    const int64_t row_bytes = call_.form.size * size_of(call_.form.type);
    for (int64_t row = piece * rows / preparations_; row < (piece + 1) * rows / preparations_; ++row) {
      const LiveRange& range = call_.live[row >= call_.live[1].first];
      const char* x = call_.x + (range.begin + row - range.first) * row_bytes;
      scales_[row] = prepare_row(call_.form, x, prepared_ + row * call_.form.stride, work.data());
    }
    done_.fetch_add(1, std::memory_order_release);
  }

  // The rows of a chunk times the panels of a group.
  void multiply(int64_t chunk_begin, int64_t group) {
    const int64_t panel = group * kMaxPanels, count = std::min<int64_t>(kMaxPanels, call_.panels - panel);
    const int64_t chunk_end = std::min(chunk_begin + chunk_, call_.live_rows());
    const int64_t passes = (chunk_end - chunk_begin + kMaxRows - 1) / kMaxRows;
    TileArguments arguments;
    arguments.row_stride = call_.form.stride;
    arguments.panel_stride = call_.panel_stride;
    arguments.blocks = call_.blocks;
    // The group that this thread will probably take next.
    const int64_t next = std::min(group + threads_, groups_ - 1) * kMaxPanels;
    const int64_t step = std::min<int64_t>(kMaxPanels * kBlockBytes / std::max<int64_t>(1, passes - 1), 2 * kBlockBytes);
    int64_t fetched = 0;
    alignas(64) char sums[2 * kMaxRows * kMaxPanels * kPanel * 4];
    for (const LiveRange& range : call_.live) {
      const int64_t end = std::min(chunk_end, range.first + range.count);
      for (int64_t row = std::max(chunk_begin, range.first), rows; row < end; row += rows) {
        rows = std::min<int64_t>(kMaxRows, end - row);
        const int64_t token = range.begin + row - range.first;
        arguments.x = identity_ ? call_.x + token * call_.form.stride : prepared_ + row * call_.form.stride;
        arguments.prefetch_step = step;
        for (int64_t half = 0; half < call_.halves; ++half) {
          const char* weight = call_.weight + half * call_.panels * call_.panel_stride;
          arguments.prefetch = weight + next * call_.panel_stride + fetched;
          multiply_tile(arguments, rows, weight + panel * call_.panel_stride, count,
                        sums + half * (sizeof sums / 2));
        }
        if (passes > 1) fetched += step * call_.blocks;
        for (int64_t i = 0; i < rows; ++i) finish_row(token + i, row + i, sums, i, panel, count);
      }
    }
  }

  // Leaves sums as [panel of the group][row][16] where the group is narrower than the widest tile, else [row][panel][16].
  void multiply_tile(TileArguments& arguments, int64_t rows, const char* panels, int64_t count, char* sums) {
    arguments.panels = panels;
    arguments.out = sums;
    if (count == kMaxPanels) return tiles_.wide[rows - 1](arguments);
    for (int64_t i = 0; i < count; ++i) {
      tiles_.narrow[rows - 1](arguments);
      arguments.panels += call_.panel_stride;
      arguments.out = static_cast<char*>(arguments.out) + rows * kPanel * 4;
    }
  }

  void finish_row(int64_t token, int64_t row, const char* sums, int64_t row_of_tile, int64_t panel, int64_t count);
  void zero_dead_rows();

  const Call& call_;
  const Tiles& tiles_;
  const int64_t threads_;
  const bool identity_;
  int64_t groups_, chunk_, chunks_, preparations_ = 0;
  char* prepared_ = nullptr;
  float* scales_ = nullptr;
  std::atomic<int64_t> done_{0};
};
}
}
