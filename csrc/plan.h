// The keys that a query block reads, and how a call of attention is cut into work items.
#pragma once
#include "tile.h"

namespace hipserve {
namespace HIPSERVE_TIER {

constexpr int64_t kMaxRows = 384;     // stacked rows of one item
constexpr int64_t kSplitRows = 64;    // items this small split a long key list ...
constexpr int64_t kSplitKeys = 2048;  // ... into parts of this many keys

struct Item {
  int32_t block, head, first_row, num_rows;
  int64_t begin, end;  // its part of the key list
  int32_t part, parts;
  int64_t place;  // its first row among those of all parts
};

// The keys that one query block reads, as ascending segments of positions.
class KeyList {
 public:
  KeyList(const AttentionCall& call, const QueryBlock& block, int64_t block_id, int64_t head)
      : call_(call) {
    int64_t last = block.position + block.num_rows;
    if (!call.indices) {
      int64_t first = call.sliding_window ? block.position - call.sliding_window + 1 : 0;
      window_ = first > 0 ? first : 0;
      sink_ = 0;
    } else {
      sink_ = least(call.num_sink_tokens, last);
      window_ = least((int64_t)call.window_start[block_id], last);
      indices_ = call.indices + (block_id * call.index_heads + head) * call.max_selected;
      while (chosen_ < call.max_selected && indices_[chosen_] >= 0) ++chosen_;
    }
    if (window_ < sink_) window_ = sink_;
    last_ = last;
  }
  int64_t size() const { return sink_ + chosen_ * call_.key_block_size + (last_ - window_); }

  // Position of the n-th key, and how many keys follow it without a gap (itself included).
  int64_t at(int64_t n, int64_t* run) const {
    if (n < sink_) {
      *run = sink_ - n;
      return n;
    }
    n -= sink_;
    int64_t size = call_.key_block_size;
    if (n < chosen_ * size) {
      *run = size - n % size;
      return indices_[n / size] * size + n % size;
    }
    n -= chosen_ * size;
    *run = last_ - window_ - n;
    return window_ + n;
  }

 private:
  const AttentionCall& call_;
  const int32_t* indices_ = nullptr;
  int64_t sink_ = 0, chosen_ = 0, window_ = 0, last_ = 0;
};

// Cuts the call into items; the split of a key list depends on its length alone, never on threads.
// Parts come before heads, so that all heads of a page are read at about the same time.
class Plan {
 public:
  explicit Plan(const AttentionCall& call) : call_(call) {
    const Batch& batch = call.batch;
    heads_ = most(call.index_heads, batch.num_kv_heads);
    group_ = batch.num_q_heads / heads_;
    lists_ = (List*)malloc(sizeof(List) * heads_);
    const int64_t most_rows = most(kMaxRows / group_, (int64_t)1);
    for (int pass = 0; pass < 2; ++pass) {
      count = part_rows = pairs = 0;
      for (int64_t b = batch.num_query_blocks - 1; b >= 0; --b)
        for (int64_t row = 0; row < batch.query_blocks[b].num_rows; row += most_rows)
          add(b, row, least(most_rows, batch.query_blocks[b].num_rows - row), pass);
      if (!pass) items = (Item*)malloc(sizeof(Item) * most(count, (int64_t)1));
    }
  }
  ~Plan() {
    free(items);
    free(lists_);
  }
  Item* items = nullptr;
  int64_t count = 0, part_rows = 0;  // rows of all parts that must be merged
  int64_t pairs = 0;                 // of a row and a key

 private:
  struct List {
    int64_t keys, parts, place;
  };
  void add(int64_t b, int64_t first, int64_t rows, bool write) {
    int64_t most_parts = 1;
    for (int64_t head = 0; head < heads_; ++head) {
      const int64_t keys = KeyList(call_, call_.batch.query_blocks[b], b, head).size();
      const bool split = rows * group_ <= kSplitRows && keys > 2 * kSplitKeys;
      const int64_t parts = split ? (keys + kSplitKeys - 1) / kSplitKeys : 1;
      lists_[head] = {keys, parts, part_rows};
      pairs += keys * rows * group_;
      if (split) part_rows += parts * rows * group_;
      most_parts = most(most_parts, parts);
    }
    for (int64_t p = 0; p < most_parts; ++p)
      for (int64_t head = 0; head < heads_; ++head) {
        const List& list = lists_[head];
        if (p >= list.parts) continue;
        if (write) {
          const int64_t size = list.parts > 1 ? kSplitKeys : list.keys;
          items[count] = {(int32_t)b, (int32_t)head, (int32_t)first, (int32_t)rows, p * size,
                          least(list.keys, (p + 1) * size), (int32_t)p, (int32_t)list.parts,
                          list.place + p * rows * group_};
        }
        ++count;
      }
  }

  const AttentionCall& call_;
  int64_t heads_ = 1, group_ = 1;
  List* lists_;
};

}  // namespace HIPSERVE_TIER
}  // namespace hipserve
