// Block selection: the search that ops/select_blocks/reference.py defines, one query block and one
// head at a time. Sampled rows are columns and keys are scored where they lie, reduced to the
// greatest score of each as they come; only sets are kept, never orders.
#pragma once
#include "amx.h"
#include "few_rows.h"
#include "score.h"
#include "tile.h"

namespace hipserve {
namespace HIPSERVE_TIER {

constexpr int64_t kCoarseKeep = 6;  // as COARSE_KEEP in types.py

// Positions of the `count` greatest scores, ascending; ties go to the lower position. The threshold
// is found bit by bit on order-preserving integers; `keys` has room for a vector more than n.
static int64_t top(const float* scores, int64_t n, int64_t count, int32_t* kept, int32_t* keys) {
  if (count >= n) {
    for (int64_t i = 0; i < n; ++i) kept[i] = (int32_t)i;
    return n;
  }
  for (int64_t i = 0; i < n; ++i) {
    int32_t bits;
    float score = scores[i] + 0.f;  // -0 and +0 are equal
    memcpy(&bits, &score, 4);
    keys[i] = ordered(bits);
  }
  for (int64_t i = n; i < n + kLanes; ++i) keys[i] = INT32_MIN;
  auto reaching = [&](int32_t limit) {
    vi found = vi{};
    for (int64_t i = 0; i < n; i += kLanes) found -= *(const vi*)(keys + i) >= limit;
    return reduce_sum(found);
  };
  int32_t limit = reaching(0) >= count ? 0 : INT32_MIN;
  for (int bit = 30; bit >= 0; --bit)
    if (reaching(limit | 1 << bit) >= count) limit |= 1 << bit;
  int64_t equal = count - (limit == INT32_MAX ? 0 : reaching(limit + 1)), taken = 0;
  for (int64_t i = 0; i < n; ++i) {  // `equal` keys at the limit are taken, the first ones
    bool take = keys[i] > limit || (keys[i] == limit && equal > 0);
    equal -= keys[i] == limit;
    kept[taken] = (int32_t)i;
    taken += take;
  }
  return taken;
}

// A hash of a range, as `mix` in reference.py.
static inline int64_t mix(int64_t left, int64_t right, int64_t seed) {
  uint32_t x = (uint32_t)(left * 0x9E3779B1 + right * 0x85EBCA77 + seed * 0xC2B2AE3D);
  x = (x ^ (x >> 15)) * 0x2C1B3C6Du;
  x = (x ^ (x >> 12)) * 0x297A2D39u;
  return (x ^ (x >> 15)) & 0x7FFFFFFF;
}

// Sizes of one thread's scratch: candidates of any level, sampled rows, key blocks.
struct SearchSize {
  int64_t rows, candidates;
  SearchSize(const SelectCall& call, const BoundLevels& levels, int64_t longest) {
    int64_t group = call.batch.num_q_heads / call.heads, most_rows = 1;
    for (int64_t i = 0; i < call.batch.num_query_blocks; ++i)
      most_rows = most(most_rows, (int64_t)call.batch.query_blocks[i].num_rows);
    rows = ((most_rows - 1) / call.query_stride + 1) * group;
    rows = (rows + kChunk - 1) / kChunk * kChunk;
    int64_t keep = call.budget * most(call.rerank, (int64_t)1);
    int64_t coarse = levels.length[levels.count - 1], fine = call.bound_block_size;
    int64_t blocks = keep / call.key_block_size + 2 * call.budget / call.key_block_size;
    int64_t runs = longest / coarse + keep * kCoarseKeep / fine + 4 * levels.ratio() + 64;
    candidates = blocks + runs + 256;
  }
};

template <class Unit, class T> class Search {
 public:
  Search(const SelectCall& call, const BoundLevels& levels, const SearchSize& size, Arena& arena)
      : call_(call), levels_(levels), dim_(call.batch.head_dim) {
    const int64_t wide = padded<Unit>(dim_);
    rows_ = {arena.take<float>(size.rows * wide), (int)wide / Unit::kValues};
    boxes_ = {arena.take<float>(size.rows * 2 * dim_), 2 * (int)dim_ / Unit::kValues};
    base_ = arena.take<float>(size.rows);
    best_ = arena.take<float>(kBestSize);
    convert_ = arena.take<float>(kKeys * 2 * dim_);
    split_ = arena.take<T>(kChunk * 2 * dim_);
    scores_ = arena.take<float>(size.candidates);
    order_ = arena.take<int32_t>(size.candidates + kLanes);
    int32_t** lists[] = {&runs_, &next_, &kept_, &left_, &right_, &found_};
    for (int32_t** list : lists) *list = arena.take<int32_t>(size.candidates);
  }
  static size_t bytes(int64_t dim, const SearchSize& size) {
    return room(size.rows * (dim + kStep), 4) * 3 + room(size.rows, 4) + room(kBestSize, 4) +
           room(kKeys * dim, 4) * 4 + room(size.candidates + kLanes, 4) * 8;
  }

  void run(int64_t block_id, int64_t head) {
    const QueryBlock& block = call_.batch.query_blocks[block_id];
    int32_t* out = call_.indices + (block_id * call_.heads + head) * call_.max_selected;
    for (int64_t i = 0; i < call_.max_selected; ++i) out[i] = -1;
    begin_ = call_.num_sink_tokens;
    end_ = call_.window_starts[block_id];
    if (end_ == begin_) return;
    Sequence seq(call_.batch, block.seq);
    seq_ = &seq;
    kv_head_ = head * call_.batch.num_kv_heads / call_.heads;
    sample(block, head);
    rate_read(block.position);
    int64_t bound = call_.bound_budget > 0 ? by_bounds(call_.bound_budget) : 0;
    int64_t tree = call_.bound_budget < call_.budget ? by_tree(call_.budget - call_.bound_budget) : 0;
    unite(found_, bound, left_, tree, out);
  }

 private:
  void sample(const QueryBlock& block, int64_t head) {
    const int64_t group = call_.batch.num_q_heads / call_.heads;
    num_rows_ = ((block.num_rows - 1) / call_.query_stride + 1) * group;
    few_ = few_rows<Unit>(num_rows_, dim_);
    for (int64_t r = 0; r < num_rows_; r += kChunk) {
      TileRows rows, boxes;
      rows.count = boxes.count = (int)least(num_rows_ - r, (int64_t)kChunk);
      for (int j = 0; j < rows.count; ++j) {
        int64_t row = block.num_rows - 1 - (r + j) / group * call_.query_stride;
        const T* q = (const T*)call_.q.data + (block.row + row) * call_.q.row_stride +
                     (head * group + (r + j) % group) * call_.q.head_stride;
        rows.row[j] = q;
        boxes.row[j] = split_ + j * 2 * dim_;
        if (call_.bound_budget > 0) 
          weigh_sides(q, dim_, call_.bound_reach, split_ + j * 2 * dim_);
      }
      place(rows, dim_, rows_, r);
      if (call_.bound_budget > 0) place(boxes, 2 * dim_, boxes_, r);
    }
  }
  void place(TileRows& rows, int64_t width, const Columns& columns, int64_t first) {
    if (few_) {
      for (int j = 0; j < rows.count; ++j)
        pack_row<Unit, T>((const T*)rows.row[j], width, columns.units + j * columns.depth);
    } else {
      pad(rows);
      float* units = columns.units + first * columns.depth;
      KeyTile<Unit, T>::pack(rows, width, units, convert_);
      const int64_t used = width / Unit::kValues;
      memset(units + used * kChunk, 0, (columns.depth - used) * kChunk * 4);
    }
  }

  // The base of each row: its greatest score among sinks and window, as far as every row sees it.
  void rate_read(int64_t position) {
    const int64_t lanes = (num_rows_ + kLanes - 1) / kLanes * kLanes;
    for (int64_t r = 0; r < lanes; ++r) base_[r] = call_.relative_scores ? -INFINITY : 0.f;
    const int64_t total = call_.relative_scores ? begin_ + position + 1 - end_ : 0;
    auto place = [&](int64_t i) {
      return key_row<T>(call_.k, *seq_, kv_head_, i < begin_ ? i : end_ + i - begin_);
    };
    in_batches(total, dim_, place, [&](int64_t, int count, int padded, const unit* const* keys) {
      if (few_) raise_few(keys, count);
      else raise<Unit>(keys, padded, rows_, num_rows_, base_);
    });
    for (int64_t r = num_rows_; r < lanes; ++r) base_[r] = INFINITY;
  }

  // Calls use(first, count, padded count, rows as units) for batches of the n rows that place finds.
  template <class Place, class Use>
  void in_batches(int64_t n, int64_t width, const Place& place, const Use& use) {
    const T* rows[2][kBatch];
    const unit* units[kBatch];
    auto find = [&](int64_t first, const T** out) {
      const int count = (int)least(n - first, (int64_t)kBatch);
      for (int j = 0; j < count; ++j) {
        out[j] = place(first + j);
        prefetch_row(out[j], width * sizeof(T));
      }
      return count;
    };
    int turn = 0, count = find(0, rows[0]);
    for (int64_t i = 0; i < n; turn ^= 1) {
      const int next = find(i + count, rows[turn ^ 1]);
      unit_rows<Unit, T>(rows[turn], count, width, convert_, units);
      const int padded = (count + kTall - 1) / kTall * kTall;
      for (int j = count; j < kBatch; ++j) units[j] = units[count - 1];
      if (kTiled<Unit> && !few_) even_rows(units, padded, width, convert_);
      use(i, count, padded, units);
      i += count;
      count = next;
    }
  }

  // scores_[i / size] = the greatest score of any row with rows i of the n that place finds.
  template <class Place>
  void score(int64_t n, int64_t size, const Columns& columns, int64_t width, const Place& place) {
    for (int64_t i = 0; i < n / size; ++i) scores_[i] = -INFINITY;
    in_batches(n, width, place, [&](int64_t first, int count, int padded, const unit* const* keys) {
      if (few_) return greatest_few(keys, first, count, size, columns);
      greatest<Unit>(keys, padded, columns, num_rows_, base_, best_);
      for (int j = 0; j < count;) {
        const int64_t block = (first + j) / size;
        vf best = load(best_ + j * kLanes);
        for (++j; j < count && first + j < (block + 1) * size; ++j)
          best = maximum(load(best_ + j * kLanes), best);
        scores_[block] = most(fast_max(best), scores_[block]);
      }
    });
  }
  // The same two reductions for few rows, whose scores come as best_[row][key].
  void greatest_few(const unit* const* keys, int64_t first, int count, int64_t size,
                    const Columns& columns) {
    multiply_few(keys, count, columns);
    for (int j = 0; j < count; j += kLanes) {
      vf best = load(best_ + j) - base_[0];
      for (int64_t r = 1; r < num_rows_; ++r)
        best = maximum(load(best_ + r * kKeys + j) - base_[r], best);
      store(best_ + j, best);
    }
    int64_t block = first / size, end = (block + 1) * size - first;
    for (int j = 0; j < count; ++j) {
      if (j == end) {
        ++block;
        end += size;
      }
      scores_[block] = most(best_[j], scores_[block]);
    }
  }
  void raise_few(const unit* const* keys, int count) {
    multiply_few(keys, count, rows_);  // beyond count: the last key again
    for (int64_t r = 0; r < num_rows_; ++r) {
      vf best = splat(base_[r]);
      for (int j = 0; j < count; j += kLanes) best = maximum(load(best_ + r * kKeys + j), best);
      base_[r] = fast_max(best);
    }
  }
  void multiply_few(const unit* const* keys, int count, const Columns& columns) {
#if defined(__AVX512BF16__)
    TileRows none;
    none.count = 0;
    with_rows(num_rows_, [&]<int kM>() {
      score_few<kM>(columns.units, (const void* const*)keys, (count + kLanes - 1) / kLanes * kLanes,
                    2 * columns.depth, best_, none);
    });
#endif
  }
  void score_runs(const int32_t* runs, int64_t n, int level) {
    const int64_t length = levels_.length[level];
    score(n, 1, boxes_, 2 * dim_, [&](int64_t i) { return box(runs[i] * length, level); });
  }
  void score_blocks(const int32_t* blocks, int64_t n) {
    const int64_t size = call_.key_block_size;
    int64_t offset = 0;
    const T* row = nullptr;
    score(n * size, size, rows_, dim_, [&](int64_t) {  // called for one key after the other
      if (offset == size) {
        offset = 0;
        ++blocks;
      }
      const int64_t key = *blocks * size + offset++;
      const bool same_page = offset > 1 && seq_->slot(key) > 0;
      row = same_page ? row + call_.k.slot_stride : key_row<T>(call_.k, *seq_, kv_head_, key);
      return row;
    });
  }
  const T* box(int64_t key, int level) const {
    int64_t run = levels_.offset[level] + (uint32_t)seq_->slot(key) / (uint32_t)levels_.length[level];
    return (const T*)call_.bounds.data + seq_->page(key) * call_.bounds.page_stride +
           run * call_.bounds.slot_stride + kv_head_ * call_.bounds.head_stride;
  }

  // The coarse level first, which keeps more keys than the fine one. Leaves blocks in found_.
  int64_t by_bounds(int64_t budget) {
    const int64_t keys = budget * most(call_.rerank, (int64_t)1);
    int64_t kept = -1, per_run = call_.bound_block_size / call_.key_block_size;
    for (int level = (int)levels_.count - 1; level >= 0; --level) {
      int64_t n = candidates(kept, level);
      score_runs(next_, n, level);
      kept = top(scores_, n, kept_runs(keys, level), kept_, order_);
      for (int64_t i = 0; i < kept; ++i) runs_[i] = next_[kept_[i]];
    }
    int64_t n = kept * per_run;
    for (int64_t i = 0; i < n; ++i) found_[i] = (int32_t)(runs_[i / per_run] * per_run + i % per_run);
    if (!call_.rerank) return n;
    score_blocks(found_, n);
    n = top(scores_, n, budget / call_.key_block_size, kept_, order_);
    for (int64_t i = 0; i < n; ++i) found_[i] = found_[kept_[i]];
    return n;
  }

  // As kept_runs in types.py.
  int64_t kept_runs(int64_t keys, int level) const {
    const int64_t length = levels_.length[level];
    if (level == 0) return (keys + length - 1) / length;
    return most((kCoarseKeep * keys + length - 1) / length - 2, (int64_t)1);
  }

  // Runs of a level to score, ascending: children of the kept runs, and runs whose parent sticks
  // out of the middle. `kept` is -1 at the coarsest level.
  int64_t candidates(int64_t kept, int level) {
    const int64_t length = levels_.length[level];
    int64_t begin = (begin_ + length - 1) / length, end = end_ / length, n = 0;
    if (kept < 0) {
      for (int64_t run = begin; run < end; ++run) next_[n++] = (int32_t)run;
      return n;
    }
    const int64_t parent = levels_.length[level + 1], ratio = parent / length;
    int64_t low = (begin_ + parent - 1) / parent * ratio, high = end_ / parent * ratio;
    if (low >= high) low = high = end;  // no parent fits: all of them, once
    for (int64_t run = begin; run < least(low, end); ++run) next_[n++] = (int32_t)run;
    for (int64_t i = 0; i < kept; ++i)
      for (int64_t j = 0; j < ratio; ++j) next_[n++] = (int32_t)(runs_[i] * ratio + j);
    for (int64_t run = most(high, begin); run < end; ++run) next_[n++] = (int32_t)run;
    return n;
  }

  // The paper's beam. Nodes are [left_, right_) in blocks, ascending; leaves their starts in left_.
  int64_t by_tree(int64_t budget) {
    const int64_t size = call_.key_block_size, beam = budget / size;
    const int64_t first = begin_ / size, count = end_ / size - first;
    for (int64_t i = 0; i < beam; ++i) {
      left_[i] = (int32_t)(first + i * count / beam);
      right_[i] = (int32_t)(first + (i + 1) * count / beam);
    }
    for (int64_t longest = (count + beam - 1) / beam; longest > 1; longest = (longest + 1) / 2) {
      int64_t n = split(beam);
      for (int64_t i = 0; i < n; ++i) kept_[i] = (int32_t)representative(runs_[i], next_[i]);
      score_blocks(kept_, n);
      int64_t kept = top(scores_, n, beam, kept_, order_);
      for (int64_t i = 0; i < kept; ++i) {
        left_[i] = runs_[kept_[i]];
        right_[i] = next_[kept_[i]];
      }
    }
    return beam;
  }
  int64_t split(int64_t beam) {
    int64_t n = 0;
    for (int64_t i = 0; i < beam; ++i) {
      int32_t middle = (left_[i] + right_[i]) / 2, edges[3] = {left_[i], middle, right_[i]};
      for (int half = 0; half < 2; ++half)
        if (edges[half] < edges[half + 1]) {
          runs_[n] = edges[half];
          next_[n++] = edges[half + 1];
        }
    }
    return n;
  }
  int64_t representative(int64_t left, int64_t right) const {
    switch (call_.representative) {
      case 1: return left;
      case 2: return right - 1;
      case 3: return left + mix(left, right, call_.seed) % (right - left);
      default: return (left + right) / 2;
    }
  }

  static void unite(const int32_t* a, int64_t n, const int32_t* b, int64_t m, int32_t* out) {
    for (int64_t i = 0, j = 0; i < n || j < m;) {
      int32_t x = i < n ? a[i] : INT32_MAX, y = j < m ? b[j] : INT32_MAX;
      *out++ = least(x, y);
      i += x <= y;
      j += y <= x;
    }
  }

  const SelectCall& call_;
  const BoundLevels& levels_;
  const int64_t dim_;
  Columns rows_{}, boxes_{};  // against keys, and against [minimum, maximum] of a run
  const Sequence* seq_ = nullptr;
  bool few_ = false;
  int64_t begin_ = 0, end_ = 0, kv_head_ = 0, num_rows_ = 0;
  float *base_, *best_, *convert_, *scores_;
  T* split_;
  int32_t *order_, *runs_, *next_, *kept_, *left_, *right_, *found_;
};

template <class Unit, class T> static void select_as(const SelectCall& call) {
  int64_t longest = 0;
  for (int64_t i = 0; i < call.batch.num_query_blocks; ++i) {
    const QueryBlock& block = call.batch.query_blocks[i];
    longest = most(longest, (int64_t)block.position + block.num_rows);
  }
  BoundLevels levels(call.batch.page_size, call.bound_block_size, call.num_runs);
  SearchSize size(call, levels, longest);
  const int64_t items = call.batch.num_query_blocks * call.heads;
#pragma omp parallel if (items > 1)
  {
    const TileRegisters registers;
    Arena arena(Search<Unit, T>::bytes(call.batch.head_dim, size));
    Search<Unit, T> search(call, levels, size, arena);
#pragma omp for schedule(dynamic)
    for (int64_t i = items - 1; i >= 0; --i) search.run(i / call.heads, i % call.heads);
  }
}

static void select_blocks(const SelectCall& call) {
  switch (call.batch.dtype) {
    case Dtype::bf16: return select_as<BfUnit, bf16>(call);
#if defined(__AMX_BF16__)
    default: return kernels_avx512_bf16.select_blocks(call);
#else
    case Dtype::f16: return select_as<Single, f16>(call);
    default: return select_as<Single, float>(call);
#endif
  }
}

}  // namespace HIPSERVE_TIER
}  // namespace hipserve
