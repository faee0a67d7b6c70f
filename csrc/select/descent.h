// The search through summaries: long runs first, then the shorter ones of those kept, then blocks.
#pragma once
#include "select/summaries.h"

namespace hipserve {
namespace HIPSERVE_TIER {

// Levels of a descent that is to find `budget` keys, and lengths of its lists.
struct DescentSize {
  RunLevels levels;
  int64_t runs = 0;    // candidates of a level
  int64_t kept = 0;    // runs that a level keeps
  int64_t blocks = 0;  // of the fine runs kept
  int64_t scores = 0;  // of anything that is ranked
  explicit DescentSize(const DescentCall& call)
      : levels(call.batch.page_size, call.index.run_size, call.index.num_runs) {
    if (call.batch.rope.partner) levels.keep_within((int64_t)1 << segment_bits(call.batch.rope));
    const int64_t keys = wanted_keys(call), longest = longest_sequence(call);
    int64_t kept_above = -1;
    for (int level = levels.coarsest(); level >= 0; --level) {
      // Children of what is kept above, and less than a parent's worth at each end.
      const int64_t candidates = kept_above < 0 ? longest / levels.length[level] + 1
                                                : (kept_above + 2) * levels.ratio(level + 1);
      kept_above = minimum(levels.kept(keys, level), candidates);
      runs = maximum(runs, candidates);
      kept = maximum(kept, kept_above);
    }
    blocks = kept_above * (levels.length[0] / call.key_block_size);
    scores = maximum(runs, blocks);
  }
  // Keys that the fine runs kept should hold; re-ranking leaves `budget` of them.
  static int64_t wanted_keys(const DescentCall& call) {
    return call.budget * maximum(call.rerank, (int64_t)1);
  }
};

template <class Keys, class Summaries> class Descent {
 public:
  using Call = DescentCall;
  using Size = DescentSize;
  Descent(Arena& arena, const Call& call, const Size& size, int64_t max_rows, SampledRows& rows,
          Scorer& scorer, BlockRank<Keys>& blocks)
      : call_(call),
        levels_(size.levels),
        block_rank_(blocks),
        run_rank_(arena, call, levels_, max_rows, rows, scorer) {
    candidates_ = arena.take<int32_t>(size.runs);
    best_runs_ = arena.take<int32_t>(size.runs);
    kept_runs_ = arena.take<int32_t>(size.kept);
    proposed_ = arena.take<int32_t>(size.blocks);
    best_blocks_ = arena.take<int32_t>(size.blocks);
    found_ = arena.take<int32_t>(size.blocks);
  }

  // As many blocks as the head may choose, ascending.
  BlockList find(int64_t head, const Middle& middle) {
    run_rank_.begin();
    const BlockList proposed = propose(middle);
    if (!call_.rerank) return proposed;
    const int64_t keep =
        call_.head_blocks ? call_.head_blocks[head] : call_.budget / call_.key_block_size;
    const int64_t n = block_rank_.best(proposed.data, proposed.count, keep, middle, best_blocks_);
    for (int64_t i = 0; i < n; ++i) found_[i] = proposed.data[best_blocks_[i]];
    return {found_, n};
  }

 private:
  // The blocks of the best fine runs.
  BlockList propose(const Middle& middle) {
    const int64_t keys = DescentSize::wanted_keys(call_);
    int64_t kept = -1;
    for (int level = top(middle, keys); level >= 0; --level) {
      const int64_t n = list_candidates(kept, level, middle);
      const int64_t keep = levels_.kept(keys, level);
      kept = run_rank_.best(candidates_, n, level, keep, middle, best_runs_);
      for (int64_t i = 0; i < kept; ++i) kept_runs_[i] = candidates_[best_runs_[i]];
    }
    const int64_t per_run = levels_.length[0] / call_.key_block_size, n = kept * per_run;
    for (int64_t i = 0; i < n; ++i)
      proposed_[i] = (int32_t)(kept_runs_[i / per_run] * per_run + i % per_run);
    return {proposed_, n};
  }

  // The level to begin with: of those above it, a search would keep every run.
  int top(const Middle& middle, int64_t keys) const {
    int level = levels_.coarsest();
    while (level > 0 && runs_in(middle, level).count() <= levels_.kept(keys, level)) --level;
    return level;
  }

  // Runs of a level that lie in the middle.
  struct Range {
    int64_t begin, end;
    int64_t count() const { return maximum(end - begin, (int64_t)0); }
  };
  Range runs_in(const Middle& middle, int level) const {
    const int64_t length = levels_.length[level];
    return {ceil_div(middle.begin, length), middle.end / length};
  }

  // Runs of a level to score, ascending: children of the kept runs, and runs whose parent sticks
  // out of the middle. `kept` is -1 at the level to begin with.
  int64_t list_candidates(int64_t kept, int level, const Middle& middle) {
    const auto [begin, end] = runs_in(middle, level);
    int64_t n = 0;
    auto add = [&](int64_t from, int64_t to) {
      for (int64_t run = from; run < to; ++run) candidates_[n++] = (int32_t)run;
    };
    if (kept < 0) {
      add(begin, end);
      return n;
    }
    const int64_t ratio = levels_.ratio(level + 1);
    int64_t low = runs_in(middle, level + 1).begin * ratio;
    int64_t high = runs_in(middle, level + 1).end * ratio;
    if (low >= high) low = high = end;  // no parent fits: all of them, once
    add(begin, minimum(low, end));
    for (int64_t i = 0; i < kept; ++i) add(kept_runs_[i] * ratio, (kept_runs_[i] + 1) * ratio);
    add(maximum(high, begin), end);
    return n;
  }

  const Call& call_;
  const RunLevels& levels_;
  BlockRank<Keys>& block_rank_;
  RunRank<Summaries> run_rank_;
  int32_t *candidates_, *best_runs_, *kept_runs_;  // runs of one level; positions among candidates
  int32_t *proposed_, *best_blocks_, *found_;      // blocks; positions among those proposed
};

}  // namespace HIPSERVE_TIER
}  // namespace hipserve
