// The summary of a run of keys: today [minimum, maximum] of its keys in every channel. What scores
// it is in select/summaries.h.
#pragma once
#include "product.h"
#include "runs.h"

namespace hipserve {
namespace HIPSERVE_TIER {

template <int kBytes> struct IntegerOf {
  typedef int16_t type __attribute__((may_alias));
};
template <> struct IntegerOf<4> {
  typedef int32_t type __attribute__((may_alias));
};

// Minimum and maximum of rows stored as S, as integers that order as the numbers do: nothing is
// converted, and a vector holds twice as many halves as floats.
template <class S> struct RunSummary {
  using Bits = typename IntegerOf<sizeof(S)>::type;
  static constexpr Bits kLargest = (Bits)(~0ull >> (65 - 8 * sizeof(S)));
  Bits low[kMaxDim], high[kMaxDim];
  int64_t dim;
  explicit RunSummary(int64_t dim) : dim(dim) {
    for (int64_t c = 0; c < dim; ++c) {
      low[c] = kLargest;
      high[c] = ~kLargest;
    }
  }
  void add_key(const S* key) { add(key, key); }
  void add_summary(const S* finer) { add(finer, finer + dim); }
  void put(S* out) const {
    Bits* to = (Bits*)out;
    for (int64_t c = 0; c < dim; ++c) {
      to[c] = ordered(low[c]);
      to[dim + c] = ordered(high[c]);
    }
  }

 private:
  void add(const S* low_row, const S* high_row) {
    const Bits *x = (const Bits*)low_row, *y = (const Bits*)high_row;
    for (int64_t c = 0; c < dim; ++c) {
      low[c] = minimum(ordered(x[c]), low[c]);
      high[c] = maximum(ordered(y[c]), high[c]);
    }
  }
};

// Rows of one page and head: of its keys, or of the summaries of its runs.
template <class T> struct PageRows {
  T* data;
  int64_t stride;
  T* operator[](int64_t i) const { return data + i * stride; }
};

// Summaries of one page and head whose first `count` keys are there, from the run of key `first`
// on: the fine level from keys, each coarser one from the level below.
template <class K>
static void summarize_page(const PageRows<const K>& keys, const PageRows<K>& summaries,
                           const RunLevels& levels, int64_t first, int64_t count, int64_t dim) {
  for (int level = 0; level < levels.count; ++level) {
    const int64_t length = levels.length[level];
    for (int64_t run = first / length; run * length < count; ++run) {
      RunSummary<K> summary(dim);
      const int64_t end = minimum(count, (run + 1) * length);
      if (level == 0)
        for (int64_t slot = run * length; slot < end; ++slot) summary.add_key(keys[slot]);
      else
        for (int64_t child = run * levels.ratio(); child * levels.length[level - 1] < end; ++child)
          summary.add_summary(summaries[levels.offset[level - 1] + child]);
      summary.put(summaries[levels.offset[level] + run]);
    }
  }
}

}  // namespace HIPSERVE_TIER
}  // namespace hipserve
