// Appending keys and values to pages, the codes of keys and the summaries of the runs they touch.
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

// The code of the key in a slot, where codes are short.
template <class K>
static inline void write_code(const IndexPages& index, int64_t page, int64_t slot, int64_t head,
                              const K* key, int64_t head_dim) {
  if (!index.codes.data) return;
  encode_key(key, head_dim, (int)index.code_bits, slot_row<uint8_t>(index.codes, page, slot, head),
             slot_row<bf16>(index.code_scales, page, slot, head));
}

template <class K> static void write_tokens(const WriteCall& call) {
  const int64_t bytes = call.head_dim * sizeof(K);
#pragma omp parallel for if (call.num_tokens > kFewTokens) schedule(static)
  for (int64_t t = 0; t < call.num_tokens; ++t) {
    const Slot slot(call.slot_mapping[t], call.page_size);
    if (!slot.kept()) continue;
    for (int64_t h = 0; h < call.num_kv_heads; ++h) {
      const K* key = token_row<K>(call.k, t, h);
      memcpy(slot_row<K>(call.k_cache, slot.page, slot.offset, h), key, bytes);
      write_code(call.index, slot.page, slot.offset, h, key, call.head_dim);
      memcpy(slot_row<K>(call.v_cache, slot.page, slot.offset, h), token_row<K>(call.v, t, h),
             bytes);
    }
  }
}

template <class K> static void write_all(const WriteCall& call) {
  write_tokens<K>(call);
  if (!call.index.summaries.data) return;
  const RunLevels levels(call.page_size, call.index.run_size, call.index.num_runs);
  const int64_t heads = call.num_kv_heads;
  Array<Stretch> stretches(call.num_tokens);
  const int64_t count = merge_stretches(stretches, list_stretches(call, stretches));
#pragma omp parallel for if (call.num_tokens > kFewTokens) schedule(dynamic)
  for (int64_t i = 0; i < count * heads; ++i) {
    const Stretch& s = stretches[i / heads];
    const int64_t head = i % heads;
    summarize_page<K>({call.k_cache, s.page, head}, {call.index, s.page, head}, levels, s.first,
                      s.end, call.head_dim);
  }
}

template <class K> static void build_all(const BuildCall& call) {
  const RunLevels levels(call.page_size, call.index.run_size, call.index.num_runs);
  const int64_t heads = call.num_kv_heads, chunk = levels.length[levels.written() - 1];
  const int64_t chunks = ceil_div(call.page_size, chunk);
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < call.num_pages * heads * chunks; ++i) {
    // Heads last: the keys of a chunk lie together, those of a head may not.
    const int64_t page = i / (heads * chunks), head = i % heads, first = i / heads % chunks * chunk;
    const int64_t end = minimum(call.page_size, first + chunk);
    const PageRows<const K> keys(call.k, page, head);
    for (int64_t slot = first; slot < end; ++slot)
      write_code(call.index, page, slot, head, keys[slot], call.head_dim);
    if (call.index.summaries.data)
      summarize_page<K>(keys, {call.index, page, head}, levels, first, end, call.head_dim);
  }
}

static void write_kv(const WriteCall& call) {
  dispatch(call.dtype, call, &Kernels::write_kv, [&]<class, class K>() { write_all<K>(call); });
}
static void build_index(const BuildCall& call) {
  dispatch(call.dtype, call, &Kernels::build_index, [&]<class, class K>() { build_all<K>(call); });
}

}  // namespace HIPSERVE_TIER
}  // namespace hipserve
