// The XLA custom call: checks what XLA hands over and shares the work among its own threads.

#include "paged_attention.h"

#include "parallel.h"

#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;
using Ints = ffi::Buffer<ffi::S32>;

ffi::Error paged_attention(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v,
                           ffi::AnyBuffer k_pages, ffi::AnyBuffer v_pages, ffi::BufferR0<ffi::S32> layer, Ints table,
                           Ints token_row, Ints position, ffi::Result<ffi::AnyBuffer> out, ffi::Result<ffi::AnyBuffer> k_out,
                           ffi::Result<ffi::AnyBuffer> v_out, float scale, int32_t window) {
  if (k_out->untyped_data() != k_pages.untyped_data() || v_out->untyped_data() != v_pages.untyped_data())
    return ffi::Error::Internal("paged attention: the cache is not updated in place");
  const auto size = [](auto buffer, int axis) { return static_cast<int>(buffer.dimensions()[axis]); };
  // The last four axes are those of a layer.
  const auto pages = k_pages.dimensions().last(4);
  const int64_t first = *layer.typed_data() * pages[0] * pages[1] * pages[2] * pages[3];
  const auto run = [&](auto number) {
    using T = decltype(number);
    const auto at = [](ffi::AnyBuffer buffer) { return static_cast<T*>(buffer.untyped_data()); };
    kernels::Call<T> call;
    call.q = at(q), call.k = at(k), call.v = at(v);
    call.out = at(*out), call.k_pages = at(k_pages) + first, call.v_pages = at(v_pages) + first;
    call.page_table = table.typed_data(), call.token_row = token_row.typed_data(), call.position = position.typed_data();
    call.tokens = size(q, 0), call.q_heads = size(q, 1), call.head_dim = size(q, 2);
    call.rows = size(table, 0), call.max_pages = size(table, 1);
    call.num_pages = static_cast<int>(pages[0]), call.kv_heads = static_cast<int>(pages[1]);
    call.page_size = static_cast<int>(pages[2]);
    call.window = window;
    call.scale_log2e = scale * 1.44269504088896341f;
    kernels::Job<T> job(call);
    auto work = [&] { job.work(); };
    jaxserve::Team::run(std::min<int64_t>(jaxserve::threads_of(pool), job.useful_threads()), work);
    return ffi::Error::Success();
  };
  if (k_pages.element_type() == ffi::BF16) return run(kernels::BFloat16{});
  if (k_pages.element_type() == ffi::F32) return run(float{});
  return ffi::Error::InvalidArgument("paged attention: the cache must be bfloat16 or float32");
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxservePagedAttention, paged_attention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::BufferR0<ffi::S32>>()
                                  .Arg<Ints>()
                                  .Arg<Ints>()
                                  .Arg<Ints>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<float>("scale")
                                  .Attr<int32_t>("window"));
