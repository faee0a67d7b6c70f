// Products of rows in memory (keys, summaries) with rows as columns, a batch of rows at a time.
#pragma once
#include "select/rows_as_columns.h"

namespace hipserve {
namespace HIPSERVE_TIER {

#if defined(__AMX_BF16__)
constexpr int kBatch = 64;  // rows multiplied at a time, asked for a batch ahead
constexpr int kTall = 16;   // rows of a product with a single vector of columns
#else
constexpr int kBatch = 48;
constexpr int kTall = 2 * kRows;
#endif

// Units lie at any even address: in units, their distance would be rounded.
static inline int64_t bytes_between(const void* a, const void* b) {
  return (const char*)b - (const char*)a;
}

#if defined(__AMX_BF16__)
// The products of multiply() on tile registers, for rows that even_rows() has spaced evenly.
template <class Use>
static inline void multiply_even(const unit* const* keys, int count, float* chunk, int64_t lanes,
                                 int depth, const Use& use) {
  alignas(64) float products[4 * kLanes * kLanes];
  auto tall = [&](int i) { return TallRows{keys[i], bytes_between(keys[i], keys[i + 1])}; };
  auto block = [&]<int kHigh, int kWide>(int i, int64_t c) {
    const TallRows rows[2] = {tall(i), tall(i + (kHigh - 1) * kLanes)};
    multiply_tiles<kHigh, kWide, false>(rows, {chunk + c, kChunk}, depth / kLanes,
                                        {products, kWide * kLanes});
    use(i, c, (vf(&)[kHigh * kLanes][kWide]) products);
  };
  for (int i = 0; i < count; i += 2 * kLanes)
    for (int64_t c = 0; c < lanes; c += 2 * kLanes) {
      const bool wide = c + kLanes < lanes;
      if (i + kLanes < count)
        wide ? block.template operator()<2, 2>(i, c) : block.template operator()<2, 1>(i, c);
      else wide ? block.template operator()<1, 2>(i, c) : block.template operator()<1, 1>(i, c);
    }
}
#endif

// Makes every 16 rows lie at equal distances, and end on a whole step: neighbours in a page do, the
// others are copied.
static inline void even_rows(const unit** rows, int count, int64_t width, float* scratch) {
  const int64_t wide = round_up(width, (int64_t)kStep) / 2;
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
static inline void multiply(const unit* const* keys, int count, float* chunk, int64_t lanes,
                            int depth, const Use& use) {
#if defined(__AMX_BF16__)
  if constexpr (kTiled<Unit>) return multiply_even(keys, count, chunk, lanes, depth, use);
#endif
  constexpr int kWide = kColumns * kLanes;
  int64_t c = 0;
  for (; c + kWide <= lanes; c += kWide)
    for (int i = 0; i < count; i += kRows)
      with_rows<kRows>(count - i, [&]<int kM>() {
        vf acc[kM][kColumns] = {};
        product<Unit, kM, kColumns>(keys + i, chunk + c, kChunk, depth, acc);
        use(i, c, acc);
      });
  for (; c < lanes; c += kLanes)
    for (int i = 0; i < count; i += kTall) {
      vf acc[kTall][1] = {};
      product<Unit, kTall, 1>(keys + i, chunk + c, kChunk, depth, acc);
      use(i, c, acc);
    }
}

// Of how many rows multiply() takes a multiple.
template <class Unit> static inline int tall_rows(const Columns<Unit>& columns) {
  const bool wide = columns.rows % (kColumns * kLanes) == 0;
  return wide && !kTiled<Unit> ? 1 : kTall;
}

// Rows that are multiplied together: as a source found them, and as units, unless they are few
// codes. Behind `count` units the last ones are repeated.
template <class Row> struct RowBatch {
  const Row *found, *next;  // of this batch and of the one behind it
  int num_next;
  const unit* rows[kBatch];
  int64_t first;
  int count, padded;
};

// What in_batches asks of rows that are stored as K; rows in codes have the same in coded.h.
template <class K> static inline void prefetch(const K* row, int64_t width) {
  prefetch_row(row, width * sizeof(K));
}
template <class Unit, class K>
static inline void to_units(const K* const* rows, int count, const Columns<Unit>& columns,
                            float* scratch, const unit** units) {
  unit_rows<Unit, K>(rows, count, columns.width, scratch, units);
}

// Calls use(batch, columns) for batches of n groups of `size` rows: source(i) gives the i-th row, a
// Source::Row, and is called for one after the other; `seen` (SeenBy) tells the columns that meet a
// group. `convert` holds 2 kKeys rows of half the width.
template <class Seen, class Source, class Use>
static inline void in_batches(int64_t n, int64_t size, const Seen& seen, Source source,
                              float* convert, const Use& use) {
  using Row = typename Source::Row;
  Row rows[2][kBatch];
  RowBatch<Row> batch;
  const auto& any = seen.any();
  auto find = [&](int64_t first, Row* out) {
    const int count = (int)minimum(n * size - first, (int64_t)kBatch);
    for (int j = 0; j < count; ++j) {
      out[j] = source(first + j);
      if (!any.asks_ahead()) prefetch(out[j], any.width);
    }
    return count;
  };
  int turn = 0, found = find(0, rows[0]);
  for (int64_t first = 0; found > 0; turn ^= 1) {
    const int next = find(first + found, rows[turn ^ 1]);
    for (int i = 0; i < found; i += batch.count) {
      const int64_t group = (first + i) / size, limit = ceil_div(first + found, size);
      const auto& columns = seen.columns(group);
      batch.first = first + i;
      batch.count =
          (int)minimum(seen.alike(group, limit) * size - batch.first, (int64_t)(found - i));
      batch.padded = round_up(batch.count, tall_rows(columns));
      batch.found = rows[turn] + i;
      batch.next = rows[turn ^ 1] + i;
      batch.num_next = next - i;
      to_units(batch.found, batch.count, columns, convert, batch.rows);
      for (int j = batch.count; j < kBatch; ++j) batch.rows[j] = batch.rows[batch.count - 1];
      if (kTiled<typename Seen::Queries::Unit> && !columns.few)
        even_rows(batch.rows, batch.padded, columns.width, convert + kKeys * columns.width / 2);
      use(batch, columns);
    }
    first += found;
    found = next;
  }
}

}  // namespace HIPSERVE_TIER
}  // namespace hipserve
