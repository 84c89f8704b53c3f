// Numbers of a type known at run time, 16 at a time, as floats.
#pragma once

#include <cstdint>
#include <cstring>

#include "simd.h"

namespace jaxserve {

constexpr int kPanel = 16;
constexpr int kVectors = kPanel / simd::kLanes;

template <typename T>
inline T load_as(const void* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

// The last two: blocks of 32 numbers of 4 or 8 bits (linear_blocks.cc), for weights only.
enum class Type { kBfloat16, kFloat, kInt8, kBlocks4, kBlocks8 };

inline int64_t size_of(Type type) { return type == Type::kFloat ? 4 : type == Type::kBfloat16 ? 2 : 1; }

inline bool is_floating(Type type) { return type == Type::kBfloat16 || type == Type::kFloat; }
inline bool in_blocks(Type type) { return type == Type::kBlocks4 || type == Type::kBlocks8; }

// 16 floats, as many vectors as that takes.
struct Lanes {
  simd::Vec at[kVectors];

  template <typename F>
  SIMD_INLINE static Lanes of(F value) {
    Lanes lanes;
    for (int i = 0; i < kVectors; ++i) lanes.at[i] = value(i);
    return lanes;
  }
};

typedef uint16_t HalfVec __attribute__((vector_size(2 * simd::kLanes)));

// 16 numbers from an array of type bfloat16 or float.
SIMD_INLINE Lanes load_lanes(const char* from, Type type) {
  if (type == Type::kFloat) return Lanes::of([&](int i) { return simd::load(from + i * sizeof(simd::Vec)); });
  return Lanes::of([&](int i) {
    const HalfVec half = load_as<HalfVec>(from + i * sizeof(HalfVec));
    return (simd::Vec)(__builtin_convertvector(half, simd::IntVec) << 16);
  });
}

SIMD_INLINE void store_lanes(char* to, Type type, const Lanes& lanes) {
  for (int i = 0; i < kVectors; ++i) {
    if (type == Type::kFloat) {
      simd::store(to + i * sizeof(simd::Vec), lanes.at[i]);
    } else {
      const HalfVec half = __builtin_convertvector(simd::to_bfloat16(lanes.at[i]) >> 16, HalfVec);
      std::memcpy(to + i * sizeof half, &half, sizeof half);
    }
  }
}

// Fewer than 16; the rest are 0.
__attribute__((noinline)) inline Lanes load_some(const char* from, Type type, int64_t count) {
  char whole[4 * kPanel] = {};
  std::memcpy(whole, from, count * size_of(type));
  return load_lanes(whole, type);
}

__attribute__((noinline)) inline void store_some(char* to, Type type, const Lanes& lanes, int64_t count) {
  char whole[4 * kPanel];
  store_lanes(whole, type, lanes);
  std::memcpy(to, whole, count * size_of(type));
}

// `count` of 16.
SIMD_INLINE Lanes load_lanes(const char* from, Type type, int64_t count) {
  return count < kPanel ? load_some(from, type, count) : load_lanes(from, type);
}

SIMD_INLINE void store_lanes(char* to, Type type, const Lanes& lanes, int64_t count) {
  count < kPanel ? store_some(to, type, lanes, count) : store_lanes(to, type, lanes);
}

}  // namespace jaxserve
