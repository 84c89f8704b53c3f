// The arithmetic of one block of keys for a few rows. A row is one query head of one token.
//
// Each score is one chain of sums over head_dim, each output one chain over keys at ascending positions. How many rows
// are computed together does not enter into any of these chains.
#pragma once

#include <limits>
#include <utility>

#include "simd.h"

namespace kernels {
namespace {  // libraries for several processors may be loaded side by side

using simd::kLanes;
using simd::Vec;

constexpr int kBlock = 64;       // keys of a block, at positions that are multiples of it
constexpr int kGroup = 16;       // keys that lie interleaved in the cache
constexpr int kGroups = kBlock / kGroup;
constexpr int kUnit = 2 * kLanes;  // head dims of a step over values

struct BFloat16 {
  uint16_t bits;
};

// Where the keys and values of a block lie.
//   keys: [head_dim / 2][16][2] for bfloat16, [head_dim][16] for float32; 64-byte lines across 16 keys, so that 16
//     scores grow in the lanes of a register and none is summed across.
//   values: [16][value_stride].
template <class T>
struct Block {
  const T* keys[kGroups];
  const T* values[kGroups];
};

// Dwords that a line of keys is made of: two bfloat16 or one float.
template <class T>
constexpr int kPerDword = 4 / sizeof(T);

// What a row carries from block to block.
struct RowState {
  float largest = -std::numeric_limits<float>::infinity();  // of the scores so far, times log2(e)
  Vec total = {};                                           // of the weights, by position modulo kLanes
};

template <class T>
SIMD_INLINE Vec dot_step(Vec q, Vec k, Vec acc) {
  if constexpr (sizeof(T) == 2) return simd::dot_pairs(q, k, acc);
  return simd::fma(q, k, acc);
}

template <class T>
SIMD_INLINE void load_values(const T* from, Vec& first, Vec& second) {
  if constexpr (sizeof(T) == 2) {
    Vec pairs = simd::load(from);
    first = simd::even(pairs);
    second = simd::odd(pairs);
  } else {
    first = simd::load(from);
    second = simd::load(from + kLanes);
  }
}

// scores[row][key] = q[row] . keys[key] for kRows rows and the block's keys.
//   q: dwords [dwords][q_stride], rows side by side.
template <int kRows, class T>
void score(const float* q, int q_stride, int dwords, const Block<T>& block, const Block<T>& next, float* scores) {
  constexpr int kPerGroup = kGroup / kLanes, kAtOnce = 4 / kPerGroup;
  static_assert(kGroups % kAtOnce == 0);
  for (int start = 0; start < kGroups; start += kAtOnce) {
    Vec acc[kRows][4] = {};
    const float* keys[kAtOnce];
    const float* ahead[kAtOnce];
    for (int g = 0; g < kAtOnce; ++g) {
      keys[g] = reinterpret_cast<const float*>(block.keys[start + g]);
      ahead[g] = reinterpret_cast<const float*>(next.keys[start + g]);
    }
    for (int d = 0; d < dwords; ++d) {
      Vec k[4];
#pragma GCC unroll 4
      for (int g = 0; g < kAtOnce; ++g) {
        __builtin_prefetch(ahead[g] + d * kGroup, 0, 2);
#pragma GCC unroll 4
        for (int i = 0; i < kPerGroup; ++i) k[g * kPerGroup + i] = simd::load(keys[g] + d * kGroup + i * kLanes);
      }
#pragma GCC unroll 8
      for (int row = 0; row < kRows; ++row) {
        Vec x = simd::broadcast(q[d * q_stride + row]);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) acc[row][i] = dot_step<T>(x, k[i], acc[row][i]);
      }
    }
    for (int row = 0; row < kRows; ++row)
      for (int i = 0; i < 4; ++i) simd::store(scores + row * kBlock + start * kGroup + i * kLanes, acc[row][i]);
  }
}

// Turns the scores of keys [first, last) of the block into weights, in place, zero outside. Gives the factor on what
// was summed in earlier blocks.
SIMD_INLINE float weigh(float* scores, int first, int last, float scale_log2e, RowState& state) {
  constexpr int kVectors = kBlock / kLanes;
  const Vec minus_infinity = simd::broadcast(-std::numeric_limits<float>::infinity());
  Vec x[kVectors], peak = minus_infinity;
  for (int i = 0; i < kVectors; ++i) x[i] = simd::load(scores + i * kLanes) * scale_log2e;
  if (first > 0 || last < kBlock) {
    simd::IntVec lane;
    for (int i = 0; i < kLanes; ++i) lane[i] = i;
    for (int i = 0; i < kVectors; ++i) {
      simd::IntVec key = lane + i * kLanes;
      x[i] = (key >= first) & (key < last) ? x[i] : minus_infinity;
    }
  }
  for (int i = 0; i < kVectors; ++i) peak = simd::max(x[i], peak);  // keeps `peak` where x is NaN
  float before = state.largest, largest = simd::largest(peak);
  largest = largest > before ? largest : before;
  float factor = 1.0f;
  if (largest != before) factor = simd::exp2(simd::broadcast(before - largest))[0];
  Vec total = {};
  for (int i = 0; i < kVectors; ++i) {
    Vec weight = simd::exp2(x[i] - largest);
    simd::store(scores + i * kLanes, weight);
    total += weight;
  }
  state.total = simd::fma(state.total, simd::broadcast(factor), total);
  state.largest = largest;
  return factor;
}

// out[row] = out[row] * factor[row] + sum of weights[row][key] * values[key] over keys [first, last), for kUnits units
// of head dims. Keys outside are not read as numbers: what lies there may be another sequence's NaN.
template <int kRows, int kUnits, class T>
void add_values(const float* weights, const float* factor, const Block<T>& block, const Block<T>& next,
                int value_stride, int first, int last, float* out, int out_stride) {
  Vec acc[kRows][2 * kUnits];
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 4
    for (int i = 0; i < 2 * kUnits; ++i) acc[row][i] = simd::load(out + row * out_stride + i * kLanes) * factor[row];
  for (int group = first / kGroup; group * kGroup < last; ++group) {
    int begin = group * kGroup > first ? group * kGroup : first;
    int end = (group + 1) * kGroup < last ? (group + 1) * kGroup : last;
    const T* values = block.values[group] - group * kGroup * value_stride;
    const T* ahead = next.values[group] - group * kGroup * value_stride;
    for (int key = begin; key < end; ++key) {
      Vec v[2 * kUnits];
#pragma GCC unroll 4
      for (int unit = 0; unit < kUnits; ++unit) {
        if (unit * kUnit * sizeof(T) % 64 == 0) __builtin_prefetch(ahead + key * value_stride + unit * kUnit, 0, 2);
        load_values(values + key * value_stride + unit * kUnit, v[2 * unit], v[2 * unit + 1]);
      }
#pragma GCC unroll 8
      for (int row = 0; row < kRows; ++row) {
        Vec w = simd::broadcast(weights[row * kBlock + key]);
#pragma GCC unroll 4
        for (int i = 0; i < 2 * kUnits; ++i) acc[row][i] = simd::fma(w, v[i], acc[row][i]);
      }
    }
  }
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 4
    for (int i = 0; i < 2 * kUnits; ++i) simd::store(out + row * out_stride + i * kLanes, acc[row][i]);
}

template <class T>
using Score = void (*)(const float*, int, int, const Block<T>&, const Block<T>&, float*);
template <class T>
using AddValues = void (*)(const float*, const float*, const Block<T>&, const Block<T>&, int, int, int, float*, int);

template <class T, int... kRows>
void call_score(std::integer_sequence<int, kRows...>, int rows, const float* q, int q_stride, int dwords,
                const Block<T>& block, const Block<T>& next, float* scores) {
  static constexpr Score<T> by_rows[] = {score<kRows + 1, T>...};
  by_rows[rows - 1](q, q_stride, dwords, block, next, scores);
}

template <class T, int... kRows>
void call_add_values(std::integer_sequence<int, kRows...>, int rows, int head_dim, const float* weights,
                     const float* factor, const Block<T>& block, const Block<T>& next, int value_stride, int first,
                     int last, float* out, int out_stride) {
  static constexpr AddValues<T> one[] = {add_values<kRows + 1, 1, T>...};
  static constexpr AddValues<T> two[] = {add_values<kRows + 1, 2, T>...};
  for (int d = 0; d < head_dim;) {
    bool wide = head_dim - d >= 2 * kUnit;
    Block<T> at = block, ahead = next;
    for (int g = 0; g < kGroups; ++g) at.values[g] += d, ahead.values[g] += d;
    (wide ? two : one)[rows - 1](weights, factor, at, ahead, value_stride, first, last, out + d, out_stride);
    d += wide ? 2 * kUnit : kUnit;
  }
}

using RowCounts = std::make_integer_sequence<int, simd::kMaxRows>;

}  // namespace
}  // namespace kernels
