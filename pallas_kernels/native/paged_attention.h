// Attention of a call's tokens over the paged cache: writes, then tiles of tokens against blocks of keys.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <thread>
#include <vector>

#include "block_kernels.h"

namespace kernels {
namespace {  // libraries for several processors may be loaded side by side

// A call's operands. A page holds for each kv head its keys and, in the other array, its values:
//   keys: where page_size is a multiple of 16, [page_size / 16] groups as `Block::keys` tells; else [page_size][head_dim].
//   values: [page_size][head_dim].
template <class T>
struct Call {
  const T *q, *k, *v;
  T *k_pages, *v_pages, *out;
  const int32_t *page_table, *token_row, *position;
  int tokens, rows, max_pages, num_pages, page_size, q_heads, kv_heads, head_dim, window;
  float scale_log2e;

  int group() const { return q_heads / kv_heads; }
  int padded_head_dim() const { return (head_dim + kUnit - 1) / kUnit * kUnit; }
  bool interleaves() const { return page_size % kGroup == 0; }
  bool live(int token) const {
    int row = token_row[token], at = position[token];
    return row >= 0 && row < rows && at >= 0 && at < max_pages * page_size;
  }
  // The first position that a token attends to.
  int first_key(int token) const { return window > 0 ? std::max(0, position[token] - window + 1) : 0; }
  // Page of a position; page 0, which is zero, where the table names none.
  int page(int row, int at) const {
    int index = at / page_size;
    int page = index < max_pages ? page_table[static_cast<int64_t>(row) * max_pages + index] : 0;
    return page > 0 && page < num_pages ? page : 0;
  }
  int64_t head_offset(int page, int kv_head) const {
    return (static_cast<int64_t>(page) * kv_heads + kv_head) * page_size * head_dim;
  }
  // Where a position of a row lies in either array; of keys that interleave, where its group does if it is the first.
  int64_t offset(int row, int kv_head, int at) const {
    return head_offset(page(row, at), kv_head) + at % page_size * head_dim;
  }
};

// Where a block of a row lies in the cache. Of use as addresses only where the cache interleaves.
template <class T>
Block<T> locate(const Call<T>& call, int row, int kv_head, int number) {
  Block<T> block;
  for (int g = 0; g < kGroups; ++g) {
    int64_t offset = call.offset(row, kv_head, number * kBlock + g * kGroup);
    block.keys[g] = call.k_pages + offset;
    block.values[g] = call.v_pages + offset;
  }
  return block;
}

// Copies the key of one position into a group's lines.
template <class T>
void interleave(const T* key, int head_dim, int lane, T* lines) {
  constexpr int n = kPerDword<T>;
  for (int d = 0; d < head_dim; d += n) std::memcpy(lines + (d / n * kGroup + lane) * n, key + d, sizeof(T) * n);
}

// Writes a token's keys and values to its page, or zeroes the output of a masked token.
template <class T>
void write_token(const Call<T>& call, int token) {
  if (!call.live(token)) {
    std::fill_n(reinterpret_cast<uint8_t*>(call.out + static_cast<int64_t>(token) * call.q_heads * call.head_dim),
                sizeof(T) * call.q_heads * call.head_dim, 0);
    return;
  }
  int at = call.position[token], page = call.page(call.token_row[token], at), offset = at % call.page_size;
  if (page == 0) return;
  for (int head = 0; head < call.kv_heads; ++head) {
    int64_t source = (static_cast<int64_t>(token) * call.kv_heads + head) * call.head_dim;
    T* keys = call.k_pages + call.head_offset(page, head);
    if (call.interleaves()) {
      T* lines = keys + offset / kGroup * kGroup * call.head_dim;
      interleave(call.k + source, call.head_dim, offset % kGroup, lines);
    } else {
      std::memcpy(keys + offset * call.head_dim, call.k + source, sizeof(T) * call.head_dim);
    }
    T* values = call.v_pages + call.head_offset(page, head) + offset * call.head_dim;
    std::memcpy(values, call.v + source, sizeof(T) * call.head_dim);
  }
}

// Neighbouring tokens of one row, which read the same blocks.
struct Tile {
  int begin, end;             // tokens
  int first_block, end_block;  // blocks that any of them attends to
  int64_t cost() const { return static_cast<int64_t>(end - begin) * (end_block - first_block); }
};

// Rows computed together: some query heads, of one kv head, of some tokens of a tile.
struct RowGroup {
  int begin, end;    // tokens, of the call
  int head, heads;   // first query head within the kv head's, and how many
  int first_row;     // of the tile's
  int rows() const { return (end - begin) * heads; }
};

// Tokens of a row group and of a tile: as many as keep the registers, and the first-level cache, full.
inline int tokens_per_group(int group) { return std::max(1, simd::kMaxRows / group); }
inline int tokens_per_tile(int group) {
  constexpr int kTileRows = 24;
  int least = tokens_per_group(group);
  return std::max(least, kTileRows / group / least * least);
}

// The parts of a thread's memory that a tile works in, kept from call to call.
template <class T>
class Workspace {
 public:
  Workspace(int rows, int head_dim, int padded) {
    size_t sizes[] = {sizeof(float) * rows * padded, sizeof(float) * rows * kBlock, sizeof(float) * rows * head_dim,
                      sizeof(T) * kBlock * head_dim, sizeof(T) * kBlock * padded};
    size_t total = 0;
    for (size_t& size : sizes) total += size = (size + 63) / 64 * 64;
    thread_local std::vector<char> memory;
    if (memory.size() < total + 64) memory.resize(total + 64);
    char* at = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64;
    out = reinterpret_cast<float*>(at);
    scores = reinterpret_cast<float*>(at += sizes[0]);
    queries = reinterpret_cast<float*>(at += sizes[1]);
    staged_keys = reinterpret_cast<T*>(at += sizes[2]);
    staged_values = reinterpret_cast<T*>(at += sizes[3]);
  }
  float *out, *scores, *queries;
  T *staged_keys, *staged_values;
};

// A list of the calling thread's, empty, whose memory is kept from call to call. Threads that allocate and free at the same
// time wait for each other.
template <class Item>
std::vector<Item>& kept_list() {
  thread_local std::vector<Item> items;
  items.clear();
  return items;
}

// One tile against one kv head; a thread has one at a time.
template <class T>
class TileAttention {
 public:
  TileAttention(const Call<T>& call, const Tile& tile, int kv_head)
      : call_(call),
        tile_(tile),
        kv_head_(kv_head),
        row_(call.token_row[tile.begin]),
        padded_(call.padded_head_dim()),
        dwords_(call.head_dim / kPerDword<T>),
        work_((tile.end - tile.begin) * call.group(), call.head_dim, padded_),
        row_groups_(kept_list<RowGroup>()),
        states_(kept_list<RowState>()) {
    int group = call.group(), together = tokens_per_group(group), parts = (group + simd::kMaxRows - 1) / simd::kMaxRows;
    int next_row = 0;
    for (int token = tile.begin; token < tile.end; token += together) {
      for (int part = 0; part < parts; ++part) {
        int head = group * part / parts, heads = group * (part + 1) / parts - head;
        row_groups_.push_back({token, std::min(tile.end, token + together), head, heads, next_row});
        next_row += row_groups_.back().rows();
      }
    }
    states_.resize(next_row);
    std::fill_n(work_.out, next_row * padded_, 0.0f);
    for (const RowGroup& rows : row_groups_) gather_queries(rows);
  }

