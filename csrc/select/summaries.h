// Runs ranked by their summaries: [center, radius] of a run in every channel, which run_summary.h
// computes. How they lie and what queries meet them as is a class `Summaries`:
// StoredSummaries, or CodedSummaries in coded.h.
#pragma once
#include "runs.h"
#include "select/keys.h"

namespace hipserve {
namespace HIPSERVE_TIER {

// A run scores q . center + reach |q| . radius: what a key would score that lies `reach` radii
// from the center in every channel, towards q. Units of reach |q|, rounded to Q, for units of q.
template <class Unit, class Q> static inline vf reach_out(vf q, float reach) {
  const vf size = (vf)((vu)q & (Unit::kValues == 1 ? 0x7fffffff : 0x7fff7fff));
  if (reach == 1.f) return size;
  return units_of<Unit, Q>([&](int i) { return reach * value_of<Unit>(size, i); });
}

// Summaries stored as S, met by queries stored as Q.
template <class Q, class S> class StoredSummaries {
 public:
  using Row = const S*;
  using Unit = typename UnitOf<Q, S>::type;
  using Queries = Columns<Unit>;
  explicit StoredSummaries(const DescentCall& call) : call_(call) {}
  static Queries queries(Arena& arena, int64_t max_rows, int64_t head_dim) {
    return {arena, max_rows, 2 * head_dim};
  }
  Row at(int64_t page, int64_t run, int64_t head) const {
    return slot_row<const S>(call_.index.summaries, page, run, head);
  }
  void take_queries(SampledRows& rows, int64_t shift, float* convert, const Queries& unmoved,
                    Queries& queries) const {
    const int64_t dim = call_.batch.head_dim, count = rows.count();
    queries.template take<Q>(rows, shift, dim, convert, unmoved);
    const int64_t lanes = queries.few ? 1 : kChunk;  // of a unit
    for (int64_t r = 0; r < count; r += lanes) {
      float *center = queries.units + r * queries.depth,
            *radius = center + dim / Unit::kValues * lanes;
      for (int64_t i = 0; i < radius - center; i += kLanes)
        store(radius + i, reach_out<Unit, Q>(load(center + i), call_.bound_reach));
    }
  }

 private:
  const DescentCall& call_;
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
          SampledRows& rows, Scorer& scorer)
      : levels_(levels),
        scorer_(scorer),
        summaries_(call),
        rows_(arena, max_rows, call.batch.head_dim, summaries_, rows, scorer.convert()) {}

  // Begins with rows of a query block that were sampled.
  void begin() { rows_.forget(); }

  // Positions of the `keep` best of n runs of a level, ascending.
  int64_t best(const int32_t* runs, int64_t n, int level, int64_t keep, const Middle& middle,
               int32_t* kept) {
    const int64_t length = levels_.length[level], offset = levels_.offset[level];
    const SummariesOfRuns<Summaries> of_runs{summaries_, middle, runs, length, offset};
    const auto seen = rows_.by(middle.far, [&](int64_t i) { return runs[i] * length; });
    scorer_.score(n, 1, seen, of_runs);
    return scorer_.best(n, keep, kept);
  }

 private:
  const RunLevels& levels_;
  Scorer& scorer_;
  Summaries summaries_;
  SeenRows<Summaries> rows_;
};

}  // namespace HIPSERVE_TIER
}  // namespace hipserve
