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

enum class Type { kBfloat16, kFloat, kInt8 };

inline int64_t size_of(Type type) { return type == Type::kFloat ? 4 : type == Type::kBfloat16 ? 2 : 1; }

// 16 floats, as many vectors as that takes.
struct Lanes {
  simd::Vec at[kVectors];

  template <typename F>
  static Lanes of(F value) {
    Lanes lanes;
    for (int i = 0; i < kVectors; ++i) lanes.at[i] = value(i);
    return lanes;
  }
};

// `count` of 16 numbers from an array of type bfloat16 or float; the rest are 0.
inline Lanes load_lanes(const char* from, Type type, int64_t count = kPanel) {
  char whole[4 * kPanel] = {};
  if (count < kPanel) from = static_cast<const char*>(std::memcpy(whole, from, count * size_of(type)));
  if (type == Type::kFloat) return Lanes::of([&](int i) { return simd::load(from + i * sizeof(simd::Vec)); });
  return Lanes::of([&](int i) {
    typedef uint16_t Half __attribute__((vector_size(2 * simd::kLanes)));
    const Half half = load_as<Half>(from + i * sizeof(Half));
    return (simd::Vec)(__builtin_convertvector(half, simd::IntVec) << 16);
  });
}

inline void store_lanes(char* to, Type type, const Lanes& lanes, int64_t count = kPanel) {
  char whole[4 * kPanel];
  char* at = count < kPanel ? whole : to;
  for (int i = 0; i < kVectors; ++i) {
    if (type == Type::kFloat) {
      simd::store(at + i * sizeof(simd::Vec), lanes.at[i]);
    } else {
      typedef uint16_t Half __attribute__((vector_size(2 * simd::kLanes)));
      const simd::IntVec upper = simd::to_bfloat16(lanes.at[i]) >> 16;
      const Half half = __builtin_convertvector(upper, Half);
      std::memcpy(at + i * sizeof half, &half, sizeof half);
    }
  }
  if (count < kPanel) std::memcpy(to, whole, count * size_of(type));
}

}  // namespace jaxserve