  // `after`: what this thread reads next, to be prefetched.
  void run(const Block<T>& after) {
    for (int number = tile_.first_block; number < tile_.end_block; ++number) {
      Block<T> block = find(number);
      Block<T> next = number + 1 < tile_.end_block ? locate(call_, row_, kv_head_, number + 1) : after;
      for (const RowGroup& rows : row_groups_) attend(rows, number * kBlock, block, next);
    }
    for (const RowGroup& rows : row_groups_)
      for (int row = 0; row < rows.rows(); ++row)
        write_out(rows.first_row + row, output(rows.begin + row / rows.heads, rows.head + row % rows.heads));
  }

 private:
  int64_t head_index(int token, int head) const {
    return (static_cast<int64_t>(token) * call_.q_heads + kv_head_ * call_.group() + head) * call_.head_dim;
  }
  T* output(int token, int head) const { return call_.out + head_index(token, head); }
  float* queries(const RowGroup& rows) const { return work_.queries + rows.first_row * dwords_; }

  // Lays a group's queries side by side: [dword][row].
  void gather_queries(const RowGroup& rows) {
    float* to = queries(rows);
    int count = rows.rows();
    for (int row = 0; row < count; ++row) {
      const T* q = call_.q + head_index(rows.begin + row / rows.heads, rows.head + row % rows.heads);
      for (int d = 0; d < dwords_; ++d) std::memcpy(to + d * count + row, q + d * kPerDword<T>, 4);
    }
  }

