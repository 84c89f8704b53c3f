// The product of q, k and v split into heads, those of q and k normed where asked to and rotated.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "lanes.h"

namespace jaxserve {

struct Rotation {
  Type type;
  int64_t head_dim;
  const float *cosine, *sine;  // [token][head_dim / 2]
  float epsilon;
};

// An RMS norm of a head, in place, rounded to its type.
inline void norm_head(const Rotation& by, const char* weight, char* head) {
  const int64_t item = size_of(by.type);
  const auto count = [&](int64_t i) { return std::min<int64_t>(kPanel, by.head_dim - i); };
  Lanes squares = {};
  for (int64_t i = 0; i < by.head_dim; i += kPanel) {
    const Lanes x = load_lanes(head + i * item, by.type, count(i));
    for (int v = 0; v < kVectors; ++v) squares.at[v] = simd::fma(x.at[v], x.at[v], squares.at[v]);
  }
  float sum = 0;
  for (int v = 0; v < kVectors; ++v) sum += simd::sum(squares.at[v]);
  const simd::Vec inverse = simd::broadcast(1.0f / std::sqrt(sum / by.head_dim + by.epsilon));
  for (int64_t i = 0; i < by.head_dim; i += kPanel) {
    Lanes x = load_lanes(head + i * item, by.type, count(i));
    const Lanes scale = load_lanes(weight + i * sizeof(float), Type::kFloat, count(i));
    for (int v = 0; v < kVectors; ++v) x.at[v] = x.at[v] * inverse * scale.at[v];
    store_lanes(head + i * item, by.type, x, count(i));
  }
}

// Element i of the first half of a head turns with element i of the second, in place.
inline void rotate_head(const Rotation& by, int64_t token, char* head) {
  const int64_t half = by.head_dim / 2, item = size_of(by.type);
  for (int64_t i = 0; i < half; i += kPanel) {
    const int64_t count = std::min<int64_t>(kPanel, half - i), at = (token * half + i) * sizeof(float);
    const Lanes cosine = load_lanes(reinterpret_cast<const char*>(by.cosine) + at, Type::kFloat, count);
    const Lanes sine = load_lanes(reinterpret_cast<const char*>(by.sine) + at, Type::kFloat, count);
    char *first = head + i * item, *second = head + (half + i) * item;
    const Lanes x = load_lanes(first, by.type, count), y = load_lanes(second, by.type, count);
    store_lanes(first, by.type, Lanes::of([&](int v) { return x.at[v] * cosine.at[v] - y.at[v] * sine.at[v]; }), count);
    store_lanes(second, by.type, Lanes::of([&](int v) { return y.at[v] * cosine.at[v] + x.at[v] * sine.at[v]; }), count);
  }
}

// A result: the heads of q, of k or of v.
struct HeadsPart {
  char* out;
  int64_t bytes;     // of a token
  const char* norm;  // weight, or null
  bool rotates;
};

// Splits a token's row of the product, at x.
inline void split_token(const Rotation& by, const HeadsPart (&parts)[3], int64_t token, const char* x) {
  for (const HeadsPart& part : parts) {
    char* out = static_cast<char*>(std::memcpy(part.out + token * part.bytes, x, part.bytes));
    x += part.bytes;
    for (char* head = out; part.rotates && head < out + part.bytes; head += by.head_dim * size_of(by.type)) {
      if (part.norm) norm_head(by, part.norm, head);
      rotate_head(by, token, head);
    }
  }
}

}  // namespace jaxserve
