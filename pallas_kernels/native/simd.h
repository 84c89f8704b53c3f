// Vectors of floats, as wide as the target's registers, and the few operations the kernels need.
//
// Every operation is a fixed sequence of IEEE operations a lane: with -ffp-contract=off the compiler may not fuse or
// reorder them, so that a number does not depend on which kernel variant computed it.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace simd {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kMaxRows = 6;  // 6 rows x 4 vectors of accumulators in 32 registers
#elif defined(__AVX2__)
constexpr int kLanes = 8;
constexpr int kMaxRows = 3;  // in 16 registers
#else
constexpr int kLanes = 4;
#if defined(__aarch64__)
constexpr int kMaxRows = 6;
#else
constexpr int kMaxRows = 3;
#endif
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t IntVec __attribute__((vector_size(4 * kLanes)));

#define SIMD_INLINE inline __attribute__((always_inline))

SIMD_INLINE Vec load(const void* from) {
  Vec x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

SIMD_INLINE void store(void* to, Vec x) { std::memcpy(to, &x, sizeof x); }

// Bit for bit, so that a pair of bfloat16 may travel as a float.
SIMD_INLINE Vec broadcast(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return (Vec)(IntVec{} + bits);
}

SIMD_INLINE Vec max(Vec a, Vec b) { return a > b ? a : b; }

SIMD_INLINE Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
  return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (Vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

// Sums and maxima of the lanes, in halves: the same order always.
SIMD_INLINE float sum(Vec x) {
  for (int half = kLanes / 2; half; half /= 2)
    for (int lane = 0; lane < half; ++lane) x[lane] += x[lane + half];
  return x[0];
}

SIMD_INLINE float largest(Vec x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)x);
#else
  for (int half = kLanes / 2; half; half /= 2)
    for (int lane = 0; lane < half; ++lane) x[lane] = x[lane] > x[lane + half] ? x[lane] : x[lane + half];
  return x[0];
#endif
}

// Of the magnitudes of `size` floats, whole vectors of them; NaN if one is.
SIMD_INLINE float largest_magnitude(const float* x, int64_t size) {
  IntVec largest = {};  // as integers magnitudes compare as floats do, and NaN is above all others
  for (int64_t i = 0; i < size; i += kLanes) {
    const IntVec magnitude = (IntVec)load(x + i) & 0x7fffffff;
    largest = magnitude > largest ? magnitude : largest;
  }
#if defined(__AVX512F__)
  const int32_t bits = _mm512_reduce_max_epi32((__m512i)largest);
#else
  for (int half = kLanes / 2; half; half /= 2)
    for (int lane = 0; lane < half; ++lane)
      largest[lane] = largest[lane] > largest[lane + half] ? largest[lane] : largest[lane + half];
  const int32_t bits = largest[0];
#endif
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// 2**x for x <= 0, to within two units in the last place; 0 below -126, exactly 1 at 0, NaN for NaN.
SIMD_INLINE Vec exp2(Vec x) {
  const Vec low = broadcast(-126.0f), magic = broadcast(12582912.0f);  // 1.5 * 2**23 rounds to an integer
  Vec clamped = x < low ? low : x;
  Vec shifted = clamped + magic;
  Vec f = clamped - (shifted - magic);  // in [-0.5, 0.5]
  Vec y = broadcast(1.5403530e-4f);     // ln(2)**n / n!, from n = 6
  y = fma(y, f, broadcast(1.3333558e-3f));
  y = fma(y, f, broadcast(9.6181291e-3f));
  y = fma(y, f, broadcast(5.5504109e-2f));
  y = fma(y, f, broadcast(2.4022651e-1f));
  y = fma(y, f, broadcast(6.9314718e-1f));
  y = fma(y, f, broadcast(1.0f));
  IntVec power = ((IntVec)shifted - (0x4B400000 - 127)) << 23;
  return x < low ? Vec{} : y * (Vec)power;
}

// The even and the odd bfloat16 of 2 * kLanes neighbours, as floats.
SIMD_INLINE Vec even(Vec pairs) { return (Vec)((IntVec)pairs << 16); }
SIMD_INLINE Vec odd(Vec pairs) { return (Vec)((IntVec)pairs & (int32_t)0xFFFF0000); }

// Rounds to bfloat16, ties to even, in the upper half of each lane. NaN stays NaN.
SIMD_INLINE IntVec to_bfloat16(Vec x) {
  IntVec bits = (IntVec)x;
  IntVec rounded = bits + 0x7FFF + ((bits >> 16) & 1);
  return (x == x ? rounded : (bits | 0x400000)) & (int32_t)0xFFFF0000;
}

// acc + a.even * b.even + a.odd * b.odd of bfloat16 pairs.
SIMD_INLINE Vec dot_pairs(Vec a, Vec b, Vec acc) {
#if defined(__AVX512BF16__)
  return (Vec)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
#else
  return fma(odd(a), odd(b), fma(even(a), even(b), acc));
#endif
}

SIMD_INLINE void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Sets how denormals are treated for as long as it lives: threads of different pools differ in it, results may not.
class FlushDenormals {
 public:
#if defined(__x86_64__)
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
  FlushDenormals() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" ::"r"(saved_ | (1u << 24)));
  }
  ~FlushDenormals() { asm volatile("msr fpcr, %0" ::"r"(saved_)); }

 private:
  uint64_t saved_;
#endif
};

}  // namespace simd
