// Blocks ranked by their keys: the only place of a search that reads keys, or their codes. How keys
// lie and what queries meet them as is a class `Keys`: StoredKeys, or CodedKeys in coded.h.
#pragma once
#include "select/scores.h"

namespace hipserve {
namespace HIPSERVE_TIER {

// Blocks that a search has found, ascending.
struct BlockList {
  const int32_t* data;
  int64_t count;
};

// The keys between sinks and window of one query block and KV head: positions [begin, end).
struct Middle {
  Sequence seq;
  int64_t kv_head, begin, end;
  FarKeys far;
};

// Keys stored as K, met by queries stored as Q.
template <class Q, class K> class StoredKeys {
 public:
  using Row = const K*;
  using Unit = typename UnitOf<Q, K>::type;
  using Queries = Columns<Unit>;
  explicit StoredKeys(const SelectCall& call) : call_(call) {}
  Row at(const Middle& middle, int64_t key) const {
    return key_row<K>(call_.index.codes, middle.seq, middle.kv_head, key);
  }
  // The row of the next slot.
  Row next(Row row) const { return row + call_.index.codes.slot_stride; }
  void take_queries(const SampledRows& rows, float* convert, Queries& queries) const {
    const int64_t count = rows.count();
    queries.template fill<Q>(count, few_rows<Unit>(count, call_.batch.head_dim), convert,
                             [&](int64_t r) { return rows.template row<Q>(r); });
  }

 private:
  const SelectCall& call_;
};

// Keys that are read without being chosen: sinks, then those from the end of the middle on.
template <class Keys> struct KeysOutside {
  using Row = typename Keys::Row;
  const Keys& keys;
  const Middle& middle;
  int64_t first;
  Row operator()(int64_t i) const { return keys.at(middle, position(middle, first + i)); }
  static int64_t position(const Middle& middle, int64_t i) {
    return i < middle.begin ? i : middle.end + i - middle.begin;
  }
};

// The keys of a list of blocks, one after the other.
template <class Keys> struct KeysOfBlocks {
  using Row = typename Keys::Row;
  const Keys& keys;
  const Middle& middle;
  int64_t size;  // of a block
  const int32_t* block;
  int64_t offset = 0;  // in the block
  Row row = {};
  Row operator()(int64_t) {
    if (offset == size) {
      offset = 0;
      ++block;
    }
    const int64_t key = *block * size + offset++;
    const bool same_page = offset > 1 && middle.seq.slot(key) > 0;
    row = same_page ? keys.next(row) : keys.at(middle, key);
    return row;
  }
};

// Ranks blocks by the maximum score of their keys with the sampled rows.
template <class Keys> class BlockRank {
 public:
  BlockRank(Arena& arena, const SelectCall& call, int64_t max_rows, Scorer& scorer)
      : call_(call),
        scorer_(scorer),
        keys_(call),
        rows_(arena, call),
        queries_(arena, max_rows, call.batch.head_dim) {}

  // Takes the rows of a query block. With relative scores, the baseline of each is its maximum
  // score among sinks and window, as far as every row sees them.
  void begin(const QueryBlock& block, int64_t head, const Middle& middle) {
    rows_.take(block, head);
    keys_.take_queries(rows_, scorer_.convert(), queries_);
    const bool relative = call_.relative_scores;
    scorer_.set_baseline(rows_.count(), relative ? -INFINITY : 0.f);
    const int64_t outside = relative ? middle.begin + block.position + 1 - middle.end : 0;
    middle.far.in_stretches(
        outside, [&](int64_t i) { return KeysOutside<Keys>::position(middle, i); },
        [&](int64_t first, int64_t end, int64_t shift) {
          see(shift);
          scorer_.raise_baseline(end - first, queries_, KeysOutside<Keys>{keys_, middle, first});
        });
  }

  // Positions of the `keep` best of n blocks, ascending.
  int64_t best(const int32_t* blocks, int64_t n, int64_t keep, const Middle& middle,
               int32_t* kept) {
    const int64_t size = call_.key_block_size;
    middle.far.in_stretches(
        n, [&](int64_t i) { return blocks[i] * size; },
        [&](int64_t first, int64_t end, int64_t shift) {
          see(shift);
          const KeysOfBlocks<Keys> keys{keys_, middle, size, blocks + first};
          scorer_.score(first, end, size, queries_, keys);
        });
    return scorer_.best(n, keep, kept);
  }

 private:
  void see(int64_t shift) {
    if (shift == rows_.shift()) return;
    rows_.see(shift);
    keys_.take_queries(rows_, scorer_.convert(), queries_);
  }

  const SelectCall& call_;
  Scorer& scorer_;
  Keys keys_;
  SampledRows rows_;
  typename Keys::Queries queries_;
};

}  // namespace HIPSERVE_TIER
}  // namespace hipserve
