// Scores of keys and summaries: the maximum over the sampled rows of a product less the row's
// baseline, reduced as the products come.
#pragma once
#include "select/products.h"
#include "select/threshold.h"

namespace hipserve {
namespace HIPSERVE_TIER {

// Calls use(first key, first lane, scores) for the scores of all keys with the lanes of one chunk,
// that of sampled row r.
template <class Row, class Queries, class Use>
static inline void score_chunk(const RowBatch<Row>& keys, const Queries& columns, int64_t r,
                               const Use& use) {
  using Unit = typename Queries::Unit;
  float* chunk = columns.units + r * columns.depth;
  const int64_t lanes = minimum(columns.rows - r, (int64_t)kChunk);
  if constexpr (Queries::kParts == 1) {
    multiply<Unit>(keys.rows, keys.padded, chunk, lanes, columns.depth, use);
  } else {
    const int half = columns.depth / 2;
    const unit* second[kBatch];
    float first[kBatch * kChunk];
    for (int j = 0; j < keys.padded; ++j) second[j] = keys.rows[j] + half;
    multiply<Unit>(keys.rows, keys.padded, chunk, lanes, half,
                   [&]<int kM, int kN>(int key, int64_t lane, vf(&acc)[kM][kN]) {
                     for (int m = 0; m < kM; ++m)
                       for (int n = 0; n < kN; ++n)
                         store(first + (key + m) * kChunk + lane + n * kLanes, acc[m][n]);
                   });
    multiply<Unit>(second, keys.padded, chunk + half * kChunk, lanes, half,
                   [&]<int kM, int kN>(int key, int64_t lane, vf(&acc)[kM][kN]) {
                     for (int m = 0; m < kM; ++m)
                       for (int n = 0; n < kN; ++n)
                         acc[m][n] += load(first + (key + m) * kChunk + lane + n * kLanes);
                     use(key, lane, acc);
                   });
  }
}

// best[key] = max_r (q_r . k_key - baseline_r), in lanes: a vector for each key.
template <class Row, class Queries>
static void max_over_rows(const RowBatch<Row>& keys, const Queries& columns, const float* baseline,
                          float* best) {
  for (int i = 0; i < kBatch * kLanes; i += kLanes) store(best + i, splat(-INFINITY));
  for (int64_t r = 0; r < columns.rows; r += kChunk)
    score_chunk(keys, columns, r, [&]<int kM, int kN>(int key, int64_t lane, vf(&acc)[kM][kN]) {
      for (int m = 0; m < kM; ++m) {
        vf top = load(best + (key + m) * kLanes);
        for (int n = 0; n < kN; ++n)
          top = maximum(acc[m][n] - load(baseline + r + lane + n * kLanes), top);
        store(best + (key + m) * kLanes, top);
      }
    });
}

// baseline_r = max(baseline_r, max_key q_r . k_key)
template <class Row, class Queries>
static void max_over_keys(const RowBatch<Row>& keys, const Queries& columns, float* baseline) {
  for (int64_t r = 0; r < columns.rows; r += kChunk)
    score_chunk(keys, columns, r, [&]<int kM, int kN>(int, int64_t lane, vf(&acc)[kM][kN]) {
      for (int n = 0; n < kN; ++n) {
        float* at = baseline + r + lane + n * kLanes;
        vf top = load(at);
        for (int m = 0; m < kM; ++m) top = maximum(acc[m][n], top);
        store(at, top);
      }
    });
}

// best[r][key] = q_r . k_key for few rows
template <class Row, class Unit>
static void few_products(const RowBatch<Row>& keys, const Columns<Unit>& columns, float* best) {
  TileRows none;
  none.count = 0;
  with_rows<kFewRows>(columns.rows, [&]<int kM>() {
    score_few<Unit, float, kM>(columns.units, (const void* const*)keys.rows,
                               round_up(keys.count, kLanes), columns.depth, best, none);
  });
}

// What scoring needs, whatever is scored.
class Scorer {
 public:
  Scorer(Arena& arena, int64_t max_rows, int64_t max_scores, int64_t dim) {
    baseline_ = arena.take<float>(max_rows);
    best_ = arena.take<float>(kBestSize);
    convert_ = arena.take<float>(kKeys * 2 * round_up(dim, (int64_t)kStep));
    scores_ = arena.take<float>(max_scores);
    order_ = arena.take<int32_t>(max_scores + kOrderSlack);
  }
  // Floats of kKeys keys or summaries, while they are converted.
  float* convert() const { return convert_; }

