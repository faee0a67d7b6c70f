// Appending keys and values to pages, and the bounds of the runs they touch.
#pragma once
#include "tile.h"

namespace hipserve {
namespace HIPSERVE_TIER {

template <int kBytes> struct IntegerOf { typedef int16_t type __attribute__((may_alias)); };
template <> struct IntegerOf<4> { typedef int32_t type __attribute__((may_alias)); };

// Least and greatest values, as integers that order as the values do: nothing is converted, and a
// vector holds twice as many halves as floats.
template <class T> struct Box {
  using Bits = typename IntegerOf<sizeof(T)>::type;
  static constexpr Bits kGreatest = (Bits)(~0ull >> (65 - 8 * sizeof(T)));
  Bits low[kMaxDim], high[kMaxDim];
  int64_t dim;
  explicit Box(int64_t dim) : dim(dim) {
    for (int64_t c = 0; c < dim; ++c) {
      low[c] = kGreatest;
      high[c] = ~kGreatest;
    }
  }
  void add(const T* low_row, const T* high_row) {
    const Bits *x = (const Bits*)low_row, *y = (const Bits*)high_row;
    for (int64_t c = 0; c < dim; ++c) {
      low[c] = least(ordered(x[c]), low[c]);
      high[c] = most(ordered(y[c]), high[c]);
    }
  }
  void put(T* out) const {
    Bits* to = (Bits*)out;
    for (int64_t c = 0; c < dim; ++c) {
      to[c] = ordered(low[c]);
      to[dim + c] = ordered(high[c]);
    }
  }
};

// Bounds of one page and head whose first `count` keys are there, from run `first / length` on:
// the finest level from keys, each coarser one from the level below.
template <class T>
static void bound_page(const T* keys, int64_t slot_stride, T* bounds, int64_t run_stride,
                       const BoundLevels& levels, int64_t first, int64_t count, int64_t dim) {
  for (int level = 0; level < levels.count; ++level) {
    const int64_t length = levels.length[level];
    for (int64_t run = first / length; run * length < count; ++run) {
      Box<T> box(dim);
      int64_t end = least(count, (run + 1) * length);
      if (level == 0)
        for (int64_t slot = run * length; slot < end; ++slot)
          box.add(keys + slot * slot_stride, keys + slot * slot_stride);
      else
        for (int64_t child = run * levels.ratio(); child * levels.length[level - 1] < end; ++child) {
          const T* finer = bounds + (levels.offset[level - 1] + child) * run_stride;
          box.add(finer, finer + dim);
        }
      box.put(bounds + (levels.offset[level] + run) * run_stride);
    }
  }
}

// A stretch of tokens that fills consecutive slots of one page.
struct Stretch {
  int64_t page, first, end;
};

static int by_page(const void* a, const void* b) {
  int64_t x = ((const Stretch*)a)->page, y = ((const Stretch*)b)->page;
  return (x > y) - (x < y);
}

// Merges the stretches of each page, wherever in the call they are: its last slot decides where the
// page ends, its first one where to begin.
static int64_t one_per_page(Stretch* stretches, int64_t count) {
  qsort(stretches, count, sizeof(Stretch), by_page);
  int64_t merged = 0;
  for (int64_t i = 0; i < count; ++i) {
    Stretch* last = merged ? stretches + merged - 1 : nullptr;
    if (last && last->page == stretches[i].page) {
      last->first = least(last->first, stretches[i].first);
      last->end = most(last->end, stretches[i].end);
    } else {
      stretches[merged++] = stretches[i];
    }
  }
  return merged;
}

template <class T> static void write_as(const WriteCall& call) {
  const BoundLevels levels(call.page_size, call.bound_block_size, call.num_runs);
  const int64_t dim = call.head_dim, tokens = call.num_tokens, heads = call.num_kv_heads;
  Stretch* stretches = (Stretch*)malloc(sizeof(Stretch) * most(tokens, (int64_t)1));
  int64_t count = 0;
  for (int64_t t = 0; t < tokens; ++t) {
    int64_t slot = call.slot_mapping[t];
    if (slot < 0) continue;
    int64_t page = slot / call.page_size, offset = slot % call.page_size;
    Stretch* last = count ? stretches + count - 1 : nullptr;
    if (last && last->page == page && last->end == offset) ++last->end;
    else stretches[count++] = {page, offset, offset + 1};
  }
#pragma omp parallel for if (tokens > 64) schedule(static)
  for (int64_t t = 0; t < tokens; ++t) {
    int64_t slot = call.slot_mapping[t];
    if (slot < 0) continue;
    int64_t page = slot / call.page_size, offset = slot % call.page_size;
    for (int64_t h = 0; h < heads; ++h) {
      auto put = [&](const Pages& pages, const Rows& rows) {
        T* to = (T*)pages.data + page * pages.page_stride + offset * pages.slot_stride + h * pages.head_stride;
        memcpy(to, (const T*)rows.data + t * rows.row_stride + h * rows.head_stride, dim * sizeof(T));
      };
      put(call.k_cache, call.k);
      put(call.v_cache, call.v);
    }
  }
  if (call.bounds.data) {
    count = one_per_page(stretches, count);
#pragma omp parallel for if (tokens > 64) schedule(dynamic)
    for (int64_t i = 0; i < count * heads; ++i) {
      const Stretch& s = stretches[i / heads];
      int64_t h = i % heads;
      const T* keys = (const T*)call.k_cache.data + s.page * call.k_cache.page_stride + h * call.k_cache.head_stride;
      T* bounds = (T*)call.bounds.data + s.page * call.bounds.page_stride + h * call.bounds.head_stride;
      bound_page<T>(keys, call.k_cache.slot_stride, bounds, call.bounds.slot_stride, levels, s.first, s.end, dim);
    }
  }
  free(stretches);
}

template <class T> static void bounds_as(const BoundsCall& call) {
  const BoundLevels levels(call.page_size, call.bound_block_size, call.num_runs);
  const int64_t heads = call.num_kv_heads, chunk = levels.length[levels.count - 1];
  const int64_t chunks = (call.page_size + chunk - 1) / chunk;
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < call.num_pages * heads * chunks; ++i) {
    // Heads last: the keys of a chunk lie together, those of a head may not.
    int64_t page = i / (heads * chunks), h = i % heads, first = i / heads % chunks * chunk;
    const T* keys = (const T*)call.k.data + page * call.k.page_stride + h * call.k.head_stride;
    T* bounds = (T*)call.bounds.data + page * call.bounds.page_stride + h * call.bounds.head_stride;
    bound_page<T>(keys, call.k.slot_stride, bounds, call.bounds.slot_stride, levels, first,
                  least(call.page_size, first + chunk), call.head_dim);
  }
}

static void write_kv(const WriteCall& call) {
  switch (call.dtype) {
    case Dtype::bf16: return write_as<bf16>(call);
    case Dtype::f16: return write_as<f16>(call);
    default: return write_as<float>(call);
  }
}
static void compute_bounds(const BoundsCall& call) {
  switch (call.dtype) {
    case Dtype::bf16: return bounds_as<bf16>(call);
    case Dtype::f16: return bounds_as<f16>(call);
    default: return bounds_as<float>(call);
  }
}

}  // namespace HIPSERVE_TIER
}  // namespace hipserve
