// Blocks ranked by their keys: the only place of a search that reads keys. To rank by something
// stored in another way, such as codes of keys, replace what these sources point at.
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
};

// Keys that are read without being chosen: sinks, then those from the end of the middle on.
template <class K> struct KeysOutside {
  using Row = K;
  Pages pages;
  Middle middle;
  const K* operator()(int64_t i) const {
    const int64_t key = i < middle.begin ? i : middle.end + i - middle.begin;
    return key_row<K>(pages, middle.seq, middle.kv_head, key);
  }
};

// The keys of a list of blocks, one after the other.
template <class K> struct KeysOfBlocks {
  using Row = K;
  Pages pages;
  Middle middle;
  int64_t size;  // of a block
  const int32_t* block;
  int64_t offset = 0;  // in the block
  const K* row = nullptr;
  const K* operator()(int64_t) {
    if (offset == size) {
      offset = 0;
      ++block;
    }
    const int64_t key = *block * size + offset++;
    const bool same_page = offset > 1 && middle.seq.slot(key) > 0;
    row = same_page ? row + pages.slot_stride : key_row<K>(pages, middle.seq, middle.kv_head, key);
    return row;
  }
};

// Ranks blocks by the maximum score of their keys with the sampled rows.
template <class Q, class K> class BlockRank {
 public:
  using Unit = typename UnitOf<Q, K>::type;
  BlockRank(Arena& arena, const SelectCall& call, int64_t max_rows, Scorer& scorer)
      : call_(call), scorer_(scorer), columns_(arena, max_rows, call.batch.head_dim) {}

  // Takes the rows of a query block. With relative scores, the baseline of each is its maximum
  // score among sinks and window, as far as every row sees them.
  void begin(const QueryBlock& block, int64_t head, const Middle& middle) {
    const int64_t rows = num_sampled(call_, block);
    columns_.template fill<Q>(rows, few_rows<Unit>(rows, call_.batch.head_dim), scorer_.convert(),
                              [&](int64_t r) { return sampled_row<Q>(call_, block, head, r); });
    const bool relative = call_.relative_scores;
    const int64_t outside = relative ? middle.begin + block.position + 1 - middle.end : 0;
    const KeysOutside<K> keys{call_.k, middle};
    scorer_.set_baseline(outside, columns_, relative ? -INFINITY : 0.f, keys);
  }

  // Positions of the `keep` best of n blocks, ascending.
  int64_t best(const int32_t* blocks, int64_t n, int64_t keep, const Middle& middle,
               int32_t* kept) {
    const int64_t size = call_.key_block_size;
    const KeysOfBlocks<K> keys{call_.k, middle, size, blocks};
    return scorer_.best(n, size, keep, columns_, keys, kept);
  }

 private:
  const SelectCall& call_;
  Scorer& scorer_;
  Columns<Unit> columns_;
};

}  // namespace HIPSERVE_TIER
}  // namespace hipserve
