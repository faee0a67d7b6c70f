// Runs of keys that have summaries: their lengths, where they are in a page, how many a search
// keeps.
#pragma once
#include "simd.h"

namespace hipserve {
namespace HIPSERVE_TIER {

constexpr int64_t kCoarseRatio = 16;  // as COARSE_RATIO in plan/runs.py
constexpr int64_t kCoarseKeep = 6;    // as COARSE_KEEP in plan/runs.py

// Levels of runs, fine ones first, as bound_levels and bound_offsets in plan/runs.py: the number of
// runs of a page tells whether there is a coarse level.
struct RunLevels {
  static constexpr int64_t kMaxLevels = 2;
  int64_t count = 0, length[kMaxLevels], offset[kMaxLevels + 1] = {0};
  RunLevels(int64_t page_size, int64_t fine, int64_t num_runs) {
    int64_t ratio = kCoarseRatio;
    while (ratio > 1 && ratio * fine > page_size) ratio /= 2;
    const bool fine_only = num_runs == ceil_div(page_size, fine);
    add(fine, page_size);
    if (ratio * 4 >= kCoarseRatio && !fine_only) add(ratio * fine, page_size);
  }
  int coarsest() const { return (int)count - 1; }
  // Fine runs of a coarse one.
  int64_t ratio() const { return length[coarsest()] / length[0]; }

  // How many runs of a level a search keeps that is to keep `keys`, as kept_runs in plan/runs.py.
  int64_t kept(int64_t keys, int level) const {
    if (level == 0) return ceil_div(keys, length[0]);
    return maximum(ceil_div(kCoarseKeep * keys, length[level]) - 2, (int64_t)1);
  }

 private:
  void add(int64_t size, int64_t page_size) {
    length[count++] = size;
    offset[count] = offset[count - 1] + ceil_div(page_size, size);
  }
};

}  // namespace HIPSERVE_TIER
}  // namespace hipserve
