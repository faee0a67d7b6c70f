// The best of n scores, by a threshold: only sets are kept, never orders.
#pragma once
#include "storage.h"

namespace hipserve {
namespace HIPSERVE_TIER {

// Elements behind the integers of keep_best that it may read and write.
constexpr int64_t kOrderSlack = kLanes;

// Positions of the `count` maximum scores, ascending; ties go to the lower position. The threshold
// is found bit by bit on order-preserving integers; `order` holds kOrderSlack more than n of them.
static int64_t keep_best(const float* scores, int64_t n, int64_t count, int32_t* kept,
                         int32_t* order) {
  if (count >= n) {
    for (int64_t i = 0; i < n; ++i) kept[i] = (int32_t)i;
    return n;
  }
  for (int64_t i = 0; i < n; ++i) {
    int32_t bits;
    float score = scores[i] + 0.f;  // -0 and +0 are equal
    memcpy(&bits, &score, 4);
    order[i] = ordered(bits);
  }
  for (int64_t i = n; i < n + kOrderSlack; ++i) order[i] = INT32_MIN;
  auto reaching = [&](int32_t limit) {
    vi found = vi{};
    for (int64_t i = 0; i < n; i += kLanes) found -= *(const vi*)(order + i) >= limit;
    return reduce_sum(found);
  };
  int32_t limit = reaching(0) >= count ? 0 : INT32_MIN;
  for (int bit = 30; bit >= 0; --bit)
    if (reaching(limit | 1 << bit) >= count) limit |= 1 << bit;
  int64_t equal = count - (limit == INT32_MAX ? 0 : reaching(limit + 1)), taken = 0;
  for (int64_t i = 0; i < n; ++i) {  // `equal` scores at the limit are taken, the first ones
    bool take = order[i] > limit || (order[i] == limit && equal > 0);
    equal -= order[i] == limit;
    kept[taken] = (int32_t)i;
    taken += take;
  }
  return taken;
}

}  // namespace HIPSERVE_TIER
}  // namespace hipserve
