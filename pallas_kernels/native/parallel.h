// Splits work over XLA's own thread pool, in pieces that each thread takes when it is free.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>

#include "simd.h"
#include "xla/ffi/api/ffi.h"

namespace jaxserve {

// Calls work(piece) for each piece in [0, pieces), on this thread and up to max_threads - 1 of the pool's.
//
// This thread waits only for pieces that a running thread has taken: were every thread of the pool busy, or waiting
// here itself, this one would do all the pieces. A late thread finds none and leaves; the state outlives it.
template <typename Work>
void parallel_for(xla::ffi::ThreadPool& pool, int64_t pieces, int64_t max_threads, Work& work) {
  const int64_t helpers = std::min({pieces, max_threads, pool.num_threads()}) - 1;
  if (helpers <= 0) {
    const simd::FlushDenormals flush;
    for (int64_t piece = 0; piece < pieces; ++piece) work(piece);
    return;
  }
  struct State {
    Work* work;
    int64_t pieces;
    std::atomic<int64_t> next{0};
    std::atomic<int64_t> done{0};
    std::atomic<int64_t> owners;

    void run() {
      const simd::FlushDenormals flush;
      int64_t mine = 0;
      for (int64_t piece; (piece = next.fetch_add(1, std::memory_order_relaxed)) < pieces; ++mine) (*work)(piece);
      if (mine) done.fetch_add(mine, std::memory_order_release);
    }
    void release() {
      if (owners.fetch_sub(1, std::memory_order_acq_rel) == 1) delete this;
    }
  };
  State* state = new State;
  state->work = &work;
  state->pieces = pieces;
  state->owners = helpers + 1;
  for (int64_t helper = 0; helper < helpers; ++helper) {
    pool.Schedule([state] {
      state->run();
      state->release();
    });
  }
  state->run();
  for (int spins = 0; state->done.load(std::memory_order_acquire) < pieces; ++spins) {
    // About 50 microseconds of spinning: the others are on their last piece.
    if (spins < 1000) {
      simd::pause();
    } else {
      std::this_thread::yield();
    }
  }
  state->release();
}

}  // namespace jaxserve
