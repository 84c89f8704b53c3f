// The inner loops of a product with packed weights: a few rows of x times a few panels of 16 outputs.
//
// All types share one geometry. A block is 4 bytes of a row of x (two bfloat16, one float, four int8) and the 64 bytes of
// a panel that meet them, [16 outputs][4 bytes]; a panel is its blocks in order of `in`. Each output is summed in that
// order, in segments of a fixed length that are then added up, whatever the shape of the tile, so that a row's result
// does not depend on the other rows.
#pragma once

#include <algorithm>
#include <cstdint>

#include "lanes.h"

namespace jaxserve {

constexpr int kBlockBytes = 64;
constexpr int kRowBlockBytes = 4;

#if defined(__AVX512F__)
constexpr int kMaxRows = 8;
constexpr int kMaxPanels = 3;
#elif defined(__AVX2__)
constexpr int kMaxRows = 4;
constexpr int kMaxPanels = 1;
#elif defined(__aarch64__)
constexpr int kMaxRows = 6;
constexpr int kMaxPanels = 1;
#else
constexpr int kMaxRows = 2;
constexpr int kMaxPanels = 1;
#endif

// What a tile reads and writes. Strides are in bytes; out is [panels][rows][16], float or int32.
struct TileArguments {
  const char* x;
  int64_t row_stride;
  const char* panels;
  int64_t panel_stride;
  int64_t blocks;
  int64_t rows;
  void* out;
  // Weights needed soon, fetched meanwhile: kMaxPanels lines a block from here on, this far apart.
  const char* prefetch;
  int64_t prefetch_step;
};

typedef void (*Tile)(const TileArguments&);

// By rows - 1: all kMaxPanels panels, and one.
struct Tiles {
  static constexpr int kMostRows = 16;
  int64_t max_rows = kMaxRows;
  Tile wide[kMostRows];
  Tile narrow[kMostRows];
  // Where given, called before tiles of another number of rows than those before, and with 0 after the last.
  void (*set_rows)(int64_t rows) = nullptr;
};

Tiles bfloat16_tiles();
Tiles float_tiles();
Tiles int8_tiles();
// What is added to an int8 of x for int8_tiles: a byte of its unsigned range, or nothing.
int int8_offset();

// Weights in blocks, of 4 or 8 bits; linear_blocks.cc has their form.
Tiles block_tiles(int bits);

constexpr int kBlockInputs = 32;

inline int64_t blocks_of(int64_t inputs) { return (inputs + kBlockInputs - 1) / kBlockInputs; }

// A block of x for block_tiles: a number of x is value * scale.
struct XBlock {
  int8_t values[kBlockInputs];
  float scale;
  float sum;  // of the values, times scale
};

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
// sum + the products of bytes, four a lane: `a` without sign, `b` with one.
inline simd::IntVec add_byte_products(simd::IntVec sum, simd::IntVec a, simd::IntVec b) {
#if defined(__AVX512VNNI__)
  return (simd::IntVec)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#else
  return (simd::IntVec)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)a, (__m256i)b);
#endif
}
#else
typedef int16_t ShortVector __attribute__((vector_size(4 * simd::kLanes)));

// Adds the products of neighbouring int16 in pairs.
inline simd::IntVec pair_products(ShortVector a, ShortVector b) {
#if defined(__AVX512BW__)
  return (simd::IntVec)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (simd::IntVec)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__x86_64__) && !defined(__AVX512F__)
  return (simd::IntVec)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
  const simd::IntVec c = (simd::IntVec)a, d = (simd::IntVec)b;
  return (c << 16 >> 16) * (d << 16 >> 16) + (c >> 16) * (d >> 16);
#endif
}
#endif

// A product whose blocks are one segment; see `tile`.
struct SummedAtOnce {
  static constexpr int64_t kSegment = INT64_MAX / 2;
  static constexpr bool kCompensates = false;
};

// Product gives: Vector (of accumulators), Weights and Row, load(), broadcast(), add(); start() of a panel and the bytes of
// header before its blocks; kSegment, the blocks that are summed at once, and kCompensates, whether segments are added up
// with what rounding loses (Kahan): one huge product then spoils the sum of its own segment only.
template <typename Product, int kRows, int kPanels>
void tile(const TileArguments& arguments) {
  using Vector = typename Product::Vector;
  constexpr int kCount = kPanels * kVectors;
  Vector sums[kRows][kCount];
  const char* panels = arguments.panels;
  const int64_t panel_stride = arguments.panel_stride;
#pragma GCC unroll 16
  for (int i = 0; i < kCount; ++i) {
    const Vector start =
        Product::start(panels + (i / kVectors) * panel_stride + (i % kVectors) * (kBlockBytes / kVectors));
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) sums[row][i] = start;
  }
  panels += Product::kHeaderBytes;
  const char* x = arguments.x;
  const int64_t row_stride = arguments.row_stride;
  const char* prefetch = arguments.prefetch;
  Vector totals[kRows][kCount] = {}, lost[kRows][kCount] = {};
  for (int64_t first = 0; first < arguments.blocks; first += Product::kSegment) {
    const int64_t end = std::min(first + Product::kSegment, arguments.blocks);
    for (int64_t block = first; block < end; ++block) {
#pragma GCC unroll 16
      for (int i = 0; i < kMaxPanels; ++i) __builtin_prefetch(prefetch + i * kBlockBytes, 0, 2);
      prefetch += arguments.prefetch_step;
      typename Product::Weights weights[kCount];
#pragma GCC unroll 16
      for (int i = 0; i < kCount; ++i) {
        weights[i] =
            Product::load(panels + (i / kVectors) * panel_stride + (i % kVectors) * (kBlockBytes / kVectors));
      }
#pragma GCC unroll 16
      for (int row = 0; row < kRows; ++row) {
        const typename Product::Row value = Product::broadcast(x + row * row_stride);
#pragma GCC unroll 16
        for (int i = 0; i < kCount; ++i) sums[row][i] = Product::add(sums[row][i], weights[i], value);
      }
      panels += kBlockBytes;
      x += kRowBlockBytes;
    }
    if constexpr (Product::kCompensates) {
      for (int row = 0; row < kRows; ++row) {
        for (int i = 0; i < kCount; ++i) {
          const Vector term = sums[row][i] - lost[row][i];
          const Vector total = totals[row][i] + term;
          lost[row][i] = (total - totals[row][i]) - term;
          totals[row][i] = total;
          sums[row][i] = Vector{};
        }
      }
    }
  }
  const auto& results = Product::kCompensates ? totals : sums;
  char* out = static_cast<char*>(arguments.out);
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 16
    for (int i = 0; i < kCount; ++i) {
      const int64_t at = (i / kVectors * kRows + row) * kVectors + i % kVectors;
      std::memcpy(out + at * sizeof(Vector), &results[row][i], sizeof(Vector));
    }
  }
}

template <typename Product, int kRows = kMaxRows>
void fill(Tiles& tiles) {
  tiles.wide[kRows - 1] = tile<Product, kRows, kMaxPanels>;
  tiles.narrow[kRows - 1] = tile<Product, kRows, 1>;
  if constexpr (kRows > 1) fill<Product, kRows - 1>(tiles);
}

template <typename Product>
Tiles tiles_of() {
  Tiles tiles;
  fill<Product>(tiles);
  return tiles;
}

}  // namespace jaxserve