  // The baseline of each of so many rows, which the scores of keys raise.
  void set_baseline(int64_t rows, float baseline) {
    const int64_t lanes = round_up(rows, (int64_t)kLanes);
    for (int64_t r = 0; r < lanes; ++r) baseline_[r] = r < rows ? baseline : INFINITY;
  }
  // To the row's maximum score with n keys.
  template <class Seen, class Source>
  void raise_baseline(int64_t n, const Seen& seen, const Source& keys) {
    in_batches(n, 1, seen, keys, convert_, [&](const auto& batch, const auto& columns) {
      if (columns.few) few_max_over_keys(batch, columns);
      else max_over_keys(batch, columns, baseline_);
    });
  }

  // Scores n groups of `size` rows each; the score of a group is the maximum of its rows' scores.
  template <class Seen, class Source>
  void score(int64_t n, int64_t size, const Seen& seen, const Source& rows) {
    for (int64_t i = 0; i < n; ++i) scores_[i] = -INFINITY;
    in_batches(n, size, seen, rows, convert_, [&](const auto& batch, const auto& columns) {
      if (columns.few) {
        few_max_over_rows(batch, columns);
        reduce_few_groups(batch, size, scores_);
      } else {
        max_over_rows(batch, columns, baseline_, best_);
        reduce_groups(batch, size, scores_);
      }
    });
  }
  // Positions, ascending, of the `keep` best of n groups that were scored.
  int64_t best(int64_t n, int64_t keep, int32_t* kept) {
    return keep_best(scores_, n, keep, kept, order_);
  }

 private:
  static constexpr int kBestSize = maximum(kBatch * kLanes, (int)kFewRows* kKeys);

  // scores[group] = max(scores[group], max of best over its keys and all lanes)
  template <class Row>
  void reduce_groups(const RowBatch<Row>& batch, int64_t size, float* scores) {
    for (int j = 0; j < batch.count;) {
      const int64_t group = (batch.first + j) / size;
      vf best = load(best_ + j * kLanes);
      for (++j; j < batch.count && batch.first + j < (group + 1) * size; ++j)
        best = maximum(load(best_ + j * kLanes), best);
      scores[group] = maximum(reduce_max(best), scores[group]);
    }
  }
  // The same for best[key] in a single lane; the first key of a batch begins a group of whole
  // vectors.
  template <class Row>
  void reduce_few_groups(const RowBatch<Row>& batch, int64_t size, float* scores) {
    if (size == kLanes) {
      for (int j = 0; j < batch.count; j += kLanes)
        scores[(batch.first + j) / kLanes] = reduce_max(load(best_ + j));
      return;
    }
    int64_t group = batch.first / size, end = (group + 1) * size - batch.first;
    for (int j = 0; j < batch.count; ++j) {
      if (j == end) {
        ++group;
        end += size;
      }
      scores[group] = maximum(best_[j], scores[group]);
    }
  }

  // best[key] = max_r (q_r . k_key - baseline_r)
  template <class Row, class Queries>
  void few_max_over_rows(const RowBatch<Row>& keys, const Queries& columns) {
    few_products(keys, columns, best_);
    for (int j = 0; j < keys.count; j += kLanes) {
      vf best = load(best_ + j) - baseline_[0];
      for (int64_t r = 1; r < columns.rows; ++r)
        best = maximum(load(best_ + r * kKeys + j) - baseline_[r], best);
      store(best_ + j, best);
    }
  }
  // baseline_r = max(baseline_r, max_key q_r . k_key)
  template <class Row, class Queries>
  void few_max_over_keys(const RowBatch<Row>& keys, const Queries& columns) {
    few_products(keys, columns, best_);  // beyond the last key: that key again
    for (int64_t r = 0; r < columns.rows; ++r) {
      vf best = splat(baseline_[r]);
      for (int j = 0; j < keys.count; j += kLanes)
        best = maximum(load(best_ + r * kKeys + j), best);
      baseline_[r] = reduce_max(best);
    }
  }

  float *baseline_, *best_, *convert_, *scores_;
  int32_t* order_;
};

}  // namespace HIPSERVE_TIER
}  // namespace hipserve
