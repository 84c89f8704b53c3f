// The inner loop of a product by AMX, the matrix registers of Intel's server processors: up to 16 rows of x times a few
// panels. 16 blocks of a panel are a register as it wants them, so panels are those of linear_tiles.h.
//
// A row is multiplied for itself, so its bits do not depend on the others. A row alone is quicker without the registers,
// and is given the same bits.
#pragma once

#include "linear_tiles.h"

#if defined(__AMX_TILE__) && defined(__linux__)

#include <sys/syscall.h>
#include <unistd.h>

namespace jaxserve {
namespace amx {

constexpr int kBlocks = 16;  // of a register: 64 bytes of each row of x
constexpr int kRegisterBytes = 16 * 64;

// Whether this process may use the registers, which Linux wants to be asked for.
inline bool lent() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool lent = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return lent;
}

// The intrinsics are assembly that does not say what memory it reads.
SIMD_INLINE void settle_memory() { asm volatile("" ::: "memory"); }

// Registers 0 to 2 are sums and 3 is rows of x, of `rows` rows; 4 to 6 are panels. 265 cycles, so not for each tile.
inline void set_rows(int64_t rows) {
  if (rows == 0) return _tile_release();
  if (rows == 1) return;
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {0, 0, 0, 0, 16, 16, 16};
  } config;
  for (int i = 0; i < 4; ++i) config.rows[i] = rows;
  settle_memory();
  _tile_loadconfig(&config);
}

// Product gives start() of the sums of a panel, number by number of the register, and multiply().
template <typename Product, int kPanels>
void tile(const TileArguments& arguments) {
  static_assert(kPanels == 1 || kPanels == kMaxPanels, "registers are named one by one");
  const char *x = arguments.x, *first = arguments.panels;
  const int64_t stride = arguments.panel_stride;
  Product::template start<0>(first);
  if constexpr (kPanels > 1) Product::template start<1>(first + stride);
  if constexpr (kPanels > 1) Product::template start<2>(first + 2 * stride);
  first += Product::kHeaderBytes;
  const auto multiply = [](const char* x, int64_t row_stride, const char* panel, int64_t panel_stride) {
    _tile_loadd(3, x, row_stride);
    _tile_loadd(4, panel, kBlockBytes);
    Product::template multiply<0>();
    if constexpr (kPanels > 1) {
      _tile_loadd(5, panel + panel_stride, kBlockBytes);
      Product::template multiply<1>();
      _tile_loadd(6, panel + 2 * panel_stride, kBlockBytes);
      Product::template multiply<2>();
    }
  };
  const char* prefetch = arguments.prefetch;
  const int64_t fetched = kBlocks * arguments.prefetch_step;
  int64_t block = 0;
  for (; block + kBlocks <= arguments.blocks; block += kBlocks) {
    for (int64_t at = 0; at < fetched; at += kBlockBytes) __builtin_prefetch(prefetch + at, 0, 2);
    prefetch += fetched;
    multiply(x, arguments.row_stride, first, stride);
    x += kBlocks * kRowBlockBytes;
    first += kRegisterBytes;
  }
  if (const int64_t left = arguments.blocks - block) {
    // What is no whole register is padded with weights of zero.
    alignas(64) char rows[kRegisterBytes] = {}, panels[kPanels][kRegisterBytes] = {};
    for (int64_t row = 0; row < arguments.rows; ++row)
      std::memcpy(rows + row * 64, x + row * arguments.row_stride, left * kRowBlockBytes);
    for (int panel = 0; panel < kPanels; ++panel) std::memcpy(panels[panel], first + panel * stride, left * kBlockBytes);
    settle_memory();
    multiply(rows, 64, panels[0], kRegisterBytes);
  }
  char* out = static_cast<char*>(arguments.out);
  const int64_t out_bytes = arguments.rows * kPanel * 4;
  _tile_stored(0, out, kPanel * 4);
  if constexpr (kPanels > 1) _tile_stored(1, out + out_bytes, kPanel * 4);
  if constexpr (kPanels > 1) _tile_stored(2, out + 2 * out_bytes, kPanel * 4);
}

// `wide_row` and `narrow_row` take a row alone.
template <typename Product>
Tiles tiles_of(Tile wide_row, Tile narrow_row) {
  Tiles tiles;
  tiles.max_rows = 16;
  tiles.set_rows = set_rows;
  std::fill(tiles.wide, tiles.wide + tiles.max_rows, tile<Product, kMaxPanels>);
  std::fill(tiles.narrow, tiles.narrow + tiles.max_rows, tile<Product, 1>);
  tiles.wide[0] = wide_row;
  tiles.narrow[0] = narrow_row;
  return tiles;
}

}  // namespace amx
}  // namespace jaxserve

#endif
