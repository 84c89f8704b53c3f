// XLA custom calls: a product with a packed weight, packing, rows of a packed weight, and heads out of a product. What they
// do is in the headers; here is what XLA hands over, and the sharing of work among its own threads.

#include <optional>

#include "linear_packing.h"
#include "linear_product.h"
#include "parallel.h"
#include "rotary.h"
#include "xla/ffi/api/ffi.h"

namespace jaxserve {
namespace {

namespace ffi = xla::ffi;

std::optional<Type> type_of(ffi::AnyBuffer buffer) {
  switch (buffer.element_type()) {
    case ffi::BF16:
      return Type::kBfloat16;
    case ffi::F32:
      return Type::kFloat;
    case ffi::S8:
      return Type::kInt8;
    default:
      return std::nullopt;
  }
}

// That of a packed weight of `blocks` words a panel, for x of `size`; bytes are blocks, whose words tell their bits.
std::optional<Type> type_of_weight(ffi::AnyBuffer weight, int64_t blocks, int64_t size) {
  if (weight.element_type() != ffi::U8) return type_of(weight);
  const int64_t of_x = blocks_of(size);
  if (blocks == of_x * (1 + 4)) return Type::kBlocks4;
  if (blocks == of_x * (1 + 8)) return Type::kBlocks8;
  return std::nullopt;
}

// The operands, one after the other.
class Operands {
 public:
  explicit Operands(ffi::RemainingArgs operands) : operands_(operands) {}
  ffi::AnyBuffer take() { return operands_.get<ffi::AnyBuffer>(next_++).value(); }
  // The next one's data, or null where it is not given.
  template <typename T>
  const T* take_if(bool given) {
    return given ? static_cast<const T*>(take().untyped_data()) : nullptr;
  }

