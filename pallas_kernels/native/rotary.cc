// Splits the product of q, k and v into heads, norms those of q and k where asked to and rotates them: one pass over what
// XLA does in ten, as a custom call.

#include <cmath>

#include "lanes.h"
#include "live_rows.h"
#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace jaxserve {
namespace {

namespace ffi = xla::ffi;

struct Rotation {
  Type type;
  int64_t head_dim;
  const float *cosine, *sine;  // [token][head_dim / 2]
  float epsilon;
};

// An RMS norm of a head, in place, rounded to its type.
void norm_head(const Rotation& by, const char* weight, char* head) {
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
void rotate_head(const Rotation& by, int64_t token, char* head) {
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

// Tokens of a piece: fewer are not worth another thread.
constexpr int64_t kPieceTokens = 32;

ffi::Error split_heads(ffi::ThreadPool pool, ffi::RemainingArgs operands, ffi::Result<ffi::AnyBuffer> q,
                       ffi::Result<ffi::AnyBuffer> k, ffi::Result<ffi::AnyBuffer> v, bool norms, bool lives,
                       int64_t leading_rows, float epsilon) {
  size_t next = 0;
  const auto take = [&] { return operands.get<ffi::AnyBuffer>(next++).value(); };
  const auto take_if = [&](bool there) {
    return there ? static_cast<const char*>(take().untyped_data()) : nullptr;
  };
  const ffi::AnyBuffer qkv = take();
  if (qkv.element_type() != ffi::BF16 && qkv.element_type() != ffi::F32)
    return ffi::Error::InvalidArgument("split_heads: q, k and v are bfloat16 or float32");
  const auto* cosine = reinterpret_cast<const float*>(take_if(true));
  const auto* sine = reinterpret_cast<const float*>(take_if(true));
  const char* q_norm = take_if(norms);
  const char* k_norm = take_if(norms);
  const auto* counts = reinterpret_cast<const int32_t*>(take_if(lives));
  const int64_t tokens = qkv.dimensions()[0], head_dim = q->dimensions()[2];
  const Rotation by = {qkv.element_type() == ffi::BF16 ? Type::kBfloat16 : Type::kFloat, head_dim, cosine, sine, epsilon};
  const LiveRows live = counts ? LiveRows(tokens, counts, leading_rows) : LiveRows(tokens);
  struct Part {
    char* out;
    int64_t bytes;  // of a token
    const char* norm;
    bool rotates;
  };
  const auto part = [&](ffi::AnyBuffer out, const char* norm, bool rotates) {
    return Part{static_cast<char*>(out.untyped_data()), out.dimensions()[1] * head_dim * size_of(by.type), norm, rotates};
  };
  const Part parts[] = {part(*q, q_norm, true), part(*k, k_norm, true), part(*v, nullptr, false)};
  const char* from = static_cast<const char*>(qkv.untyped_data());
  const int64_t row_bytes = parts[0].bytes + parts[1].bytes + parts[2].bytes, head_bytes = head_dim * size_of(by.type);
  const int64_t pieces = std::max<int64_t>(1, live.count() / kPieceTokens);
  auto work = [&](int64_t piece) {
    for (int64_t row = piece * live.count() / pieces; row < (piece + 1) * live.count() / pieces; ++row) {
      const int64_t token = live.token(row);
      const char* x = from + token * row_bytes;
      for (const Part& part : parts) {
        char* out = static_cast<char*>(std::memcpy(part.out + token * part.bytes, x, part.bytes));
        x += part.bytes;
        for (char* head = out; part.rotates && head < out + part.bytes; head += head_bytes) {
          if (part.norm) norm_head(by, part.norm, head);
          rotate_head(by, token, head);
        }
      }
    }
  };
  parallel_for(pool, pieces, pool.num_threads(), work);
  for (int64_t dead = 0; dead < live.dead_count(); ++dead)
    for (const Part& part : parts) std::memset(part.out + live.dead_token(dead) * part.bytes, 0, part.bytes);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jaxserve

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxserveSplitHeads, jaxserve::split_heads,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .RemainingArgs()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<bool>("norms")
                                  .Attr<bool>("lives")
                                  .Attr<int64_t>("leading_rows")
                                  .Attr<float>("epsilon"));
