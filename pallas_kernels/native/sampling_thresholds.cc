// The thresholds of top-k and top-p, a row at a time, so that a row is looked through from the processor's own cache.

#include "lanes.h"
#include "parallel.h"

#include "xla/ffi/api/ffi.h"

namespace jaxserve {
namespace {

namespace ffi = xla::ffi;

// Weights in [0, 1], where the order of floats is that of their bits.
class Row {
 public:
  Row(const float* weights, int64_t size) : weights_(weights), size_(size) {}

  int64_t count_from(int32_t threshold) const {
    simd::IntVec counts[kVectors] = {};
    each([&](const Lanes& lanes, int) {
      for (int v = 0; v < kVectors; ++v) counts[v] -= (simd::IntVec)lanes.at[v] >= threshold;
    });
    int64_t count = 0;
    for (const simd::IntVec& vector : counts)
      for (int lane = 0; lane < simd::kLanes; ++lane) count += vector[lane];
    return count;
  }

  // Always summed in the same order, so that it only falls as the threshold rises.
  float mass_from(int32_t threshold) const {
    Lanes sums[kChains] = {};
    each([&](const Lanes& lanes, int chain) {
      for (int v = 0; v < kVectors; ++v) {
        const simd::IntVec kept = (simd::IntVec)lanes.at[v] >= threshold;
        sums[chain].at[v] += (simd::Vec)((simd::IntVec)lanes.at[v] & kept);
      }
    });
    float mass = 0;
    for (const Lanes& lanes : sums)
      for (const simd::Vec& vector : lanes.at)
        for (int lane = 0; lane < simd::kLanes; ++lane) mass += vector[lane];
    return mass;
  }

 private:
  static constexpr int kChains = 4;  // of sums: an addition takes four cycles

  template <typename F>
  SIMD_INLINE void each(F take) const {
    int64_t i = 0;
    for (; i + kChains * kPanel <= size_; i += kChains * kPanel)
      for (int chain = 0; chain < kChains; ++chain) take(load_lanes(at(i + chain * kPanel), Type::kFloat), chain);
    // Filled up with zeros, which no threshold of ours keeps.
    for (; i < size_; i += kPanel) take(load_lanes(at(i), Type::kFloat, size_ - i), 0);
  }
  const char* at(int64_t i) const { return reinterpret_cast<const char*>(weights_ + i); }

  const float* weights_;
  int64_t size_;
};

// The largest threshold from `low` that keeps enough, as `low` itself does.
template <typename F>
int32_t largest_threshold(int32_t low, F keeps_enough) {
  int32_t high = 0x3f800000 + 1;  // above 1.0, which no weight exceeds
  while (high - low > 1) {
    const int32_t middle = low + (high - low) / 2;
    (keeps_enough(middle) ? low : high) = middle;
  }
  return low;
}

float threshold_of(const Row& row, int64_t size, int32_t top_k, float top_p) {
  int32_t threshold = 0;
  if (top_k < size) threshold = largest_threshold(0, [&](int32_t from) { return row.count_from(from) >= top_k; });
  if (top_p < 1) {
    const float target = top_p * row.mass_from(threshold);
    threshold = largest_threshold(threshold, [&](int32_t from) { return row.mass_from(from) >= target; });
  }
  return load_as<float>(&threshold);
}

ffi::Error sampling_thresholds(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> weights, ffi::Buffer<ffi::S32> top_k,
                               ffi::Buffer<ffi::F32> top_p, ffi::ResultBuffer<ffi::F32> thresholds) {
  const int64_t rows = weights.dimensions()[0], size = weights.dimensions()[1];
  auto work = [&](int64_t row) {
    const Row weights_of_row(weights.typed_data() + row * size, size);
    thresholds->typed_data()[row] =
        threshold_of(weights_of_row, size, top_k.typed_data()[row], top_p.typed_data()[row]);
  };
  parallel_for(rows, threads_of(pool), work);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jaxserve

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxserveSamplingThresholds, jaxserve::sampling_thresholds,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>());
