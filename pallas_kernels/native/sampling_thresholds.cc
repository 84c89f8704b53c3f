// The thresholds of top-k and top-p, a row at a time, so that a row is looked through from the processor's own cache.

#include "lanes.h"
#include "parallel.h"

#include "xla/ffi/api/ffi.h"

namespace jaxserve {
namespace {

namespace ffi = xla::ffi;

// Weights in [0, 1], where the order of floats is that of their bits. A block whose largest is below the threshold is not
// looked at, and of most distributions that is nearly all of them: the sums are the same, to the bit.
class Row {
 public:
  Row(const float* weights, int64_t size) : weights_(weights), whole_(size / kStride * kStride) {
    std::copy(weights + whole_, weights + size, rest_);
    width_ = (size / kMaxBlocks / kStride + 1) * kStride;
    for (int64_t block = 0; block * width_ < whole_; ++block) {
      simd::Vec largest = {};
      each(block * width_, std::min(whole_, (block + 1) * width_), [&](const Lanes& lanes, int) {
        for (const simd::Vec& vector : lanes.at) largest = simd::max(vector, largest);
      });
      const float weight = simd::largest(largest);
      largest_[live_blocks_] = load_as<int32_t>(&weight);
      live_[live_blocks_++] = block;
    }
  }

  // Forgets what no threshold from `low` keeps.
  void raise(int32_t low) {
    int kept = 0;
    for (int i = 0; i < live_blocks_; ++i) {
      live_[kept] = live_[i], largest_[kept] = largest_[i];
      kept += largest_[i] >= low;
    }
    live_blocks_ = kept;
  }

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
  static constexpr int kStride = kChains * kPanel;
  static constexpr int kMaxBlocks = 1024;

  template <typename F>
  SIMD_INLINE void each(F take) const {
    if (live_blocks_ * width_ >= whole_)  // all of them: in one go
      each(0, whole_, take);
    else
      for (int i = 0; i < live_blocks_; ++i) each(live_[i] * width_, std::min(whole_, (live_[i] + 1) * width_), take);
    each_chain(rest_, take);
  }
  template <typename F>
  SIMD_INLINE void each(int64_t begin, int64_t end, F take) const {
    for (int64_t i = begin; i < end; i += kStride) each_chain(weights_ + i, take);
  }
  template <typename F>
  SIMD_INLINE static void each_chain(const float* weights, F take) {
    for (int chain = 0; chain < kChains; ++chain)
      take(load_lanes(reinterpret_cast<const char*>(weights + chain * kPanel), Type::kFloat), chain);
  }

  const float* weights_;
  int64_t whole_, width_;
  float rest_[kStride] = {};  // filled up with zeros, which no threshold of ours keeps
  int live_blocks_ = 0;
  int32_t live_[kMaxBlocks], largest_[kMaxBlocks];
};

// The largest threshold from `low` that keeps enough, as `low` itself does.
template <typename F>
int32_t largest_threshold(Row& row, int32_t low, F keeps_enough) {
  int32_t high = 0x3f800000 + 1;  // above 1.0, which no weight exceeds
  while (high - low > 1) {
    const int32_t middle = low + (high - low) / 2;
    if (keeps_enough(middle))
      row.raise(low = middle);
    else
      high = middle;
  }
  return low;
}

float threshold_of(Row& row, int64_t size, int32_t top_k, float top_p) {
  int32_t threshold = 0;
  if (top_k < size) threshold = largest_threshold(row, 0, [&](int32_t from) { return row.count_from(from) >= top_k; });
  if (top_p < 1) {
    const float target = top_p * row.mass_from(threshold);
    threshold = largest_threshold(row, threshold, [&](int32_t from) { return row.mass_from(from) >= target; });
  }
  return load_as<float>(&threshold);
}

ffi::Error sampling_thresholds(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> weights, ffi::Buffer<ffi::S32> top_k,
                               ffi::Buffer<ffi::F32> top_p, ffi::ResultBuffer<ffi::F32> thresholds) {
  const int64_t rows = weights.dimensions()[0], size = weights.dimensions()[1];
  auto work = [&](int64_t row) {
    const int32_t k = top_k.typed_data()[row];
    const float p = top_p.typed_data()[row];
    float& threshold = thresholds->typed_data()[row] = 0;
    if (k >= size && p >= 1) return;
    Row weights_of_row(weights.typed_data() + row * size, size);
    threshold = threshold_of(weights_of_row, size, k, p);
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
