// Runs ranked by their summaries: [mean, deviation] of a run's keys in every channel, which
// run_summary.h computes. The score of a run is a product with the row that reach_out() makes of q.
#pragma once
#include "runs.h"
#include "select/keys.h"

namespace hipserve {
namespace HIPSERVE_TIER {

// A run scores q . mean + reach |q| . deviation: what a key would score that lies `reach`
// deviations from the mean in every channel, towards q. out[0 .. 2n) is what meets [mean,
// deviation].
template <class Q> static inline void reach_out(const Q* q, int64_t n, float reach, Q* out) {
  for (int64_t c = 0; c < n; ++c) {
    out[c] = q[c];
    from_float(reach * __builtin_fabsf(to_float(q[c])), out + n + c);
  }
}

// The summaries of a list of runs of one level.
template <class S> struct SummariesOfRuns {
  using Row = S;
  const DescentCall& call;
  const Middle& middle;
  const int32_t* runs;
  int64_t length, offset;  // keys of a run, and where its level begins in a page
  const S* operator()(int64_t i) const {
    const int64_t key = runs[i] * length;
    const int64_t run = offset + (uint32_t)middle.seq.slot(key) / (uint32_t)length;
    return slot_row<const S>(call.bounds, middle.seq.page(key), run, middle.kv_head);
  }
};

// Ranks runs by the scores of their summaries, stored as S, with the sampled rows.
template <class Q, class S> class RunRank {
 public:
  using Unit = typename UnitOf<Q, S>::type;
  RunRank(Arena& arena, const DescentCall& call, const RunLevels& levels, int64_t max_rows,
          Scorer& scorer)
      : call_(call),
        levels_(levels),
        scorer_(scorer),
        columns_(arena, max_rows, 2 * call.batch.head_dim),
        sides_(arena.take<Q>(kChunk * 2 * call.batch.head_dim)) {}

  // Takes the rows of a query block.
  void begin(const QueryBlock& block, int64_t head) {
    const int64_t dim = call_.batch.head_dim, rows = num_sampled(call_, block);
    columns_.template fill<Q>(rows, few_rows<Unit>(rows, dim), scorer_.convert(), [&](int64_t r) {
      Q* sides = sides_ + r % kChunk * 2 * dim;
      reach_out(sampled_row<Q>(call_, block, head, r), dim, call_.bound_reach, sides);
      return sides;
    });
  }

  // Positions of the `keep` best of n runs of a level, ascending.
  int64_t best(const int32_t* runs, int64_t n, int level, int64_t keep, const Middle& middle,
               int32_t* kept) {
    const SummariesOfRuns<S> summaries{call_, middle, runs, levels_.length[level],
                                       levels_.offset[level]};
    return scorer_.best(n, 1, keep, columns_, summaries, kept);
  }

 private:
  const DescentCall& call_;
  const RunLevels& levels_;
  Scorer& scorer_;
  Columns<Unit> columns_;
  Q* sides_;  // [kChunk][2 * head_dim]
};

}  // namespace HIPSERVE_TIER
}  // namespace hipserve
