// Packs weights [out, in] into panels, and reads rows of what was packed, as XLA custom calls. See linear_tiles.h.

#include <cstring>

#include "linear_tiles.h"
#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace jaxserve {
namespace {

namespace ffi = xla::ffi;

// Bytes of an element; 0 for a type that is not packed.
int64_t item_size(ffi::AnyBuffer buffer) {
  switch (buffer.element_type()) {
    case ffi::F32:
      return 4;
    case ffi::BF16:
      return 2;
    case ffi::S8:
      return 1;
    default:
      return 0;
  }
}

// Where a packed weight's words of 4 bytes lie.
struct Layout {
  char* data;
  int64_t panels;
  int64_t blocks;  // of a panel, the header among them
  int64_t header;  // blocks before the weights

  Layout(ffi::AnyBuffer packed, int64_t item)
      : data(static_cast<char*>(packed.untyped_data())), header(item == 1 ? 1 : 0) {
    const auto shape = packed.dimensions();
    panels = shape[shape.size() - 4];
    blocks = shape[shape.size() - 3];
  }
  char* word(int64_t panel, int64_t block, int64_t lane) const {
    return data + ((panel * blocks + header + block) * kPanel + lane) * kRowBlockBytes;
  }
};

// Packs outputs [first, first + 16) of `outputs` as a panel. Words before `whole` lie wholly in a row.
void pack_panel(const Layout& to, int64_t panel, const char* weight, int64_t outputs, int64_t row_bytes) {
  const int64_t whole = row_bytes / kRowBlockBytes, words = to.blocks - to.header;
  char* header = to.data + panel * to.blocks * kBlockBytes;
  if (outputs < kPanel || whole < words || to.header) std::memset(header, 0, to.blocks * kBlockBytes);
  for (int64_t block = 0; block < whole; ++block)
    for (int64_t lane = 0; lane < outputs; ++lane)
      std::memcpy(to.word(panel, block, lane), weight + lane * row_bytes + block * kRowBlockBytes, kRowBlockBytes);
  for (int64_t lane = 0; lane < outputs; ++lane) {
    const char* row = weight + lane * row_bytes;
    if (whole < words)
      std::memcpy(to.word(panel, whole, lane), row + whole * kRowBlockBytes, row_bytes - whole * kRowBlockBytes);
    if (!to.header) continue;
    int32_t sum = 0;
    for (int64_t i = 0; i < row_bytes; ++i) sum += static_cast<int8_t>(row[i]);
    std::memcpy(header + lane * sizeof sum, &sum, sizeof sum);
  }
}

ffi::Error pack(ffi::ThreadPool pool, ffi::AnyBuffer weight, ffi::Result<ffi::AnyBuffer> packed) {
  const int64_t item = item_size(weight);
  if (!item || weight.element_type() != packed->element_type())
    return ffi::Error::InvalidArgument("pack: a weight is bfloat16, float32 or int8");
  const Layout to(*packed, item);
  const int64_t halves = packed->dimensions().size() == 5 ? 2 : 1;
  const int64_t row_bytes = weight.dimensions()[1] * item, outputs = weight.dimensions()[0] / halves;
  auto work = [&](int64_t panel) {
    const int64_t half = panel / to.panels, first = panel % to.panels * kPanel;
    const char* from = static_cast<const char*>(weight.untyped_data()) + (half * outputs + first) * row_bytes;
    pack_panel(to, panel, from, std::min<int64_t>(kPanel, outputs - first), row_bytes);
  };
  parallel_for(pool, halves * to.panels, pool.num_threads(), work);
  return ffi::Error::Success();
}

// Rows `ids` of the weight that was packed; an id past the end reads the last row, as XLA's gather does.
ffi::Error rows(ffi::AnyBuffer packed, ffi::Buffer<ffi::S32> ids, ffi::Result<ffi::AnyBuffer> out) {
  const int64_t item = item_size(packed);
  if (!item || packed.element_type() != out->element_type())
    return ffi::Error::InvalidArgument("rows: a packed weight is bfloat16, float32 or int8");
  const Layout from(packed, item);
  const int64_t tokens = out->dimensions()[0], row_bytes = out->dimensions()[1] * item;
  for (int64_t token = 0; token < tokens; ++token) {
    const int64_t id = std::clamp<int64_t>(ids.typed_data()[token], 0, from.panels * kPanel - 1);
    char* to = static_cast<char*>(out->untyped_data()) + token * row_bytes;
    for (int64_t at = 0; at < row_bytes; at += kRowBlockBytes)
      std::memcpy(to + at, from.word(id / kPanel, at / kRowBlockBytes, id % kPanel),
                  std::min<int64_t>(kRowBlockBytes, row_bytes - at));
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jaxserve

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxservePack, jaxserve::pack,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxservePackedRows, jaxserve::rows,
                              xla::ffi::Ffi::Bind()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Ret<xla::ffi::AnyBuffer>());
