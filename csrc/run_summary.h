// The summary of a run of keys: mean and standard deviation of its keys in every channel. What
// scores it is in select/summaries.h.
#pragma once
#include "product.h"
#include "runs.h"

namespace hipserve {
namespace HIPSERVE_TIER {

constexpr int kMomentChannels = 16;  // channels whose sums stay in registers

// Rows of one page and head: of its keys, or of the summaries of its runs.
template <class T> struct PageRows {
  T* data;
  int64_t stride;
  T* operator[](int64_t i) const { return data + i * stride; }
};

// mean = S1 / n and deviation = sqrt(n S2 - S1^2) / n, where S1 and S2 are the sums of the keys
// [first, end) and of their squares. In 64 bits these sums are exact for keys of 16 bits, whatever
// their order: every backend computes the same summary.
template <class K>
static void summarize_run(const PageRows<const K>& keys, int64_t first, int64_t end, int64_t dim,
                          K* summary) {
  const double n = (double)(end - first);
  for (int64_t c = 0; c < dim; c += kMomentChannels) {
    double sum[kMomentChannels] = {}, squares[kMomentChannels] = {};
    for (int64_t slot = first; slot < end; ++slot) {
      const K* key = keys[slot] + c;
      for (int j = 0; j < kMomentChannels; ++j) {
        const double x = to_float(key[j]);
        sum[j] += x;
        squares[j] += x * x;
      }
    }
    for (int j = 0; j < kMomentChannels; ++j) {
      const double spread = n * squares[j] - sum[j] * sum[j];
      from_float((float)(sum[j] / n), summary + c + j);
      from_float((float)(__builtin_sqrt(maximum(spread, 0.0)) / n), summary + dim + c + j);
    }
  }
}

// Summaries of one page and head whose first `count` keys are there, from the run of key `first`
// on.
template <class K>
static void summarize_page(const PageRows<const K>& keys, const PageRows<K>& summaries,
                           const RunLevels& levels, int64_t first, int64_t count, int64_t dim) {
  for (int level = 0; level < levels.count; ++level) {
    const int64_t length = levels.length[level];
    for (int64_t run = first / length; run * length < count; ++run)
      summarize_run(keys, run * length, minimum(count, (run + 1) * length), dim,
                    summaries[levels.offset[level] + run]);
  }
}

}  // namespace HIPSERVE_TIER
}  // namespace hipserve
