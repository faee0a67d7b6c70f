// Blocks ranked by their keys: the only place of a search that reads keys, or their codes. How keys
// lie and what queries meet them as is a class `Keys`: StoredKeys, or CodedKeys in coded.h.
#pragma once
#include "select/scores.h"
#include "select/seen_rows.h"

namespace hipserve {
namespace HIPSERVE_TIER {

// Blocks that a search has found, ascending.
struct BlockList {
  const int32_t* data;
  int64_t count;
};

// Keys stored as K, met by queries stored as Q.
template <class Q, class K> class StoredKeys {
 public:
  using Row = const K*;
  using Unit = typename UnitOf<Q, K>::type;
  using Queries = Columns<Unit>;
  explicit StoredKeys(const SelectCall& call) : call_(call) {}
  static Queries queries(Arena& arena, int64_t max_rows, int64_t head_dim) {
    return {arena, max_rows, head_dim};
  }
  Row at(const Middle& middle, int64_t key) const {
    return key_row<K>(call_.index.codes, middle.seq, middle.kv_head, key);
  }
  // The row of the next slot.
  Row next(Row row) const { return row + call_.index.codes.slot_stride; }
  void take_queries(SampledRows& rows, int64_t shift, float* convert, const Queries& unmoved,
                    Queries& queries) const {
    queries.template take<Q>(rows, shift, call_.batch.head_dim, convert, unmoved);
  }

 private:
  const SelectCall& call_;
};

// Keys that are read without being chosen: sinks, then those from the end of the middle on.
template <class Keys> struct KeysOutside {
  using Row = typename Keys::Row;
  const Keys& keys;
  const Middle& middle;
  Row operator()(int64_t i) const { return keys.at(middle, position(i)); }
  int64_t position(int64_t i) const { return i < middle.begin ? i : middle.end + i - middle.begin; }
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
  BlockRank(Arena& arena, const SelectCall& call, int64_t max_rows, SampledRows& rows,
            Scorer& scorer)
      : call_(call),
        scorer_(scorer),
        keys_(call),
        rows_(arena, max_rows, call.batch.head_dim, keys_, rows, scorer.convert()) {}

  // Begins with rows of a query block that were sampled. With relative scores, the baseline of
  // each is its maximum score among sinks and window, as far as every row sees them.
  void begin(const QueryBlock& block, const Middle& middle) {
    rows_.forget();
    const bool relative = call_.relative_scores;
    scorer_.set_baseline(num_sampled(call_, block), relative ? -INFINITY : 0.f);
    if (!relative) return;
    const KeysOutside<Keys> keys{keys_, middle};
    const auto seen = rows_.by(middle.far, [&](int64_t i) { return keys.position(i); });
    scorer_.raise_baseline(middle.begin + block.position + 1 - middle.end, seen, keys);
  }

  // Positions of the `keep` best of n blocks, ascending.
  int64_t best(const int32_t* blocks, int64_t n, int64_t keep, const Middle& middle,
               int32_t* kept) {
    const int64_t size = call_.key_block_size;
    const auto seen = rows_.by(middle.far, [&](int64_t i) { return blocks[i] * size; });
    scorer_.score(n, size, seen, KeysOfBlocks<Keys>{keys_, middle, size, blocks});
    return scorer_.best(n, keep, kept);
  }

 private:
  const SelectCall& call_;
  Scorer& scorer_;
  Keys keys_;
  SeenRows<Keys> rows_;
};

}  // namespace HIPSERVE_TIER
}  // namespace hipserve
