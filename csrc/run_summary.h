// The summary of a run of keys: a center and a radius in every channel. What scores it is in
// select/summaries.h.
#pragma once
#include "codes.h"
#include "pages.h"
#include "runs.h"

namespace hipserve {
namespace HIPSERVE_TIER {

constexpr int kSummaryChannels = 16;  // channels whose sums stay in registers

// Rows of one page and head: of its keys, or of the summaries of its runs.
template <class T> struct PageRows {
  T* data;
  int64_t stride;
  PageRows(const Pages& pages, int64_t page, int64_t head)
      : data(pages.data ? slot_row<T>(pages, page, 0, head) : nullptr), stride(pages.slot_stride) {}
  T* operator[](int64_t i) const { return data + i * stride; }
};

// The summaries of one page and head: [center, radius], stored as K or as codes of both sides.
template <class K> struct SummaryRows {
  PageRows<K> rows;
  PageRows<int8_t> codes;  // the same memory
  PageRows<bf16> scales;
  SummaryRows(const IndexPages& index, int64_t page, int64_t head)
      : rows(index.summaries, page, head),
        codes(index.summaries, page, head),
        scales(index.summary_scales, page, head) {}

  // sides: of n floats each; codes leave their integers there.
  void put(int64_t run, float* sides, int64_t n) const {
    if (scales.data) {
      for (int side = 0; side < 2; ++side)
        from_float(encode(sides + side * n, n, kSummaryBits, codes[run] + side * n),
                   scales[run] + side);
    } else {
      for (int64_t c = 0; c < 2 * n; ++c) from_float(sides[c], rows[run] + c);
    }
  }
};

// The finest runs: mean = S1 / n and deviation = sqrt(n S2 - S1^2) / n, where S1 and S2 are the
// sums of the keys [first, end) and of their squares. In 64 bits these sums are exact for keys of
// 16 bits, whatever their order: every backend computes the same summary.
template <class K>
static void moments_of_run(const PageRows<const K>& keys, int64_t first, int64_t end, int64_t dim,
                           float* sides) {
  const double n = (double)(end - first);
  for (int64_t c = 0; c < dim; c += kSummaryChannels) {
    double sum[kSummaryChannels] = {}, squares[kSummaryChannels] = {};
    for (int64_t slot = first; slot < end; ++slot) {
      const K* key = keys[slot] + c;
      for (int j = 0; j < kSummaryChannels; ++j) {
        const double x = to_float(key[j]);
        sum[j] += x;
        squares[j] += x * x;
      }
    }
    for (int j = 0; j < kSummaryChannels; ++j) {
      const double spread = n * squares[j] - sum[j] * sum[j];
      sides[c + j] = (float)(sum[j] / n);
      sides[dim + c + j] = (float)(__builtin_sqrt(maximum(spread, 0.0)) / n);
    }
  }
}

// Longer runs: the middle of minimum and maximum, and kBoxRadius of half their distance, which
// shows a single key that stands out, however long the run.
template <class K>
static void box_of_run(const PageRows<const K>& keys, int64_t first, int64_t end, int64_t dim,
                       float* sides) {
  for (int64_t c = 0; c < dim; c += kSummaryChannels) {
    float low[kSummaryChannels], high[kSummaryChannels];
    for (int j = 0; j < kSummaryChannels; ++j) low[j] = high[j] = to_float(keys[first][c + j]);
    for (int64_t slot = first + 1; slot < end; ++slot) {
      const K* key = keys[slot] + c;
      for (int j = 0; j < kSummaryChannels; ++j) {
        const float x = to_float(key[j]);
        low[j] = minimum(low[j], x);
        high[j] = maximum(high[j], x);
      }
    }
    for (int j = 0; j < kSummaryChannels; ++j) {
      sides[c + j] = (low[j] + high[j]) / 2;
      sides[dim + c + j] = (high[j] - low[j]) / 2 * kBoxRadius;
    }
  }
}

// Summaries of one page and head whose first `count` keys are there, from the run of key `first`
// on; longer runs than those of a page are joined from these (ops/write_kv/join_runs.py).
template <class K>
static void summarize_page(const PageRows<const K>& keys, const SummaryRows<K>& summaries,
                           const RunLevels& levels, int64_t first, int64_t count, int64_t dim) {
  float sides[2 * kMaxDim];
  for (int level = 0; level < levels.written(); ++level) {
    const int64_t length = levels.length[level];
    for (int64_t run = first / length; run * length < count; ++run) {
      const int64_t end = minimum(count, (run + 1) * length);
      if (level == 0) moments_of_run(keys, run * length, end, dim, sides);
      else box_of_run(keys, run * length, end, dim, sides);
      summaries.put(levels.offset[level] + run, sides, dim);
    }
  }
}

}  // namespace HIPSERVE_TIER
}  // namespace hipserve
