// The summary of a run of keys: mean and standard deviation of its keys in every channel. What
// scores it is in select/summaries.h.
#pragma once
#include "codes.h"
#include "pages.h"
#include "runs.h"

namespace hipserve {
namespace HIPSERVE_TIER {

constexpr int kMomentChannels = 16;  // channels whose sums stay in registers

// Rows of one page and head: of its keys, or of the summaries of its runs.
template <class T> struct PageRows {
  T* data;
  int64_t stride;
  PageRows(const Pages& pages, int64_t page, int64_t head)
      : data(pages.data ? slot_row<T>(pages, page, 0, head) : nullptr), stride(pages.slot_stride) {}
  T* operator[](int64_t i) const { return data + i * stride; }
};

// The summaries of one page and head: [mean, deviation], stored as K or as codes of both sides.
template <class K> struct SummaryRows {
  PageRows<K> rows;
  PageRows<int8_t> codes;  // the same memory
  PageRows<bf16> scales;
  SummaryRows(const IndexPages& index, int64_t page, int64_t head)
      : rows(index.summaries, page, head),
        codes(index.summaries, page, head),
        scales(index.summary_scales, page, head) {}

  // moments: both sides of n floats each; codes leave their integers there.
  void put(int64_t run, float* moments, int64_t n) const {
    if (scales.data) {
      for (int side = 0; side < 2; ++side)
        from_float(encode(moments + side * n, n, kSummaryBits, codes[run] + side * n),
                   scales[run] + side);
    } else {
      for (int64_t c = 0; c < 2 * n; ++c) from_float(moments[c], rows[run] + c);
    }
  }
};

// mean = S1 / n and deviation = sqrt(n S2 - S1^2) / n, where S1 and S2 are the sums of the keys
// [first, end) and of their squares. In 64 bits these sums are exact for keys of 16 bits, whatever
// their order: every backend computes the same summary.
template <class K>
static void moments_of_run(const PageRows<const K>& keys, int64_t first, int64_t end, int64_t dim,
                           float* moments) {
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
      moments[c + j] = (float)(sum[j] / n);
      moments[dim + c + j] = (float)(__builtin_sqrt(maximum(spread, 0.0)) / n);
    }
  }
}

// Summaries of one page and head whose first `count` keys are there, from the run of key `first`
// on.
template <class K>
static void summarize_page(const PageRows<const K>& keys, const SummaryRows<K>& summaries,
                           const RunLevels& levels, int64_t first, int64_t count, int64_t dim) {
  float moments[2 * kMaxDim];
  for (int level = 0; level < levels.count; ++level) {
    const int64_t length = levels.length[level];
    for (int64_t run = first / length; run * length < count; ++run) {
      moments_of_run(keys, run * length, minimum(count, (run + 1) * length), dim, moments);
      summaries.put(levels.offset[level] + run, moments, dim);
    }
  }
}

}  // namespace HIPSERVE_TIER
}  // namespace hipserve
