// How a call of attention is cut into work items.
#pragma once
#include "arena.h"
#include "attention/key_list.h"

namespace hipserve {
namespace HIPSERVE_TIER {

constexpr int64_t kMaxRows = 384;     // stacked rows of one item, unless one token has more heads
constexpr int64_t kSplitRows = 64;    // items this small split a long key list ...
constexpr int64_t kSplitKeys = 2048;  // ... into parts of this many keys

// Some rows of a query block, all query heads that share its keys, and a part of its key list.
struct Item {
  int32_t block, head, first_row, num_rows;
  int64_t begin, end;  // its part of the key list
  int32_t part, parts;
  int64_t part_row;  // its first row among those of all parts
};

// How many heads choose keys of their own, and how many query heads share them.
struct HeadGroups {
  int64_t count, size;
  explicit HeadGroups(const AttentionCall& call)
      : count(maximum(call.index_heads, call.batch.num_kv_heads)),
        size(call.batch.num_q_heads / count) {}
};

// The items of a call. The split of a key list depends only on its length, never on threads. Parts
// come before heads, so that all heads of a page are read at about the same time.
class WorkPlan {
 public:
  explicit WorkPlan(const AttentionCall& call)
      : call_(call), heads_(call), lists_(heads_.count), items_(count_items()) {
    add_items();
  }

  const Item& operator[](int64_t i) const { return items_[i]; }
  int64_t count() const { return count_; }
  int64_t part_rows() const { return part_rows_; }  // rows of all parts that must be merged
  int64_t pairs() const { return pairs_; }          // of a row and a key
  int64_t max_rows() const { return maximum(kMaxRows, heads_.size); }  // stacked rows of an item

 private:
  struct List {
    int64_t keys, parts, part_row;
  };
  int64_t count_items() {
    walk([](const Item&) {});
    return count_;
  }
  void add_items() {
    walk([&](const Item& item) { items_[count_] = item; });
  }

  // Calls use(item) for all items, with count_ as the number of those before.
  template <class Use> void walk(const Use& use) {
    const Batch& batch = call_.batch;
    const int64_t rows = maximum(kMaxRows / heads_.size, (int64_t)1);
    count_ = part_rows_ = pairs_ = 0;
    for (int64_t b = batch.num_query_blocks - 1; b >= 0; --b) {
      const int64_t num_rows = batch.query_blocks[b].num_rows;
      for (int64_t row = 0; row < num_rows; row += rows)
        walk_rows(b, row, minimum(rows, num_rows - row), use);
    }
  }
  template <class Use> void walk_rows(int64_t b, int64_t first, int64_t rows, const Use& use) {
    const int64_t parts = split_lists(b, rows * heads_.size);
    for (int64_t p = 0; p < parts; ++p)
      for (int64_t head = 0; head < heads_.count; ++head) {
        const List& list = lists_[head];
        if (p >= list.parts) continue;
        const int64_t size = list.parts > 1 ? kSplitKeys : list.keys;
        use({(int32_t)b, (int32_t)head, (int32_t)first, (int32_t)rows, p * size,
             minimum(list.keys, (p + 1) * size), (int32_t)p, (int32_t)list.parts,
             list.part_row + p * rows * heads_.size});
        ++count_;
      }
  }

  // Splits the key list of each head of a query block; returns the maximum number of parts.
  int64_t split_lists(int64_t b, int64_t stacked_rows) {
    int64_t max_parts = 1;
    for (int64_t head = 0; head < heads_.count; ++head) {
      const int64_t keys = KeyList(call_, call_.batch.query_blocks[b], b, head).size();
      const bool split = stacked_rows <= kSplitRows && keys > 2 * kSplitKeys;
      const int64_t parts = split ? ceil_div(keys, kSplitKeys) : 1;
      lists_[head] = {keys, parts, part_rows_};
      pairs_ += keys * stacked_rows;
      if (split) part_rows_ += parts * stacked_rows;
      max_parts = maximum(max_parts, parts);
    }
    return max_parts;
  }

  const AttentionCall& call_;
  const HeadGroups heads_;
  int64_t count_ = 0, part_rows_ = 0, pairs_ = 0;
  Array<List> lists_;
  Array<Item> items_;
};

}  // namespace HIPSERVE_TIER
}  // namespace hipserve
