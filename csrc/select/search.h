// Block selection: the searches that ops/select_blocks/reference defines, one query block and one
// head at a time.
#pragma once
#include "dispatch.h"
#include "select/coded.h"
#include "select/descent.h"
#include "select/tree.h"

namespace hipserve {
namespace HIPSERVE_TIER {

// Most rows of a query block that are sampled, in whole chunks.
static inline int64_t max_sampled(const SelectCall& call) {
  int64_t rows = 1;
  for (int64_t i = 0; i < call.batch.num_query_blocks; ++i)
    rows = maximum(rows, num_sampled(call, call.batch.query_blocks[i]));
  return round_up(rows, (int64_t)kChunk);
}

// The search of one thread, with its scratch, by keys stored in one of two ways. A selector Find
// has a Call, a Size (once for all threads) and find(), which returns the blocks.
template <class Keys, class Find> class Search {
 public:
  using Call = typename Find::Call;
  Search(Arena& arena, const Call& call, const typename Find::Size& size, int64_t max_rows)
      : call_(call),
        scorer_(arena, max_rows, size.scores, call.batch.head_dim),
        rows_(arena, call),
        block_rank_(arena, call, max_rows, rows_, scorer_),
        find_(arena, call, size, max_rows, rows_, scorer_, block_rank_) {}
  Search(const Search&) = delete;  // its members refer to each other

  // Writes the blocks chosen for a query block and head: ascending, then -1.
  void run(int64_t block_id, int64_t head) {
    const QueryBlock& block = call_.batch.query_blocks[block_id];
    int32_t* out = call_.indices + (block_id * call_.heads + head) * call_.max_selected;
    for (int64_t i = 0; i < call_.max_selected; ++i) out[i] = -1;
    const Sequence seq(call_.batch, block.seq);
    const int64_t end = call_.window_starts[block_id];
    const Middle middle{seq, head * call_.batch.num_kv_heads / call_.heads, call_.num_sink_tokens,
                        end, FarKeys(call_.batch, block, end)};
    if (middle.end == middle.begin) return;
    rows_.take(block, head);
    block_rank_.begin(block, middle);
    const BlockList found = find_.find(head, middle);
    for (int64_t i = 0; i < found.count; ++i) out[i] = found.data[i];
  }

 private:
  const Call& call_;
  Scorer scorer_;
  SampledRows rows_;
  BlockRank<Keys> block_rank_;
  Find find_;
};

template <class Keys, class Find> static void search_all(const typename Find::Call& call) {
  const typename Find::Size size(call);
  const int64_t max_rows = max_sampled(call), items = call.batch.num_query_blocks * call.heads;
#pragma omp parallel if (items > 1)
  {
    const TileRegisters registers;
    Scratch<Search<Keys, Find>> search(call, size, max_rows);
#pragma omp for schedule(dynamic)
    for (int64_t i = items - 1; i >= 0; --i) search->run(i / call.heads, i % call.heads);
  }
}

static void select_by_tree(const TreeCall& call) {
  if (call.index.code_bits == 4) return search_all<CodedKeys<4>, Tree<CodedKeys<4>>>(call);
  if (call.index.code_bits == 8) return search_all<CodedKeys<8>, Tree<CodedKeys<8>>>(call);
  dispatch(call.batch.dtype, call, &Kernels::select_by_tree,
           [&]<class Q, class K>() { search_all<StoredKeys<Q, K>, Tree<StoredKeys<Q, K>>>(call); });
}

template <class Keys, class Summaries> static void descend(const DescentCall& call) {
  search_all<Keys, Descent<Keys, Summaries>>(call);
}

static void select_by_bound(const DescentCall& call) {
  if (call.index.code_bits == 4) return descend<CodedKeys<4>, CodedSummaries>(call);
  if (call.index.code_bits == 8) return descend<CodedKeys<8>, CodedSummaries>(call);
  dispatch(call.batch.dtype, call, &Kernels::select_by_bound, [&]<class Q, class K>() {
    descend<StoredKeys<Q, K>, StoredSummaries<Q, K>>(call);  // summaries are stored as keys are
  });
}

}  // namespace HIPSERVE_TIER
}  // namespace hipserve