  bool stages_values() const { return !call_.interleaves() || padded_ != call_.head_dim; }
  int value_stride() const { return stages_values() ? padded_ : call_.head_dim; }

  // As `locate`, with what the kernels cannot read in place copied to where they can.
  Block<T> find(int number) {
    Block<T> block = locate(call_, row_, kv_head_, number);
    if (!call_.interleaves()) {
      for (int key = 0; key < kBlock; ++key) {
        const T* from = call_.k_pages + call_.offset(row_, kv_head_, number * kBlock + key);
        T* group = work_.staged_keys + key / kGroup * kGroup * call_.head_dim;
        interleave(from, call_.head_dim, key % kGroup, group);
        block.keys[key / kGroup] = group;
      }
    }
    if (stages_values()) {
      for (int key = 0; key < kBlock; ++key) {
        const T* from = call_.v_pages + call_.offset(row_, kv_head_, number * kBlock + key);
        T* to = work_.staged_values + key * padded_;
        std::memcpy(to, from, sizeof(T) * call_.head_dim);
        std::memset(static_cast<void*>(to + call_.head_dim), 0, sizeof(T) * (padded_ - call_.head_dim));
      }
      for (int g = 0; g < kGroups; ++g) block.values[g] = work_.staged_values + g * kGroup * padded_;
    }
    return block;
  }

  void attend(const RowGroup& rows, int start, const Block<T>& block, const Block<T>& next) {
    int count = rows.rows(), tokens = rows.end - rows.begin;
    int first[simd::kMaxRows], last[simd::kMaxRows];
    float factor[simd::kMaxRows];
    bool alike = true;
    for (int i = 0; i < tokens; ++i) {
      first[i] = std::max(0, call_.first_key(rows.begin + i) - start);
      last[i] = std::min(kBlock, call_.position[rows.begin + i] + 1 - start);
      alike = alike && first[i] == first[0] && last[i] == last[0];
    }
    if (alike && first[0] >= last[0]) return;
    float* scores = work_.scores + rows.first_row * kBlock;
    float* out = work_.out + rows.first_row * padded_;
    call_score<T>(RowCounts{}, count, queries(rows), count, dwords_, block, next, scores);
    for (int row = 0; row < count; ++row) {
      int i = row / rows.heads;
      if (first[i] < last[i])
        factor[row] =
            weigh(scores + row * kBlock, first[i], last[i], call_.scale_log2e, states_[rows.first_row + row]);
    }
    // Tokens that see different parts of the block are added one by one: a key's value enters only where it is seen.
    int together = alike ? tokens : 1;
    for (int i = 0; i < tokens; i += together) {
      int row = i * rows.heads;
      if (first[i] < last[i])
        call_add_values<T>(RowCounts{}, together * rows.heads, padded_, scores + row * kBlock, factor + row, block, next,
                           value_stride(), first[i], last[i], out + row * padded_, padded_);
    }
  }

