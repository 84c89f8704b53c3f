// What happens to a row of x before a product (RMS norm, quantization) and to a row of its result after (scale, bias,
// SwiGLU, residual), in float, 16 numbers at a time.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "linear_tiles.h"

namespace jaxserve {

// How a row of x becomes a row that the tiles read: normed where `norm` is given, quantized for weights that are (by row
// for int8, by block for blocks), padded with zeros to whole blocks.
struct RowForm {
  Type type;       // of x
  Type weights;    // what the tiles multiply
  int64_t size;    // of a row, numbers
  int64_t stride;  // of a row as the tiles read it, bytes
  const float* norm;
  float epsilon;
  int offset;  // added to each int8

  bool is_identity() const { return norm == nullptr && type == weights && stride == size * size_of(type); }
};

// Floats to int8, rounded to nearest, ties to even; `offset` is added to each.
SIMD_INLINE void store_int8(char* out, simd::Vec x, int offset, int64_t count) {
  // Adding 1.5 * 2**23 leaves no room for a fraction: the integer is in the lower bits.
  typedef int8_t Bytes __attribute__((vector_size(simd::kLanes)));
  const simd::Vec shifted = x + simd::broadcast(12582912.0f);
  const Bytes rounded = __builtin_convertvector((simd::IntVec)shifted - 0x4B400000 + offset, Bytes);
  std::memcpy(out, &rounded, std::min<int64_t>(simd::kLanes, count));
}

inline void quantize_block(const float* x, XBlock& block) {
  const float largest = simd::largest_magnitude(x, kBlockInputs);
  const simd::Vec inverse = simd::broadcast(largest > 0 ? 127.0f / largest : 0.0f);
  for (int64_t i = 0; i < kBlockInputs; i += simd::kLanes)
    store_int8(reinterpret_cast<char*>(block.values + i), simd::load(x + i) * inverse, 0, simd::kLanes);
  int32_t sum = 0;
  for (int64_t i = 0; i < kBlockInputs; ++i) sum += block.values[i];
  block.scale = largest / 127.0f;
  block.sum = block.scale * sum;
}

// Writes one row; returns its scale (1 where it has none). `work` holds size rounded up to 32 floats.
inline float prepare_row(const RowForm& form, const char* x, char* out, float* work) {
  const int64_t size = form.size, bytes = size_of(form.type);
  const auto count = [&](int64_t i) { return std::min<int64_t>(kPanel, size - i); };
  Lanes squares = {};
  for (int64_t i = 0; i < size; i += kPanel) {
    const Lanes lanes = load_lanes(x + i * bytes, form.type, count(i));
    for (int v = 0; v < kVectors; ++v) {
      squares.at[v] = simd::fma(lanes.at[v], lanes.at[v], squares.at[v]);
      simd::store(work + i + v * simd::kLanes, lanes.at[v]);
    }
  }
  if (form.norm) {
    float sum = 0;
    for (int v = 0; v < kVectors; ++v) sum += simd::sum(squares.at[v]);
    const simd::Vec inverse = simd::broadcast(1.0f / std::sqrt(sum / size + form.epsilon));
    for (int64_t i = 0; i < size; i += kPanel) {
      const Lanes weight = load_lanes(reinterpret_cast<const char*>(form.norm + i), Type::kFloat, count(i));
      for (int v = 0; v < kVectors; ++v) {
        float* at = work + i + v * simd::kLanes;
        simd::Vec y = simd::load(at) * inverse * weight.at[v];
        // The norm's result has the type of x, whatever it is quantized to.
        simd::store(at, form.type == Type::kBfloat16 ? (simd::Vec)simd::to_bfloat16(y) : y);
      }
    }
  }
  if (in_blocks(form.weights)) {
    std::fill(work + size, work + blocks_of(size) * kBlockInputs, 0.0f);
    XBlock* blocks = reinterpret_cast<XBlock*>(out);
    for (int64_t i = 0; i < size; i += kBlockInputs) quantize_block(work + i, blocks[i / kBlockInputs]);
    return 1.0f;
  }
  if (form.weights != Type::kInt8) {
    for (int64_t i = 0; i < size; i += kPanel) {
      const Lanes lanes = load_lanes(reinterpret_cast<const char*>(work + i), Type::kFloat);
      store_lanes(out + i * bytes, form.type, lanes, count(i));
    }
    std::memset(out + size * bytes, 0, form.stride - size * bytes);
    return 1.0f;
  }
  const float scale = simd::largest_magnitude(work, size);
  const simd::Vec inverse = simd::broadcast(scale > 0 ? 127.0f / scale : 0.0f);
  for (int64_t i = 0; i < size; i += simd::kLanes)
    store_int8(out + i, simd::load(work + i) * inverse, form.offset, form.stride - i);
  return scale / 127.0f;
}

// What a product's sums become. Null where there is none.
struct Epilogue {
  Type weights;        // int32 sums where int8
  const float* scale;  // of each output, for int8 weights
  const float* bias;   // of each output
  const char* residual;
  Type type;  // of out and residual
};

// 16 sums of a row to floats, `column` being that of the first, of which `count` exist.
SIMD_INLINE Lanes scaled(const Epilogue& epilogue, const char* sums, float row_scale, int64_t column, int64_t count) {
  Lanes lanes = load_lanes(sums, Type::kFloat);
  if (epilogue.weights == Type::kInt8) {
    const Lanes scale = load_lanes(reinterpret_cast<const char*>(epilogue.scale + column), Type::kFloat, count);
    for (int v = 0; v < kVectors; ++v)
      lanes.at[v] = __builtin_convertvector((simd::IntVec)lanes.at[v], simd::Vec) * row_scale * scale.at[v];
  }
  if (epilogue.bias) {
    const Lanes bias = load_lanes(reinterpret_cast<const char*>(epilogue.bias + column), Type::kFloat, count);
    for (int v = 0; v < kVectors; ++v) lanes.at[v] += bias.at[v];
  }
  return lanes;
}

// silu(gate) * up, with silu(x) = x / (1 + exp(-x)).
SIMD_INLINE Lanes swiglu(const Lanes& gate, const Lanes& up) {
  const simd::Vec one = simd::broadcast(1.0f), log2e = simd::broadcast(1.44269504088896341f);
  return Lanes::of([&](int v) {
    // exp2 wants x <= 0: the smaller of exp(x) and exp(-x) serves both signs.
    const simd::Vec x = gate.at[v];
    const simd::Vec small = simd::exp2((simd::Vec)((simd::IntVec)(x * log2e) | (int32_t)0x80000000));
    return x * (x < 0 ? small : one) / (one + small) * up.at[v];
  });
}

}  // namespace jaxserve
