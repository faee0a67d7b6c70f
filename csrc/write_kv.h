// Appending keys and values to pages, and the summaries of the runs they touch.
#pragma once
#include "arena.h"
#include "dispatch.h"
#include "pages.h"
#include "run_summary.h"

namespace hipserve {
namespace HIPSERVE_TIER {

constexpr int64_t kFewTokens = 64;  // up to which waking other threads does not pay

// Where a slot is; no page for a token that is not kept.
struct Slot {
  int64_t page, offset;
  Slot(int64_t slot, int64_t page_size) : page(-1), offset(0) {
    if (slot < 0) return;
    page = slot / page_size;
    offset = slot % page_size;
  }
  bool kept() const { return page >= 0; }
};

// Slots [first, end) of one page that a call fills.
struct Stretch {
  int64_t page, first, end;
};

static int by_page(const void* a, const void* b) {
  int64_t x = ((const Stretch*)a)->page, y = ((const Stretch*)b)->page;
  return (x > y) - (x < y);
}

// The stretches that consecutive tokens fill; returns how many.
static int64_t list_stretches(const WriteCall& call, Array<Stretch>& stretches) {
  int64_t count = 0;
  for (int64_t t = 0; t < call.num_tokens; ++t) {
    const Slot slot(call.slot_mapping[t], call.page_size);
    if (!slot.kept()) continue;
    Stretch* last = count ? &stretches[count - 1] : nullptr;
    if (last && last->page == slot.page && last->end == slot.offset) ++last->end;
    else stretches[count++] = {slot.page, slot.offset, slot.offset + 1};
  }
  return count;
}

// Merges the stretches of each page, wherever in the call they are: its last slot decides where the
// page ends, its first one where to begin. Returns how many are left.
static int64_t merge_stretches(Array<Stretch>& stretches, int64_t count) {
  qsort(stretches.data, count, sizeof(Stretch), by_page);
  int64_t merged = 0;
  for (int64_t i = 0; i < count; ++i) {
    Stretch* last = merged ? &stretches[merged - 1] : nullptr;
    if (last && last->page == stretches[i].page) {
      last->first = minimum(last->first, stretches[i].first);
      last->end = maximum(last->end, stretches[i].end);
    } else {
      stretches[merged++] = stretches[i];
    }
  }
  return merged;
}

template <class K> static void write_tokens(const WriteCall& call) {
  const int64_t bytes = call.head_dim * sizeof(K);
#pragma omp parallel for if (call.num_tokens > kFewTokens) schedule(static)
  for (int64_t t = 0; t < call.num_tokens; ++t) {
    const Slot slot(call.slot_mapping[t], call.page_size);
    if (!slot.kept()) continue;
    for (int64_t h = 0; h < call.num_kv_heads; ++h) {
      memcpy(slot_row<K>(call.k_cache, slot.page, slot.offset, h), token_row<K>(call.k, t, h),
             bytes);
      memcpy(slot_row<K>(call.v_cache, slot.page, slot.offset, h), token_row<K>(call.v, t, h),
             bytes);
    }
  }
}

// Rows of a page and head, of keys or of summaries.
template <class T>
static inline PageRows<T> page_rows(const Pages& pages, int64_t page, int64_t head) {
  return {slot_row<T>(pages, page, 0, head), pages.slot_stride};
}

template <class K> static void write_all(const WriteCall& call) {
  write_tokens<K>(call);
  if (!call.bounds.data) return;
  const RunLevels levels(call.page_size, call.bound_block_size, call.num_runs);
  const int64_t heads = call.num_kv_heads;
  Array<Stretch> stretches(call.num_tokens);
  const int64_t count = merge_stretches(stretches, list_stretches(call, stretches));
#pragma omp parallel for if (call.num_tokens > kFewTokens) schedule(dynamic)
  for (int64_t i = 0; i < count * heads; ++i) {
    const Stretch& s = stretches[i / heads];
    const int64_t head = i % heads;
    summarize_page<K>(page_rows<const K>(call.k_cache, s.page, head),
                      page_rows<K>(call.bounds, s.page, head), levels, s.first, s.end,
                      call.head_dim);
  }
}

template <class K> static void summarize_all(const BoundsCall& call) {
  const RunLevels levels(call.page_size, call.bound_block_size, call.num_runs);
  const int64_t heads = call.num_kv_heads, chunk = levels.length[levels.coarsest()];
  const int64_t chunks = ceil_div(call.page_size, chunk);
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < call.num_pages * heads * chunks; ++i) {
    // Heads last: the keys of a chunk lie together, those of a head may not.
    const int64_t page = i / (heads * chunks), head = i % heads, first = i / heads % chunks * chunk;
    summarize_page<K>(page_rows<const K>(call.k, page, head), page_rows<K>(call.bounds, page, head),
                      levels, first, minimum(call.page_size, first + chunk), call.head_dim);
  }
}

static void write_kv(const WriteCall& call) {
  dispatch(call.dtype, call, &Kernels::write_kv, [&]<class, class K>() { write_all<K>(call); });
}
static void compute_bounds(const BoundsCall& call) {
  dispatch(call.dtype, call, &Kernels::compute_bounds,
           [&]<class, class K>() { summarize_all<K>(call); });
}

}  // namespace HIPSERVE_TIER
}  // namespace hipserve
