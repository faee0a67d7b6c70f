// Block selection: the search that ops/select_blocks/reference.py defines, one query block and one
// head at a time.
#pragma once
#include "dispatch.h"
#include "select/tree.h"

namespace hipserve {
namespace HIPSERVE_TIER {

// Sizes of one thread's scratch.
struct SearchSize {
  DescentSize descent;
  int64_t rows;    // sampled rows, in whole chunks
  int64_t scores;  // of anything that is ranked
  SearchSize(const SelectCall& call, const RunLevels& levels)
      : descent(call, levels, longest(call)) {
    int64_t sampled = 1;
    for (int64_t i = 0; i < call.batch.num_query_blocks; ++i)
      sampled = maximum(sampled, num_sampled(call, call.batch.query_blocks[i]));
    rows = round_up(sampled, (int64_t)kChunk);
    scores = maximum(maximum(descent.runs, descent.blocks), 2 * beam_nodes(call));
  }

 private:
  static int64_t longest(const SelectCall& call) {
    int64_t keys = 0;
    for (int64_t i = 0; i < call.batch.num_query_blocks; ++i) {
      const QueryBlock& block = call.batch.query_blocks[i];
      keys = maximum(keys, (int64_t)block.position + block.num_rows);
    }
    return keys;
  }
};

// The search of one thread, with its scratch. Queries are stored as Q, keys as K, summaries as S.
template <class Q, class K, class S> class Search {
 public:
  Search(Arena& arena, const SelectCall& call, const RunLevels& levels, const SearchSize& size)
      : call_(call),
        scorer_(arena, size.rows, size.scores, call.batch.head_dim),
        block_rank_(arena, call, size.rows, scorer_),
        run_rank_(arena, call, levels, size.rows, scorer_),
        descent_(arena, call, levels, size.descent, block_rank_, run_rank_),
        tree_(arena, call, block_rank_) {}
  Search(const Search&) = delete;  // its members refer to each other

  // Writes the blocks chosen for a query block and head: ascending, then -1.
  void run(int64_t block_id, int64_t head) {
    const QueryBlock& block = call_.batch.query_blocks[block_id];
    int32_t* out = call_.indices + (block_id * call_.heads + head) * call_.max_selected;
    for (int64_t i = 0; i < call_.max_selected; ++i) out[i] = -1;
    const Sequence seq(call_.batch, block.seq);
    const Middle middle{seq, head * call_.batch.num_kv_heads / call_.heads, call_.num_sink_tokens,
                        call_.window_starts[block_id]};
    if (middle.end == middle.begin) return;
    block_rank_.begin(block, head, middle);
    if (call_.bounds.data) run_rank_.begin(block, head);
    const BlockList found = call_.bounds.data ? descent_.find(middle) : tree_.find(middle);
    for (int64_t i = 0; i < found.count; ++i) out[i] = found.data[i];
  }

 private:
  const SelectCall& call_;
  Scorer scorer_;
  BlockRank<Q, K> block_rank_;
  RunRank<Q, S> run_rank_;
  Descent<Q, K, S> descent_;
  Tree<Q, K> tree_;
};

template <class Q, class K> static void search_all(const SelectCall& call) {
  const RunLevels levels(call.batch.page_size, call.bound_block_size, call.num_runs);
  const SearchSize size(call, levels);
  const int64_t items = call.batch.num_query_blocks * call.heads;
#pragma omp parallel if (items > 1)
  {
    const TileRegisters registers;
    Scratch<Search<Q, K, K>> search(call, levels, size);  // summaries are stored as keys are
#pragma omp for schedule(dynamic)
    for (int64_t i = items - 1; i >= 0; --i) search->run(i / call.heads, i % call.heads);
  }
}

static void select_blocks(const SelectCall& call) {
  dispatch(call.batch.dtype, call, &Kernels::select_blocks,
           [&]<class Q, class K>() { search_all<Q, K>(call); });
}

}  // namespace HIPSERVE_TIER
}  // namespace hipserve
