// float times float.
#include "linear_tiles.h"

namespace jaxserve {
namespace {

struct Product {
  typedef simd::Vec Vector;
  typedef simd::Vec Weights;
  typedef simd::Vec Row;
  static constexpr int kHeaderBytes = 0;
  static constexpr int64_t kSegment = 16;
  static constexpr bool kCompensates = true;
  static Vector start(const char*) { return Vector{}; }
  static Weights load(const char* at) { return simd::load(at); }
  static Row broadcast(const char* at) { return simd::broadcast(load_as<float>(at)); }
  static Vector add(Vector sum, Weights weights, Row row) { return simd::fma(weights, row, sum); }
};

}  // namespace

Tiles float_tiles() { return tiles_of<Product>(); }

}  // namespace jaxserve
