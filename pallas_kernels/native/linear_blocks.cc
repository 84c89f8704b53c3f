// int8 times weights in blocks of 32: sums of a block exact in int32, then scaled and added up in float, block by block.
//
// Of each output a block is 4 bytes, the float16 scale and minimum, and 32 numbers of 4 or 8 bits without sign: a weight
// is number * scale + minimum. Of 4 bits, byte i has number i below and number 16 + i above. The words of 16 outputs lie
// side by side, as those of other weights do. A block of x is XBlock.
#include "linear_tiles.h"

namespace jaxserve {
namespace {

typedef simd::IntVec Words;  // 4 bytes of each output

// The number of each lane's lower 16 bits. Infinities and NaN stay so: a damaged weight must be seen in the result.
SIMD_INLINE simd::Vec from_half(Words half) {
#if defined(__AVX512F__)
  return (simd::Vec)_mm512_cvtph_ps(_mm512_cvtepi32_epi16((__m512i)half));
#else
  const Words exponent = half & 0x7c00, fraction = half & 0x3ff;
  // A subnormal as a float: denormals are flushed here, so that its bits may not pass for one.
  const simd::Vec small = __builtin_convertvector(fraction, simd::Vec) * simd::broadcast(0x1p-24f);
  const Words rebias = (112 << 23) + ((exponent == 0x7c00) & (112 << 23));  // the last exponent stays the last
  const Words magnitude = exponent != 0 ? ((half & 0x7fff) << 13) + rebias : (Words)small;
  return (simd::Vec)(magnitude | (half & 0x8000) << 16);
#endif
}

// Products of bytes, four a lane: weights without sign, x with one.
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
template <int kBits>
struct Dot {
  typedef Words Sum;
  SIMD_INLINE static Sum add(Sum sum, Words weights, Words x) { return add_byte_products(sum, weights, x); }
  SIMD_INLINE static Words total(Sum sum) { return sum; }
};
#else
// In int16: bytes 0 and 2 of each four, then 1 and 3.
template <int kBits>
struct Dot {
  typedef Words Sum;
  SIMD_INLINE static Sum add(Sum sum, Words weights, Words x) {
    const ShortVector pairs = (ShortVector)x;
    return sum + pair_products((ShortVector)(weights & 0x00ff00ff), pairs << 8 >> 8) +
           pair_products((ShortVector)((weights >> 8) & 0x00ff00ff), pairs >> 8);
  }
  SIMD_INLINE static Words total(Sum sum) { return sum; }
};
#if defined(__AVX2__) && !defined(__AVX512F__)
// A block's 16 products in a lane of 16 bits are at most 16 * 15 * 127, which fits.
template <>
struct Dot<4> {
  typedef ShortVector Sum;
  SIMD_INLINE static Sum add(Sum sum, Words weights, Words x) {
    return sum + (ShortVector)_mm256_maddubs_epi16((__m256i)weights, (__m256i)x);
  }
  SIMD_INLINE static Words total(Sum sum) {
    return (Words)_mm256_madd_epi16((__m256i)sum, _mm256_set1_epi16(1));
  }
};
#endif
#endif

// A block of kRows rows times that of a few panels. `sums` is of kVectors a panel and row.
template <int kBits, int kRows, int kPanels>
SIMD_INLINE void add_block(const char* x, int64_t row_stride, const char* panels, int64_t panel_stride,
                           simd::Vec (*sums)[kRows]) {
  constexpr int kCount = kPanels * kVectors;
  const auto words = [&](int line, int i) {
    return load_as<Words>(panels + i / kVectors * panel_stride + line * kBlockBytes + i % kVectors * sizeof(Words));
  };
  typename Dot<kBits>::Sum dots[kCount][kRows] = {};
  // A word of x at a time: those of 4 bits meet the lower halves of the four lines, then the upper ones.
#pragma GCC unroll 8
  for (int word = 0; word < 8; ++word) {
    Words weights[kCount];
#pragma GCC unroll 16
    for (int i = 0; i < kCount; ++i) {
      if (kBits == 8) weights[i] = words(1 + word, i);
      if (kBits == 4) weights[i] = words(1 + word % 4, i) >> (word < 4 ? 0 : 4) & 0x0f0f0f0f;
    }
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) {
      const Words of_x = Words{} + load_as<int32_t>(x + row * row_stride + word * kRowBlockBytes);
#pragma GCC unroll 16
      for (int i = 0; i < kCount; ++i) dots[i][row] = Dot<kBits>::add(dots[i][row], weights[i], of_x);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kCount; ++i) {
    const Words header = words(0, i);
    const simd::Vec scale = from_half(header & 0xffff), minimum = from_half(header >> 16 & 0xffff);
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) {
      const XBlock& of_x = *reinterpret_cast<const XBlock*>(x + row * row_stride);
      const simd::Vec dot = __builtin_convertvector(Dot<kBits>::total(dots[i][row]), simd::Vec);
      sums[i][row] = simd::fma(dot * simd::broadcast(of_x.scale), scale, sums[i][row]);
      sums[i][row] = simd::fma(simd::broadcast(of_x.sum), minimum, sums[i][row]);
    }
  }
}

template <int kBits, int kRows, int kPanels>
void block_tile(const TileArguments& arguments) {
  constexpr int kLines = 1 + kBits;
  // Panels at once: with many rows they share the words of x, with few a panel's sums stay in registers.
  constexpr int kTogether = kRows > 2 ? kPanels : 1;
  simd::Vec sums[kPanels * kVectors][kRows] = {};
  const char* prefetch = arguments.prefetch;
  for (int64_t block = 0; block < arguments.blocks / kLines; ++block) {
    for (int line = 0; line < kLines; ++line) {
      for (int i = 0; i < kMaxPanels; ++i) __builtin_prefetch(prefetch + i * kBlockBytes, 0, 2);
      prefetch += arguments.prefetch_step;
    }
    const char* x = arguments.x + block * sizeof(XBlock);
    const char* panels = arguments.panels + block * kLines * kBlockBytes;
    for (int panel = 0; panel < kPanels; panel += kTogether)
      add_block<kBits, kRows, kTogether>(x, arguments.row_stride, panels + panel * arguments.panel_stride,
                                         arguments.panel_stride, sums + panel * kVectors);
  }
  char* out = static_cast<char*>(arguments.out);
  for (int i = 0; i < kPanels * kVectors; ++i)
    for (int row = 0; row < kRows; ++row)
      simd::store(out + ((i / kVectors * kRows + row) * kVectors + i % kVectors) * sizeof(simd::Vec), sums[i][row]);
}

template <int kBits, int kRows = kMaxRows>
void fill_blocks(Tiles& tiles) {
  tiles.wide[kRows - 1] = block_tile<kBits, kRows, kMaxPanels>;
  tiles.narrow[kRows - 1] = block_tile<kBits, kRows, 1>;
  if constexpr (kRows > 1) fill_blocks<kBits, kRows - 1>(tiles);
}

}  // namespace

Tiles block_tiles(int bits) {
  Tiles tiles;
  bits == 4 ? fill_blocks<4>(tiles) : fill_blocks<8>(tiles);
  return tiles;
}

}  // namespace jaxserve
