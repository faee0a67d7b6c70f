// Where rows lie: typed views of packed tokens and of the pages of a sequence.
#pragma once
#include "simd.h"

namespace hipserve {
namespace HIPSERVE_TIER {

// The row of a token and head.
template <class T> static inline T* token_row(const Rows& rows, int64_t token, int64_t head) {
  return (T*)rows.data + token * rows.row_stride + head * rows.head_stride;
}

// The row of a slot of a page and a head; of summaries, a slot is a run.
template <class T>
static inline T* slot_row(const Pages& pages, int64_t page, int64_t slot, int64_t head) {
  return (T*)pages.data + page * pages.page_stride + slot * pages.slot_stride +
         head * pages.head_stride;
}

// The pages of one sequence, and where a position is in them.
struct Sequence {
  const int32_t* pages;
  int64_t page_size;
  int shift = 0;  // of a page size that is a power of two, else -1
  Sequence(const Batch& batch, int32_t seq)
      : pages(batch.block_table + seq * batch.table_stride), page_size(batch.page_size) {
    while (shift < 62 && (int64_t)1 << shift < page_size) ++shift;
    if ((int64_t)1 << shift != page_size) shift = -1;
  }
  int64_t page(int64_t key) const { return pages[shift >= 0 ? key >> shift : key / page_size]; }
  int64_t slot(int64_t key) const { return shift >= 0 ? key & (page_size - 1) : key % page_size; }
};

// The row of a key and head of a sequence.
template <class K>
static inline const K* key_row(const Pages& pages, const Sequence& seq, int64_t head, int64_t key) {
  return slot_row<const K>(pages, seq.page(key), seq.slot(key), head);
}

// Walks positions [key, key + count) page by page: calls use(key, number of keys) for each stretch
// that lies in one page, where rows are `slot_stride` apart.
template <class Use>
static inline void walk_pages(const Sequence& seq, int64_t key, int64_t count, const Use& use) {
  while (count > 0) {
    const int64_t here = minimum(count, seq.page_size - seq.slot(key));
    use(key, here);
    key += here;
    count -= here;
  }
}

// Asks for a row that will be read soon; into the second cache, where many fit. The empty statement
// keeps gcc from taking a function that only prefetches for one that does nothing.
static inline void prefetch_row(const void* row, size_t bytes) {
  asm volatile("");
  for (size_t i = 0; i < bytes; i += 64) __builtin_prefetch((const char*)row + i, 0, 2);
}

}  // namespace HIPSERVE_TIER
}  // namespace hipserve
