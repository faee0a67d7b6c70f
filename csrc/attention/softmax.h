// Online softmax: a row's weights are relative to a reference score, which moves only when a score
// is far above it.
#pragma once
#include "exp.h"
#include "pack.h"

namespace hipserve {
namespace HIPSERVE_TIER {

constexpr float kSlack = 8.f;  // a reference moves when a score is 2^8 times above it

// Which lanes of a tile a row may read: [low, high).
struct Visible {
  int low, high;
  bool any() const { return low < high; }
};

// How a product of a query and a key becomes a score, in units of log 2.
struct ScoreScale {
  float sm_scale, softcap;

  // Applies the soft cap, if there is one.
  void cap(float* scores) const {
    if (softcap > 0)
      for (int i = 0; i < kKeys; i += kLanes)
        store(scores + i, soft_cap(load(scores + i), sm_scale, softcap));
  }
  // What is left to multiply by.
  float factor() const { return softcap > 0 ? 1.f : sm_scale * kLog2e; }
};

// What was summed of a row so far, over keys with scores s: sum = sum_s 2^(s - reference), in
// lanes, and out[c] = sum_s 2^(s - reference) v_s[c].
struct RowState {
  float *reference, *sum, *out;
  int64_t dim;

  // Makes `score` the reference: multiplies what was summed so far by 2^(reference - score).
  void rescale(float score) const {
    const float before = *reference;
    *reference = score;
    if (before == -INFINITY) return;
    const float factor = exp2f(before - score);
    store(sum, load(sum) * factor);
    for (int64_t c = 0; c < dim; c += kLanes) store(out + c, load(out + c) * factor);
  }
};

// weights[j] = 2^(factor * scores[j] - reference) for the visible keys j of a tile, 0 for others;
// adds them to the row's sum. With kWhole all keys are visible. A call for each row would load the
// constants of the exponential again.
template <class Unit, bool kWhole>
__attribute__((always_inline)) static inline void online_softmax(const float* scores, float factor,
                                                                 Visible seen, const RowState& row,
                                                                 float* weights) {
  constexpr int kVectors = kKeys / kLanes;
  auto shown = [&](int i, vf x, float otherwise) {
    if (kWhole) return x;
    vi at = lanes() + i * kLanes;
    return ((at >= seen.low) & (at < seen.high)) ? x : splat(otherwise);
  };
  float reference = *row.reference;
  vf scaled[kVectors], x[kVectors], top = splat(-INFINITY);
  for (int i = 0; i < kVectors; ++i) {
    const vf raw = load(scores + i * kLanes);
    scaled[i] = raw * factor;
    x[i] = kWhole ? scaled[i] - reference : multiply_subtract(raw, factor, reference);
    top = maximum(shown(i, x[i], -INFINITY), top);
  }
  if (any_above(top, kSlack)) {
    top = splat(-INFINITY);
    for (int i = 0; i < kVectors; ++i) top = maximum(shown(i, scaled[i], -INFINITY), top);
    reference = reduce_max(top);
    row.rescale(reference);
    for (int i = 0; i < kVectors; ++i)
      x[i] = multiply_subtract(load(scores + i * kLanes), factor, reference);
  }
  vf sum = vf{};
  for (int i = 0; i < kVectors; ++i) {
    x[i] = shown(i, exp2v<Unit::kExpDegree>(x[i]), 0.f);
    sum += x[i];
  }
  pack_weights<Unit>(x, kVectors, weights);
  store(row.sum, load(row.sum) + sum);
}

}  // namespace HIPSERVE_TIER
}  // namespace hipserve
