// Products of the sampled rows of a query block with keys and with boxes, reduced as they come.
#pragma once
#include "amx.h"
#include "few_rows.h"
#include "tile.h"

namespace hipserve {
namespace HIPSERVE_TIER {

#if defined(__AMX_BF16__)
constexpr int kBatch = 64;             // keys scored at a time, asked for a batch ahead
constexpr int kTall = 16;              // keys of a product where there are few rows
#else
constexpr int kBatch = 48;
constexpr int kTall = 2 * kRows;
#endif
constexpr int kChunk = kKeys;          // sampled rows side by side
constexpr int kBestSize = most(kBatch * kLanes, (int)kFewRows * kKeys);

// Sampled rows of a query block as columns, so that a key is scored where it lies: chunks of kChunk
// rows, units[k][row]. Lanes beyond the last row have a base of infinity and never count.
// Few rows (few_rows.h) are one behind the other instead.
struct Columns {
  float* units;
  int depth;
};

// Units lie at any even address: in units, their distance would be rounded.
static inline int64_t bytes_between(const void* a, const void* b) {
  return (const char*)b - (const char*)a;
}

// The products of `multiply` on tile registers, for rows that even_rows has spaced evenly.
#if defined(__AMX_BF16__)
template <class Use>
static inline void multiply_even(const unit* const* keys, int count, const float* chunk,
                                 int64_t lanes, int depth, const Use& use) {
  alignas(64) float products[4 * kLanes * kLanes];
  auto tall = [&](int i) { return TallRows{keys[i], bytes_between(keys[i], keys[i + 1])}; };
  auto block = [&]<int kHigh, int kWide>(int i, int64_t c) {
    const TallRows rows[2] = {tall(i), tall(i + (kHigh - 1) * kLanes)};
    multiply_tiles<kHigh, kWide, false>(rows, chunk + c, kChunk, depth / kLanes, products,
                                        kWide * kLanes);
    use(i, c, (vf(&)[kHigh * kLanes][kWide])products);
  };
  for (int i = 0; i < count; i += 2 * kLanes)
    for (int64_t c = 0; c < lanes; c += 2 * kLanes) {
      const bool wide = c + kLanes < lanes;
      if (i + kLanes < count)
        wide ? block.template operator()<2, 2>(i, c) : block.template operator()<2, 1>(i, c);
      else
        wide ? block.template operator()<1, 2>(i, c) : block.template operator()<1, 1>(i, c);
    }
}
#endif

// Makes every 16 rows lie at equal distances, and end on a whole step: neighbours in a page do, the
// others are copied.
static inline void even_rows(const unit** rows, int count, int64_t width, float* scratch) {
  const int64_t wide = (width + kStep - 1) / kStep * (kStep / 2);
  for (int i = 0; i < count; i += kLanes) {
    const int64_t apart = bytes_between(rows[i], rows[i + 1]);
    bool even = width % kStep == 0;
    for (int j = 2; j < kLanes; ++j) even &= bytes_between(rows[i + j - 1], rows[i + j]) == apart;
    if (even) continue;
    for (int j = i; j < i + kLanes; ++j) {
      float* copy = scratch + j * wide;
      memcpy(copy, rows[j], width * 2);
      memset(copy + width / 2, 0, (wide - width / 2) * 4);
      rows[j] = copy;
    }
  }
}

// Calls use(first key, first lane, products) for all products of keys and the lanes of one chunk.
template <class Unit, class Use>
static inline void multiply(const unit* const* keys, int count, const float* chunk, int64_t lanes,
                            int depth, const Use& use) {
#if defined(__AMX_BF16__)
  if constexpr (kTiled<Unit>) return multiply_even(keys, count, chunk, lanes, depth, use);
#endif
  constexpr int kWide = kColumns * kLanes;
  int64_t c = 0;
  for (; c + kWide <= lanes; c += kWide)
    for (int i = 0; i < count; i += kRows) {
      vf acc[kRows][kColumns] = {};
      product<Unit, kRows, kColumns>(keys + i, chunk + c, kChunk, depth, acc);
      use(i, c, acc);
    }
  for (; c < lanes; c += kLanes)
    for (int i = 0; i < count; i += kTall) {
      vf acc[kTall][1] = {};
      product<Unit, kTall, 1>(keys + i, chunk + c, kChunk, depth, acc);
      use(i, c, acc);
    }
}

// best[key] = each lane's greatest score with the key, less its base; a vector for each key.
template <class Unit>
static void greatest(const unit* const* keys, int count, const Columns& columns, int64_t rows,
                     const float* base, float* best) {
  for (int i = 0; i < kBatch * kLanes; i += kLanes) store(best + i, splat(-INFINITY));
  for (int64_t r = 0; r < rows; r += kChunk)
    multiply<Unit>(keys, count, columns.units + r * columns.depth, least(rows - r, (int64_t)kChunk),
                   columns.depth, [&]<int kM, int kN>(int key, int64_t lane, vf (&acc)[kM][kN]) {
                     for (int m = 0; m < kM; ++m) {
                       vf top = load(best + (key + m) * kLanes);
                       for (int n = 0; n < kN; ++n)
                         top = maximum(acc[m][n] - load(base + r + lane + n * kLanes), top);
                       store(best + (key + m) * kLanes, top);
                     }
                   });
}

// Raises each lane's base to its greatest score with the keys.
template <class Unit>
static void raise(const unit* const* keys, int count, const Columns& columns, int64_t rows,
                  float* base) {
  for (int64_t r = 0; r < rows; r += kChunk)
    multiply<Unit>(keys, count, columns.units + r * columns.depth, least(rows - r, (int64_t)kChunk),
                   columns.depth, [&]<int kM, int kN>(int, int64_t lane, vf (&acc)[kM][kN]) {
                     for (int n = 0; n < kN; ++n) {
                       float* at = base + r + lane + n * kLanes;
                       vf top = load(at);
                       for (int m = 0; m < kM; ++m) top = maximum(acc[m][n], top);
                       store(at, top);
                     }
                   });
}

// Against [minimum, maximum] of a run: at its corner (reach 1) [min(q, 0), max(q, 0)], at its centre
// (0) [q / 2, q / 2].
template <class T>
static inline void weigh_sides(const T* q, int64_t n, float reach, T* out) {
  const float near = (1 + reach) / 2, far = (1 - reach) / 2;
  for (int64_t c = 0; c < n; ++c) {
    const float x = to_float(q[c]), up = x > 0 ? x : 0, down = x > 0 ? 0 : x;
    from_float(far * up + near * down, out + c);
    from_float(near * up + far * down, out + n + c);
  }
}

}  // namespace HIPSERVE_TIER
}  // namespace hipserve