 private:
  ffi::RemainingArgs operands_;
  size_t next_ = 0;
};

const Tiles& tiles_for(Type weights) {
  static const Tiles bfloat16 = bfloat16_tiles(), floats = float_tiles(), int8 = int8_tiles();
  static const Tiles blocks4 = block_tiles(4), blocks8 = block_tiles(8);
  switch (weights) {
    case Type::kBfloat16:
      return bfloat16;
    case Type::kFloat:
      return floats;
    case Type::kInt8:
      return int8;
    case Type::kBlocks4:
      return blocks4;
    case Type::kBlocks8:
      return blocks8;
  }
}

// Bits of `present`: the optional operands, in this order after x and weight.
enum Operand { kScale = 1, kBias = 2, kResidual = 4, kNorm = 8, kLive = 16 };

ffi::Error linear(ffi::ThreadPool pool, ffi::RemainingArgs arguments, ffi::Result<ffi::AnyBuffer> out, int64_t present,
                  int64_t leading_rows, float epsilon) {
  Operands operands(arguments);
  const ffi::AnyBuffer x = operands.take(), weight = operands.take();
  const auto shape = weight.dimensions();
  const bool gated = shape.size() == 5;
  if (!gated && shape.size() != 4) return ffi::Error::InvalidArgument("linear: a packed weight has 4 or 5 axes");
  const int64_t tokens = x.dimensions()[0], size_in = x.dimensions()[1], blocks = shape[gated + 1];
  const auto type = type_of(x), weights = type_of_weight(weight, blocks, size_in), out_type = type_of(*out);
  if (!type || !weights || !out_type || (is_floating(*weights) && weights != type))
    return ffi::Error::InvalidArgument("linear: operands of types that it does not know");
  const auto* scale = operands.take_if<float>(present & kScale);
  const auto* bias = operands.take_if<float>(present & kBias);
  const auto* residual = operands.take_if<char>(present & kResidual);
  const auto* norm = operands.take_if<float>(present & kNorm);
  const auto* counts = operands.take_if<int32_t>(present & kLive);
  const int64_t weight_blocks = blocks - (weights == Type::kInt8 ? 1 : 0);
  const int64_t stride = in_blocks(*weights) ? blocks_of(size_in) * sizeof(XBlock) : weight_blocks * kRowBlockBytes;
  const ProductCall call = {
      static_cast<const char*>(x.untyped_data()),
      {*type, *weights, size_in, stride, norm, epsilon, int8_offset()},
      static_cast<const char*>(weight.untyped_data()),
      gated ? 2 : 1,
      shape[gated],
      blocks * kBlockBytes,
      weight_blocks,
      {*weights, scale, bias, residual, *out_type},
      static_cast<char*>(out->untyped_data()),
      out->dimensions()[1],
      counts ? LiveRows(tokens, counts, leading_rows) : LiveRows(tokens),
  };
  const Tiles& tiles = tiles_for(*weights);
  const int64_t threads = threads_of(pool);
  ProductPieces pieces(call, tiles, threads);
  parallel_for(pieces.count(), threads, pieces);
  return ffi::Error::Success();
}

// Of an array that is packed: bytes, whatever they mean, are words like any other.
std::optional<Type> type_to_pack(ffi::AnyBuffer buffer) {
  return buffer.element_type() == ffi::U8 ? Type::kBlocks8 : type_of(buffer);
}

PackedLayout layout(ffi::AnyBuffer packed) {
  const auto shape = packed.dimensions();
  return {static_cast<char*>(packed.untyped_data()), shape[shape.size() - 4], shape[shape.size() - 3],
          packed.element_type() == ffi::S8 ? 1 : 0};
}

ffi::Error pack(ffi::ThreadPool pool, ffi::AnyBuffer weight, ffi::Result<ffi::AnyBuffer> packed) {
  const auto type = type_to_pack(weight);
  if (!type || type != type_to_pack(*packed))
    return ffi::Error::InvalidArgument("pack: a weight is bfloat16, float32, int8 or blocks");
  const PackedLayout to = layout(*packed);
  const int64_t halves = packed->dimensions().size() == 5 ? 2 : 1;
  const int64_t row_bytes = weight.dimensions()[1] * size_of(*type), outputs = weight.dimensions()[0] / halves;
  const char* from = static_cast<const char*>(weight.untyped_data());
  auto work = [&](int64_t panel) {
    const int64_t half = panel / to.panels, first = panel % to.panels * kPanel;
    const int64_t count = std::min<int64_t>(kPanel, outputs - first);
    pack_panel(to, panel, from + (half * outputs + first) * row_bytes, count, row_bytes);
  };
  parallel_for(halves * to.panels, threads_of(pool), work);
  return ffi::Error::Success();
}

ffi::Error packed_rows(ffi::AnyBuffer packed, ffi::Buffer<ffi::S32> ids, ffi::Result<ffi::AnyBuffer> out) {
  const auto type = type_to_pack(packed);
  if (!type || type != type_to_pack(*out))
    return ffi::Error::InvalidArgument("rows: a packed weight is bfloat16, float32, int8 or blocks");
  const PackedLayout from = layout(packed);
  const int64_t tokens = out->dimensions()[0], row_bytes = out->dimensions()[1] * size_of(*type);
  for (int64_t token = 0; token < tokens; ++token)
    unpack_row(from, ids.typed_data()[token], row_bytes, static_cast<char*>(out->untyped_data()) + token * row_bytes);
  return ffi::Error::Success();
}

// Tokens of a piece of split_heads: fewer are not worth another thread.
constexpr int64_t kPieceTokens = 32;

ffi::Error split_heads(ffi::ThreadPool pool, ffi::RemainingArgs arguments, ffi::Result<ffi::AnyBuffer> q,
                       ffi::Result<ffi::AnyBuffer> k, ffi::Result<ffi::AnyBuffer> v, bool norms, bool lives,
                       int64_t leading_rows, float epsilon) {
  Operands operands(arguments);
  const ffi::AnyBuffer qkv = operands.take();
  const auto type = type_of(qkv);
  if (!type || type == Type::kInt8)
    return ffi::Error::InvalidArgument("split_heads: q, k and v are bfloat16 or float32");
  const auto* cosine = operands.take_if<float>(true);
  const auto* sine = operands.take_if<float>(true);
  const auto* q_norm = operands.take_if<char>(norms);
  const auto* k_norm = operands.take_if<char>(norms);
  const auto* counts = operands.take_if<int32_t>(lives);
  const int64_t tokens = qkv.dimensions()[0], head_dim = q->dimensions()[2];
  const Rotation by = {*type, head_dim, cosine, sine, epsilon};
  const LiveRows live = counts ? LiveRows(tokens, counts, leading_rows) : LiveRows(tokens);
  const auto part = [&](ffi::AnyBuffer out, const char* norm, bool rotates) {
    const int64_t bytes = out.dimensions()[1] * head_dim * size_of(*type);
    return HeadsPart{static_cast<char*>(out.untyped_data()), bytes, norm, rotates};
  };
  const HeadsPart parts[] = {part(*q, q_norm, true), part(*k, k_norm, true), part(*v, nullptr, false)};
  const int64_t row_bytes = parts[0].bytes + parts[1].bytes + parts[2].bytes;
  const int64_t pieces = std::max<int64_t>(1, live.count() / kPieceTokens);
  auto work = [&](int64_t piece) {
    for (int64_t row = piece * live.count() / pieces; row < (piece + 1) * live.count() / pieces; ++row) {
      const int64_t token = live.token(row);
      split_token(by, parts, token, static_cast<const char*>(qkv.untyped_data()) + token * row_bytes);
    }
  };
  parallel_for(pieces, threads_of(pool), work);
  for (int64_t dead = 0; dead < live.dead_count(); ++dead)
    for (const HeadsPart& part : parts) std::memset(part.out + live.dead_token(dead) * part.bytes, 0, part.bytes);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jaxserve

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxserveLinear, jaxserve::linear,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .RemainingArgs()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<int64_t>("present")
                                  .Attr<int64_t>("leading_rows")
                                  .Attr<float>("epsilon"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxservePack, jaxserve::pack,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxservePackedRows, jaxserve::packed_rows,
                              xla::ffi::Ffi::Bind()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Ret<xla::ffi::AnyBuffer>());

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
