// int8 times int8, summed exactly in int32.
//
// A panel begins with a block of 16 int32: the sum of each output's weights. x86 multiplies unsigned by signed bytes, so x
// comes shifted up by 128 (kOffset) and 128 times that sum is taken off at the start.
#include "linear_amx.h"
#include "linear_tiles.h"

namespace jaxserve {
namespace {

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
struct Product : SummedAtOnce {
  typedef simd::IntVec Vector;
  typedef simd::IntVec Weights;
  typedef simd::IntVec Row;
  static constexpr int kHeaderBytes = kBlockBytes;
  static Vector start(const char* at) { return -(load_as<Vector>(at) << 7); }
  static Weights load(const char* at) { return load_as<Weights>(at); }
  static Row broadcast(const char* at) { return Row{} + load_as<int32_t>(at); }
  static Vector add(Vector sum, Weights weights, Row row) { return add_byte_products(sum, row, weights); }
};
constexpr int kOffset = 128;
#elif defined(__ARM_FEATURE_DOTPROD)
struct Product : SummedAtOnce {
  typedef int32x4_t Vector;
  typedef int8x16_t Weights;
  typedef int8x16_t Row;
  static constexpr int kHeaderBytes = kBlockBytes;
  static Vector start(const char*) { return vdupq_n_s32(0); }
  static Weights load(const char* at) { return load_as<int8x16_t>(at); }
  static Row broadcast(const char* at) { return vreinterpretq_s8_s32(vdupq_n_s32(load_as<int32_t>(at))); }
  static Vector add(Vector sum, Weights weights, Row row) { return vdotq_s32(sum, weights, row); }
};
constexpr int kOffset = 0;
#else
// Bytes 0 and 2 of each four as a pair of int16, and bytes 1 and 3.
struct Product : SummedAtOnce {
  typedef simd::IntVec Vector;
  struct Weights {
    ShortVector even, odd;
  };
  typedef Weights Row;
  static constexpr int kHeaderBytes = kBlockBytes;
  static Vector start(const char*) { return Vector{}; }
  static Weights load(const char* at) {
    const ShortVector pairs = load_as<ShortVector>(at);
    return {pairs << 8 >> 8, pairs >> 8};
  }
  static Row broadcast(const char* at) {
    const ShortVector pairs = (ShortVector)(simd::IntVec{} + load_as<int32_t>(at));
    return {pairs << 8 >> 8, pairs >> 8};
  }
  static Vector add(Vector sum, Weights weights, Row row) {
    return sum + pair_products(weights.even, row.even) + pair_products(weights.odd, row.odd);
  }
};
constexpr int kOffset = 0;
#endif

#if defined(__AMX_INT8__) && defined(__AVX512VNNI__) && defined(__linux__)
struct AmxProduct {
  static constexpr int kHeaderBytes = kBlockBytes;
  template <int kSums>
  SIMD_INLINE static void start(const char* at) {
    alignas(64) char line[kBlockBytes];
    _mm512_store_si512(line, (__m512i)Product::start(at));
    amx::settle_memory();
    // The same line for each row.
    if constexpr (kSums == 0) _tile_loadd(0, line, 0);
    if constexpr (kSums == 1) _tile_loadd(1, line, 0);
    if constexpr (kSums == 2) _tile_loadd(2, line, 0);
    amx::settle_memory();
  }
  template <int kSums>
  SIMD_INLINE static void multiply() {
    if constexpr (kSums == 0) _tile_dpbusd(0, 3, 4);
    if constexpr (kSums == 1) _tile_dpbusd(1, 3, 5);
    if constexpr (kSums == 2) _tile_dpbusd(2, 3, 6);
  }
};
#endif

}  // namespace

Tiles int8_tiles() {
#if defined(__AMX_INT8__) && defined(__AVX512VNNI__) && defined(__linux__)
  if (amx::lent()) return amx::tiles_of<AmxProduct>(tile<Product, 1, kMaxPanels>, tile<Product, 1, 1>);
#endif
  return tiles_of<Product>();
}

int int8_offset() { return kOffset; }

}  // namespace jaxserve
