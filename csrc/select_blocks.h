// Block selection: the search that ops/select_blocks/reference.py defines, one query block and one
// head at a time. Scores are products of 64-key tiles with the sampled rows, reduced to the
// greatest of each key as they come; only sets are kept, never orders.
#pragma once
#include "tile.h"

namespace hipserve {
namespace HIPSERVE_TIER {

constexpr int kCoarseKeep = 2;  // as COARSE_KEEP in reference.py

// Positions of the `count` greatest scores, ascending; ties go to the lower position.
// Radix selection of the threshold on order-preserving integers, then one pass.
static int64_t top(const float* scores, int64_t n, int64_t count, int32_t* kept, uint32_t* keys) {
  if (count >= n) {
    for (int64_t i = 0; i < n; ++i) kept[i] = (int32_t)i;
    return n;
  }
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits;
    float score = scores[i] + 0.f;  // -0 and +0 are equal
    memcpy(&bits, &score, 4);
    keys[i] = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  }
  uint32_t prefix = 0, mask = 0;
  int64_t wanted = count;
  for (int shift = 24; shift >= 0; shift -= 8) {
    int64_t histogram[256] = {};
    for (int64_t i = 0; i < n; ++i)
      if ((keys[i] & mask) == prefix) ++histogram[keys[i] >> shift & 255];
    int digit = 255;
    while (histogram[digit] < wanted) wanted -= histogram[digit--];
    prefix |= (uint32_t)digit << shift;
    mask |= 255u << shift;
  }
  int64_t taken = 0;  // `wanted` keys that equal the threshold are taken, the first ones
  for (int64_t i = 0; i < n; ++i)
    if (keys[i] > prefix || (keys[i] == prefix && wanted-- > 0)) kept[taken++] = (int32_t)i;
  return taken;
}

// A hash of a range, as `mix` in reference.py.
static inline int64_t mix(int64_t left, int64_t right, int64_t seed) {
  uint32_t x = (uint32_t)(left * 0x9E3779B1 + right * 0x85EBCA77 + seed * 0xC2B2AE3D);
  x = (x ^ (x >> 15)) * 0x2C1B3C6Du;
  x = (x ^ (x >> 12)) * 0x297A2D39u;
  return (x ^ (x >> 15)) & 0x7FFFFFFF;
}

// The greatest score of any row, less the row's base, with each key of a tile: the one place where
// rows are reduced.
template <class Unit>
static void greatest(const float* rows, const float* base, int64_t num_rows, int depth,
                     const float* keys, int count, float* out) {
  constexpr int kWide = kColumns * kLanes;
  for (int c = 0; c < count; c += kWide) {
    vf best[kColumns];
    for (int i = 0; i < kColumns; ++i) best[i] = splat(-INFINITY);
    int64_t r = 0;
    for (; r + kRows <= num_rows; r += kRows) {
      vf acc[kRows][kColumns] = {};
      product<Unit, kRows, kColumns>(rows + r * depth, depth, keys + c, kKeys, depth, acc);
      for (int j = 0; j < kRows; ++j)
        for (int i = 0; i < kColumns; ++i) best[i] = maximum(acc[j][i] - base[r + j], best[i]);
    }
    for (; r < num_rows; ++r) {
      vf acc[1][kColumns] = {};
      product<Unit, 1, kColumns>(rows + r * depth, depth, keys + c, kKeys, depth, acc);
      for (int i = 0; i < kColumns; ++i) best[i] = maximum(acc[0][i] - base[r], best[i]);
    }
    for (int i = 0; i < kColumns; ++i) store(out + c + i * kLanes, best[i]);
  }
}

// Raises each row's base to its greatest score with the keys of a tile.
template <class Unit>
static void raise(const float* rows, float* base, int64_t num_rows, int depth, const float* keys,
                  int count) {
  constexpr int kWide = kColumns * kLanes;
  float scores[kWide];
  for (int64_t r = 0; r < num_rows; ++r)
    for (int c = 0; c < count; c += kWide) {
      vf acc[1][kColumns] = {};
      product<Unit, 1, kColumns>(rows + r * depth, depth, keys + c, kKeys, depth, acc);
      for (int i = 0; i < kColumns; ++i) store(scores + i * kLanes, acc[0][i]);
      for (int j = 0; j < least(count - c, kWide); ++j) base[r] = most(scores[j], base[r]);
    }
}

// Sizes of one thread's scratch: candidates of any level, sampled rows, key blocks.
struct SearchSize {
  int64_t rows, candidates;
  SearchSize(const SelectCall& call, const BoundLevels& levels, int64_t longest) {
    int64_t group = call.batch.num_q_heads / call.heads, most_rows = 1;
    for (int64_t i = 0; i < call.batch.num_query_blocks; ++i)
      most_rows = most(most_rows, (int64_t)call.batch.query_blocks[i].num_rows);
    rows = ((most_rows - 1) / call.query_stride + 1) * group;
    int64_t keep = call.budget * most(call.rerank, (int64_t)1);
    int64_t coarse = levels.length[levels.count - 1], fine = call.bound_block_size;
    int64_t blocks = keep / call.key_block_size + 2 * call.budget / call.key_block_size;
    int64_t runs = longest / coarse + 8 * (keep * kCoarseKeep * kCoarseKeep / fine) + 64;
    candidates = blocks + runs + 256;
  }
};

template <class Unit, class T> class Search {
 public:
  Search(const SelectCall& call, const BoundLevels& levels, const SearchSize& size, Arena& arena)
      : call_(call), levels_(levels), dim_(call.batch.head_dim), depth_(dim_ / Unit::kValues) {
    rows_ = arena.take<float>(size.rows * dim_);
    base_ = arena.take<float>(size.rows);
    box_rows_ = arena.take<float>(size.rows * 2 * dim_);
    tile_ = arena.take<float>(kKeys * 2 * dim_);
    convert_ = arena.take<float>(kKeys * 2 * dim_);
    scores_ = arena.take<float>(size.candidates);
    sort_keys_ = arena.take<uint32_t>(size.candidates);
    int32_t** lists[] = {&runs_, &next_, &kept_, &left_, &right_, &found_};
    for (int32_t** list : lists) *list = arena.take<int32_t>(size.candidates);
  }
  static size_t bytes(int64_t dim, const SearchSize& size) {
    return room(size.rows * dim, 4) * 3 + room(size.rows, 4) + room(kKeys * dim, 4) * 4 + room(size.candidates, 4) * 8 + 4096;
  }

  void run(int64_t block_id, int64_t head) {
    const QueryBlock& block = call_.batch.query_blocks[block_id];
    int32_t* out = call_.indices + (block_id * call_.heads + head) * call_.max_selected;
    for (int64_t i = 0; i < call_.max_selected; ++i) out[i] = -1;
    begin_ = call_.num_sink_tokens;
    end_ = window_start(block);
    if (head == 0) call_.window_start[block_id] = (int32_t)end_;
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
  int64_t window_start(const QueryBlock& block) const {
    int64_t start = block.position - call_.sliding_window + 1;
    bool sparse = start > 0 && start - start % call_.granularity - begin_ > call_.budget;
    bool longer = block.position + block.num_rows > call_.dense_below;
    return sparse && longer ? start - start % call_.granularity : begin_;
  }

  void sample(const QueryBlock& block, int64_t head) {
    int64_t group = call_.batch.num_q_heads / call_.heads;
    num_rows_ = 0;
    for (int64_t i = block.num_rows - 1; i >= 0; i -= call_.query_stride)
      for (int64_t g = 0; g < group; ++g, ++num_rows_) {
        const T* q = (const T*)call_.q.data + (block.row + i) * call_.q.row_stride +
                     (head * group + g) * call_.q.head_stride;
        pack_row<Unit, T>(q, dim_, rows_ + num_rows_ * depth_);
        if (call_.bound_budget > 0) pack_box_row(q, box_rows_ + num_rows_ * 2 * depth_);
      }
  }
  // Against [minimum, maximum] of a run: [min(q, 0), max(q, 0)].
  void pack_box_row(const T* q, float* out) const {
    T parts[2 * kMaxDim], zero;
    from_float(0.f, &zero);
    for (int64_t c = 0; c < dim_; ++c) {
      bool positive = to_float(q[c]) > 0;
      parts[c] = positive ? zero : q[c];
      parts[dim_ + c] = positive ? q[c] : zero;
    }
    pack_row<Unit, T>(parts, 2 * dim_, out);
  }

  // The base of each row: its greatest score among sinks and window, as far as every row sees it.
  void rate_read(int64_t position) {
    for (int64_t r = 0; r < num_rows_; ++r) base_[r] = call_.relative_scores ? -INFINITY : 0.f;
    if (!call_.relative_scores) return;
    const int64_t total = begin_ + position + 1 - end_;
    TileRows tile;
    for (int64_t i = 0; i < total; i += tile.count) {
      tile.count = (int)least(total - i, (int64_t)kKeys);
      for (int j = 0; j < tile.count; ++j) {
        int64_t key = i + j < begin_ ? i + j : end_ + i + j - begin_;
        tile.row[j] = key_row<T>(call_.k, *seq_, kv_head_, key);
      }
      pad(tile);
      KeyTile<Unit, T>::pack(tile, dim_, tile_, convert_);
      raise<Unit>(rows_, base_, num_rows_, depth_, tile_, tile.count);
    }
  }

  void score(TileRows& tile, const float* rows, int64_t dim, float* out) {
    pad(tile);
    KeyTile<Unit, T>::pack(tile, dim, tile_, convert_);
    greatest<Unit>(rows, base_, num_rows_, dim / Unit::kValues, tile_, tile.count, out);
  }

  void score_runs(const int32_t* runs, int64_t n, int level) {
    float out[kKeys];
    TileRows tile;
    for (int64_t i = 0; i < n; i += tile.count) {
      tile.count = (int)least(n - i, (int64_t)kKeys);
      for (int j = 0; j < tile.count; ++j) tile.row[j] = box(runs[i + j] * levels_.length[level], level);
      score(tile, box_rows_, 2 * dim_, out);
      memcpy(scores_ + i, out, tile.count * 4);
    }
  }
  const T* box(int64_t key, int level) const {
    int64_t page = seq_->pages[key / seq_->page_size], slot = key % seq_->page_size;
    int64_t run = levels_.offset[level] + slot / levels_.length[level];
    return (const T*)call_.bounds.data + page * call_.bounds.page_stride +
           run * call_.bounds.slot_stride + kv_head_ * call_.bounds.head_stride;
  }

  void score_blocks(const int32_t* blocks, int64_t n) {
    const int64_t size = call_.key_block_size;
    float out[kKeys];
    TileRows tile;
    for (int64_t i = 0; i < n; ++i) scores_[i] = -INFINITY;
    for (int64_t i = 0; i < n * size; i += tile.count) {
      tile.count = (int)least(n * size - i, (int64_t)kKeys);
      for (int j = 0; j < tile.count; ++j)
        tile.row[j] = key_row<T>(call_.k, *seq_, kv_head_, blocks[(i + j) / size] * size + (i + j) % size);
      score(tile, rows_, dim_, out);
      for (int j = 0; j < tile.count; ++j) {
        float& best = scores_[(i + j) / size];
        best = most(best, out[j]);
      }
    }
  }

  // Coarse levels first; each keeps twice the keys of the one below it. Leaves blocks in found_.
  int64_t by_bounds(int64_t budget) {
    const int64_t finest = budget * most(call_.rerank, (int64_t)1);
    int64_t kept = -1, per_run = call_.bound_block_size / call_.key_block_size;
    for (int level = (int)levels_.count - 1; level >= 0; --level) {
      int64_t n = candidates(kept, level), keys = finest;
      for (int i = 0; i < level; ++i) keys *= kCoarseKeep;
      score_runs(next_, n, level);
      kept = top(scores_, n, keys / levels_.length[level], kept_, sort_keys_);
      for (int64_t i = 0; i < kept; ++i) runs_[i] = next_[kept_[i]];
    }
    int64_t n = kept * per_run;
    for (int64_t i = 0; i < n; ++i) found_[i] = (int32_t)(runs_[i / per_run] * per_run + i % per_run);
    if (!call_.rerank) return n;
    score_blocks(found_, n);
    n = top(scores_, n, budget / call_.key_block_size, kept_, sort_keys_);
    for (int64_t i = 0; i < n; ++i) found_[i] = found_[kept_[i]];
    return n;
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
      int64_t kept = top(scores_, n, beam, kept_, sort_keys_);
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
  const int64_t dim_, depth_;
  const Sequence* seq_ = nullptr;
  int64_t begin_ = 0, end_ = 0, kv_head_ = 0, num_rows_ = 0;
  float *rows_, *base_, *box_rows_, *tile_, *convert_, *scores_;
  uint32_t* sort_keys_;
  int32_t *runs_, *next_, *kept_, *left_, *right_, *found_;
};

template <class Unit, class T> static void select_as(const SelectCall& call) {
  int64_t longest = 0;
  for (int64_t i = 0; i < call.batch.num_query_blocks; ++i) {
    const QueryBlock& block = call.batch.query_blocks[i];
    longest = most(longest, (int64_t)block.position + block.num_rows);
  }
  BoundLevels levels(call.batch.page_size, call.bound_block_size);
  SearchSize size(call, levels, longest);
  const int64_t items = call.batch.num_query_blocks * call.heads;
#pragma omp parallel if (items > 1)
  {
    Arena arena(Search<Unit, T>::bytes(call.batch.head_dim, size));
    Search<Unit, T> search(call, levels, size, arena);
#pragma omp for schedule(dynamic)
    for (int64_t i = items - 1; i >= 0; --i) search.run(i / call.heads, i % call.heads);
  }
}

static void select_blocks(const SelectCall& call) {
  switch (call.batch.dtype) {
    case Dtype::bf16:
#if defined(__AVX512BF16__)
      return select_as<Pair, bf16>(call);
#else
      return select_as<Single, bf16>(call);
#endif
    case Dtype::f16: return select_as<Single, f16>(call);
    default: return select_as<Single, float>(call);
  }
}

}  // namespace HIPSERVE_TIER
}  // namespace hipserve
