// Runs ranked by their summaries: [center, radius] of a run in every channel, which run_summary.h
// computes. How they lie and what queries meet them as is a class `Summaries`:
// StoredSummaries, or CodedSummaries in coded.h.
#pragma once
#include "runs.h"
#include "select/keys.h"

namespace hipserve {
namespace HIPSERVE_TIER {

// A run scores q . center + reach |q| . radius: what a key would score that lies `reach` radii
// from the center in every channel, towards q. out[0 .. 2n) is what meets [center, radius].
template <class Q> static inline void reach_out(const Q* q, int64_t n, float reach, Q* out) {
  for (int64_t c = 0; c < n; ++c) {
    out[c] = q[c];
    from_float(reach * __builtin_fabsf(to_float(q[c])), out + n + c);
  }
}

// Summaries stored as S, met by queries stored as Q.
template <class Q, class S> class StoredSummaries {
 public:
  using Row = const S*;
  using Unit = typename UnitOf<Q, S>::type;
  using Queries = Columns<Unit>;
  StoredSummaries(Arena& arena, const DescentCall& call)
      : call_(call), sides_(arena.take<Q>(kChunk * 2 * call.batch.head_dim)) {}
  static Queries queries(Arena& arena, int64_t max_rows, int64_t head_dim) {
    return {arena, max_rows, 2 * head_dim};
  }
  Row at(int64_t page, int64_t run, int64_t head) const {
    return slot_row<const S>(call_.index.summaries, page, run, head);
  }
  void take_queries(const SampledRows& rows, float* convert, Queries& queries) const {
    const int64_t dim = call_.batch.head_dim, count = rows.count();
    queries.template fill<Q>(count, few_rows<Unit>(count, dim), convert, [&](int64_t r) {
      Q* sides = sides_ + r % kChunk * 2 * dim;
      reach_out(rows.template row<Q>(r), dim, call_.bound_reach, sides);
      return sides;
    });
  }

 private:
  const DescentCall& call_;
  Q* sides_;  // [kChunk][2 * head_dim]
};

// The summaries of a list of runs of one level.
template <class Summaries> struct SummariesOfRuns {
  using Row = typename Summaries::Row;
  const Summaries& summaries;
  const Middle& middle;
  const int32_t* runs;
  int64_t length, offset;  // keys of a run, and where its level begins in a page
  Row operator()(int64_t i) const {
    const int64_t key = (runs[i] + 1) * length - 1;  // a run lies with its last key
    const int64_t run = offset + (uint32_t)middle.seq.slot(key) / (uint32_t)length;
    return summaries.at(middle.seq.page(key), run, middle.kv_head);
  }
};

// Ranks runs by the scores of their summaries with the sampled rows.
template <class Summaries> class RunRank {
 public:
  RunRank(Arena& arena, const DescentCall& call, const RunLevels& levels, int64_t max_rows,
          Scorer& scorer)
      : levels_(levels),
        scorer_(scorer),
        summaries_(arena, call),
        rows_(arena, call),
        queries_(Summaries::queries(arena, max_rows, call.batch.head_dim)) {}

  // Takes the rows of a query block.
  void begin(const QueryBlock& block, int64_t head) {
    rows_.take(block, head);
    summaries_.take_queries(rows_, scorer_.convert(), queries_);
  }

  // Positions of the `keep` best of n runs of a level, ascending.
  int64_t best(const int32_t* runs, int64_t n, int level, int64_t keep, const Middle& middle,
               int32_t* kept) {
    const int64_t length = levels_.length[level], offset = levels_.offset[level];
    middle.far.in_stretches(
        n, [&](int64_t i) { return runs[i] * length; },
        [&](int64_t first, int64_t end, int64_t shift) {
          see(shift);
          const SummariesOfRuns<Summaries> of_runs{summaries_, middle, runs + first, length,
                                                   offset};
          scorer_.score(first, end, 1, queries_, of_runs);
        });
    return scorer_.best(n, keep, kept);
  }

 private:
  void see(int64_t shift) {
    if (shift == rows_.shift()) return;
    rows_.see(shift);
    summaries_.take_queries(rows_, scorer_.convert(), queries_);
  }

  const RunLevels& levels_;
  Scorer& scorer_;
  Summaries summaries_;
  SampledRows rows_;
  typename Summaries::Queries queries_;
};

}  // namespace HIPSERVE_TIER
}  // namespace hipserve
