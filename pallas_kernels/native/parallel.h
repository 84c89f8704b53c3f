// Shares the work of a call among threads that stay awake from one call to the next.
#pragma once

#ifdef __linux__
#include <sched.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <fstream>
#include <limits>
#include <mutex>
#include <thread>

#include "simd.h"
#include "xla/ffi/api/ffi.h"

namespace jaxserve {

// Threads that help one caller at a time.
//
// A step has hundreds of calls, microseconds apart. XLA's own pool lets its threads sleep between them, and waking one
// takes tens of microseconds: these look for the next call for a while before they sleep.
class Team {
 public:
  // Calls work() on this thread and on up to threads - 1 others, those that come before this one is through; returns
  // when all have. `work` takes pieces until there are none.
  template <typename Work>
  static void run(int64_t threads, Work& work) {
    Team* team = threads > 1 ? free_team() : nullptr;
    if (team == nullptr) {
      const simd::FlushDenormals flush;
      return work();
    }
    team->lead(threads - 1, [](void* work) { (*static_cast<Work*>(work))(); }, &work);
    team->taken_.clear(std::memory_order_release);
  }

 private:
  static constexpr int kTeams = 8;  // callers at a time: replicas on devices of their own; a further one works alone
  static constexpr int kLookouts = 2000;  // 50 to 100 microseconds, by how long a processor pauses

  // The board: the number of a call in its upper half, then how many may join, then how many have tried to.
  static constexpr uint64_t kCall = uint64_t{1} << 32, kPlace = 1 << 16;
  static uint32_t call_of(uint64_t board) { return static_cast<uint32_t>(board >> 32); }
  static int places(uint64_t board) { return static_cast<int>(board >> 16 & 0xffff); }
  static int joined(uint64_t board) { return std::min(static_cast<int>(board & 0xffff), places(board)); }

  // A thread, and the processor that it last worked on.
  struct Helper {
#ifdef __linux__
    void starts() { thread.store(gettid(), std::memory_order_relaxed); }
    void works() { processor.store(sched_getcpu(), std::memory_order_relaxed); }
    // Sends it to another processor if it waits for the caller's. The scheduler leaves the two on one for milliseconds,
    // with the other processor idle.
    void leave_to_caller() {
      const int here = sched_getcpu();
      if (processor.load(std::memory_order_relaxed) != here) return;
      processor.store(-1, std::memory_order_relaxed);
      cpu_set_t all;
      if (sched_getaffinity(0, sizeof all, &all)) return;
      cpu_set_t others = all;
      CPU_CLR(here, &others);
      if (CPU_COUNT(&others) == 0) return;
      const pid_t id = thread.load(std::memory_order_relaxed);
      sched_setaffinity(id, sizeof others, &others);  // moves it at once
      sched_setaffinity(id, sizeof all, &all);
    }
    std::atomic<pid_t> thread{0};
    std::atomic<int> processor{-1};
#else
    void starts() {}
    void works() {}
    void leave_to_caller() {}
#endif
  };

  static Team* free_team() {
    static Team* teams = new Team[kTeams];  // never deleted: their threads end with the process
    for (int i = 0; i < kTeams; ++i)
      if (!teams[i].taken_.test_and_set(std::memory_order_acquire)) return &teams[i];
    return nullptr;
  }

  void lead(int64_t helpers, void (*call)(void*), void* work) {
    while (static_cast<int64_t>(helpers_.size()) < helpers)
      std::thread([this, &me = helpers_.emplace_back(), seen = call_of(board_.load())] { help(me, seen); }).detach();
    call_ = call, work_ = work;
    left_.store(0, std::memory_order_relaxed);
    const uint64_t number = (board_.load(std::memory_order_relaxed) / kCall + 1) * kCall;
    board_.store(number + static_cast<uint64_t>(helpers) * kPlace);
    if (asleep_.load() > 0) {
      const std::lock_guard<std::mutex> lock(mutex_);
      wake_.notify_all();
    }
    {
      const simd::FlushDenormals flush;
      call(work);
    }
    const int all = joined(board_.exchange(number, std::memory_order_acq_rel));
    if (all < helpers)
      for (Helper& helper : helpers_) helper.leave_to_caller();
    // 20 to 50 microseconds of spinning: the others are on their last piece, unless they lost their core.
    for (int spins = 0; left_.load(std::memory_order_acquire) < all; ++spins)
      spins < 1000 ? simd::pause() : std::this_thread::yield();
  }

  void help(Helper& me, uint32_t seen) {
    const simd::FlushDenormals flush;
    me.starts();
    for (;;) {
      await_call_after(seen);
      const uint64_t board = board_.fetch_add(1, std::memory_order_acq_rel);
      seen = call_of(board);
      if (static_cast<int>(board & 0xffff) >= places(board)) continue;
      me.works();
      call_(work_);
      left_.fetch_add(1, std::memory_order_release);
      // Whoever waits for this core had better have it now than in the midst of a piece, which the caller would wait for.
      std::this_thread::yield();
    }
  }

  void await_call_after(uint32_t seen) {
    for (int lookout = 0; lookout < kLookouts; ++lookout) {
      if (call_of(board_.load(std::memory_order_relaxed)) != seen) return;
      simd::pause();
    }
    std::unique_lock<std::mutex> lock(mutex_);
    asleep_.fetch_add(1);
    wake_.wait(lock, [&] { return call_of(board_.load()) != seen; });
    asleep_.fetch_sub(1);
  }

  std::atomic_flag taken_ = ATOMIC_FLAG_INIT;
  std::atomic<uint64_t> board_{0};
  std::atomic<int> left_{0}, asleep_{0};
  void (*call_)(void*) = nullptr;
  void* work_ = nullptr;
  std::deque<Helper> helpers_;
  std::mutex mutex_;
  std::condition_variable wake_;
};

// Processors whose time a container may use, which XLA does not look at: more threads than that, awake, would use the
// time up before they have done anything.
inline int64_t processors_allowed() {
  static const int64_t allowed = [] {
    std::ifstream limit("/sys/fs/cgroup/cpu.max");  // control groups version 2; "max" where there is no limit
    std::ifstream old_quota("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"), old_period("/sys/fs/cgroup/cpu/cpu.cfs_period_us");
    double quota, period;
    const bool limited = (limit >> quota >> period) || (old_quota >> quota && old_period >> period && quota > 0);
    return limited ? std::max<int64_t>(1, std::llround(std::ceil(quota / period))) : std::numeric_limits<int64_t>::max();
  }();
  return allowed;
}

// The threads that a call may use.
inline int64_t threads_of(xla::ffi::ThreadPool& pool) { return std::min(pool.num_threads(), processors_allowed()); }

// Calls work(piece) for each piece in [0, pieces), on this thread and up to max_threads - 1 others; each takes the next
// piece when it is free.
template <typename Work>
void parallel_for(int64_t pieces, int64_t max_threads, Work& work) {
  std::atomic<int64_t> next{0};
  auto take = [&] {
    for (int64_t piece; (piece = next.fetch_add(1, std::memory_order_relaxed)) < pieces;) work(piece);
  };
  Team::run(std::min(pieces, max_threads), take);
}

}  // namespace jaxserve
