// Runs of keys that have summaries: their lengths, where they are in a page, how many a search
// keeps.
#pragma once
#include "simd.h"

namespace hipserve {
namespace HIPSERVE_TIER {

// As the constants of plan/runs.py.
constexpr int64_t kCoarseRatio = 8, kLongRatio = 16;
constexpr int64_t kCoarseKeep = 6, kLongKeep = 128, kMostKeys = (int64_t)1 << 31;
constexpr int kWrittenLevels = 2;
constexpr float kBoxRadius = 0.5f;

// Levels of runs, fine ones first, as bound_levels and bound_offsets in plan/runs.py: the number of
// runs of a page tells how many levels there are.
struct RunLevels {
  static constexpr int kMaxLevels = 8;
  int count = 0;
  int64_t length[kMaxLevels], offset[kMaxLevels + 1] = {0};
  RunLevels(int64_t page_size, int64_t fine, int64_t num_runs) {
    int64_t ratio = kCoarseRatio;
    while (ratio > 1 && ratio * fine > page_size) ratio /= 2;
    add(fine, page_size);
    if (ratio * 2 < kCoarseRatio) return;
    int64_t size = ratio * fine, next = kLongRatio * kLongRatio * fine;
    while (offset[count] < num_runs && count < kMaxLevels && size < kMostKeys) {
      add(size, page_size);
      size = next;
      next *= kLongRatio;
    }
  }
  int coarsest() const { return count - 1; }
  // Levels that lie in one page, and are written with its keys.
  int written() const { return minimum(count, kWrittenLevels); }
  // Leaves out long runs of more than `segment` keys, as levels_within in plan/runs.py.
  void keep_within(int64_t segment) {
    while (count > kWrittenLevels && length[count - 1] > segment) --count;
  }
  // Runs of the level below that one of this level holds.
  int64_t ratio(int level) const { return length[level] / length[level - 1]; }

  // How many runs of a level a search keeps that is to keep `keys`, as kept_runs in plan/runs.py.
  int64_t kept(int64_t keys, int level) const {
    if (level == 0) return ceil_div(keys, length[0]);
    int64_t runs = ceil_div(kCoarseKeep * keys, length[level]);
    if (level >= kWrittenLevels) runs = maximum(runs, kLongKeep);
    return maximum(runs - 2, (int64_t)1);
  }

 private:
  void add(int64_t size, int64_t page_size) {
    length[count++] = size;
    offset[count] = offset[count - 1] + ceil_div(page_size, size);
  }
};

}  // namespace HIPSERVE_TIER
}  // namespace hipserve
