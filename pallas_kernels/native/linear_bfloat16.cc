// bfloat16 times bfloat16, summed in float.
#include "linear_amx.h"
#include "linear_tiles.h"

namespace jaxserve {
namespace {

struct Product : SummedAtOnce {
  typedef simd::Vec Vector;
  typedef simd::Vec Weights;
  typedef simd::Vec Row;
  static constexpr int kHeaderBytes = 0;
  static Vector start(const char*) { return Vector{}; }
  static Weights load(const char* at) { return simd::load(at); }
  static Row broadcast(const char* at) { return simd::broadcast(load_as<float>(at)); }
  static Vector add(Vector sum, Weights weights, Row row) { return simd::dot_pairs(weights, row, sum); }
};

#if defined(__AMX_BF16__) && defined(__linux__)
struct AmxProduct {
  static constexpr int kHeaderBytes = 0;
  template <int kSums>
  SIMD_INLINE static void start(const char*) {
    if constexpr (kSums == 0) _tile_zero(0);
    if constexpr (kSums == 1) _tile_zero(1);
    if constexpr (kSums == 2) _tile_zero(2);
  }
  template <int kSums>
  SIMD_INLINE static void multiply() {
    if constexpr (kSums == 0) _tile_dpbf16ps(0, 3, 4);
    if constexpr (kSums == 1) _tile_dpbf16ps(1, 3, 5);
    if constexpr (kSums == 2) _tile_dpbf16ps(2, 3, 6);
  }
};

// A row alone, to the bit as AMX sums it: over 16 blocks the first numbers of the pairs and the second ones by themselves,
// from 0, then their sum goes to the total.
template <int kPanels>
void row_tile(const TileArguments& arguments) {
  const char *x = arguments.x, *panels = arguments.panels, *prefetch = arguments.prefetch;
  simd::Vec totals[kPanels] = {};
  for (int64_t first = 0; first < arguments.blocks; first += amx::kBlocks) {
    const int64_t end = std::min(first + amx::kBlocks, arguments.blocks);
    simd::Vec even[kPanels] = {}, odd[kPanels] = {};
    for (int64_t block = first; block < end; ++block) {
#pragma GCC unroll 16
      for (int i = 0; i < kMaxPanels; ++i) __builtin_prefetch(prefetch + i * kBlockBytes, 0, 2);
      prefetch += arguments.prefetch_step;
      const simd::Vec pair = simd::broadcast(load_as<float>(x));
#pragma GCC unroll 16
      for (int i = 0; i < kPanels; ++i) {
        const simd::Vec weights = simd::load(panels + i * arguments.panel_stride);
        even[i] = simd::fma(simd::even(weights), simd::even(pair), even[i]);
        odd[i] = simd::fma(simd::odd(weights), simd::odd(pair), odd[i]);
      }
      panels += kBlockBytes;
      x += kRowBlockBytes;
    }
    for (int i = 0; i < kPanels; ++i) totals[i] += even[i] + odd[i];
  }
  for (int i = 0; i < kPanels; ++i) simd::store(static_cast<char*>(arguments.out) + i * kBlockBytes, totals[i]);
}
#endif

}  // namespace

Tiles bfloat16_tiles() {
#if defined(__AMX_BF16__) && defined(__linux__)
  if (amx::lent()) return amx::tiles_of<AmxProduct>(row_tile<kMaxPanels>, row_tile<1>);
#endif
  return tiles_of<Product>();
}

}  // namespace jaxserve