  void write_out(int row, T* to) {
    float* from = work_.out + row * padded_;
    Vec inverse = simd::broadcast(1.0f / simd::sum(states_[row].total));
    for (int d = 0; d < padded_; d += kUnit) {
      Vec first = simd::load(from + d) * inverse, second = simd::load(from + d + kLanes) * inverse;
      if constexpr (sizeof(T) == 2) {
        simd::IntVec low = (simd::to_bfloat16(first) >> 16) & 0xFFFF;
        simd::store(from + d, (Vec)(low | simd::to_bfloat16(second)));
      } else {
        simd::store(from + d, first);
        simd::store(from + d + kLanes, second);
      }
      std::memcpy(to + d, from + d, sizeof(T) * std::min(kUnit, call_.head_dim - d));
    }
  }

  const Call<T>& call_;
  const Tile& tile_;
  int kv_head_, row_, padded_, dwords_;
  Workspace<T> work_;
  std::vector<RowGroup>& row_groups_;
  std::vector<RowState>& states_;
};

// A call, shared among threads. Each takes the next piece of work that none has taken: writes first, then tiles, the
// longest first. A thread that comes late finds nothing left and touches nothing.
template <class T>
class Job {
 public:
  explicit Job(const Call<T>& call) : call_(call) {
    int most = tokens_per_tile(call.group());
    for (int token = 0; token < call.tokens; ++token) {
      if (!call.live(token)) continue;
      int first = call.first_key(token) / kBlock, end = call.position[token] / kBlock + 1;
      bool joins = !tiles_.empty() && tiles_.back().end == token &&
                   call.token_row[token - 1] == call.token_row[token] && token - tiles_.back().begin < most;
      if (!joins) tiles_.push_back({token, token, first, end});
      Tile& tile = tiles_.back();
      tile = {tile.begin, token + 1, std::min(tile.first_block, first), std::max(tile.end_block, end)};
    }
    std::stable_sort(tiles_.begin(), tiles_.end(), [](const Tile& a, const Tile& b) { return a.cost() > b.cost(); });
    writes_ = (call.tokens + kTokensPerWrite - 1) / kTokensPerWrite;
    pieces_ = static_cast<int>(tiles_.size()) * call.kv_heads;
  }

  // How many threads are worth their meeting: each should have some ten microseconds of work, at an eighth of one for a query
  // head of a token against a block.
  int useful_threads() const {
    constexpr int64_t kCostPerThread = 80;
    int64_t cost = 0;
    for (const Tile& tile : tiles_) cost += (2 + tile.cost()) * call_.q_heads;
    return static_cast<int>(std::min<int64_t>(std::max(pieces_, writes_), cost / kCostPerThread + 1));
  }

  // Writes and attends until there is nothing left to take; any number of threads may.
  void work() {
    for (int i; (i = next_write_.fetch_add(1)) < writes_;) {
      int end = std::min(call_.tokens, (i + 1) * kTokensPerWrite);
      for (int token = i * kTokensPerWrite; token < end; ++token) write_token(call_, token);
      written_.fetch_add(1, std::memory_order_release);
    }
    if (next_piece_.load() >= pieces_) return;
    await_writes();
    // Taken one ahead, so that the last block of one piece can prefetch the first of the next.
    for (int i = next_piece_.fetch_add(1); i < pieces_;) {
      int following = next_piece_.fetch_add(1);
      attention(i).run(first_block(following < pieces_ ? following : i));
      i = following;
    }
  }

 private:
  // Another thread is in the middle of one: microseconds, unless it lost its core.
  void await_writes() const {
    for (int spins = 0; written_.load(std::memory_order_acquire) < writes_; ++spins)
      spins < 2000 ? simd::pause() : std::this_thread::yield();
  }
  TileAttention<T> attention(int i) { return {call_, tiles_[i / call_.kv_heads], i % call_.kv_heads}; }
  Block<T> first_block(int i) {
    const Tile& tile = tiles_[i / call_.kv_heads];
    return locate(call_, call_.token_row[tile.begin], i % call_.kv_heads, tile.first_block);
  }

  static constexpr int kTokensPerWrite = 8;
  const Call<T> call_;
  std::vector<Tile> tiles_;
  int writes_, pieces_;
  std::atomic<int> next_write_{0}, written_{0}, next_piece_{0};
};

}  // namespace
}  // namespace kernels
