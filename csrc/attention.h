// Exact attention over SINK + chosen blocks + WINDOW, or over everything. One work item is a KV
// head and some rows of one query block, the query heads of the group stacked into its rows; keys
// come in tiles of 64, in position order, gathered by row pointer, so that pages cost nothing.
#pragma once
#include "tile.h"

namespace hipserve {
namespace HIPSERVE_TIER {

constexpr int64_t kMaxRows = 384;     // stacked rows of one item
constexpr int64_t kSplitRows = 64;    // items this small split a long key list ...
constexpr int64_t kSplitKeys = 4096;  // ... into parts of this many keys
constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

struct Item {
  int32_t block, head, first_row, num_rows;
  int64_t begin, end;  // its part of the key list
  int32_t part, parts;
};

// The keys that one query block reads, as ascending segments of positions.
class KeyList {
 public:
  KeyList(const AttentionCall& call, const QueryBlock& block, int64_t block_id, int64_t head)
      : call_(call) {
    int64_t last = block.position + block.num_rows;
    if (!call.indices) {
      int64_t first = call.sliding_window ? block.position - call.sliding_window + 1 : 0;
      window_ = first > 0 ? first : 0;
      sink_ = 0;
    } else {
      sink_ = least(call.num_sink_tokens, last);
      window_ = least((int64_t)call.window_start[block_id], last);
      indices_ = call.indices + (block_id * call.index_heads + head) * call.max_selected;
      while (chosen_ < call.max_selected && indices_[chosen_] >= 0) ++chosen_;
    }
    if (window_ < sink_) window_ = sink_;
    last_ = last;
  }
  int64_t size() const { return sink_ + chosen_ * call_.key_block_size + (last_ - window_); }

  // Position of the n-th key, and how many keys follow it without a gap (itself included).
  int64_t at(int64_t n, int64_t* run) const {
    if (n < sink_) {
      *run = sink_ - n;
      return n;
    }
    n -= sink_;
    int64_t size = call_.key_block_size;
    if (n < chosen_ * size) {
      *run = size - n % size;
      return indices_[n / size] * size + n % size;
    }
    n -= chosen_ * size;
    *run = last_ - window_ - n;
    return window_ + n;
  }

 private:
  const AttentionCall& call_;
  const int32_t* indices_ = nullptr;
  int64_t sink_ = 0, chosen_ = 0, window_ = 0, last_ = 0;
};

struct Scratch {
  float *q, *out, *best, *sum, *keys, *values, *scores, *weights, *factor, *convert;
  int32_t* positions;
  static size_t bytes(int64_t dim) {
    return room(kMaxRows * dim, 4) * 2 + room(kMaxRows, 4) * 2 + room(kKeys * dim, 4) * 3 +
           room(kRows * kKeys, 4) * 2 + room(kRows, 4) + room(kKeys, 4) + 64;
  }
  Scratch(Arena& arena, int64_t dim) {
    q = arena.take<float>(kMaxRows * dim);
    out = arena.take<float>(kMaxRows * dim);
    best = arena.take<float>(kMaxRows);
    sum = arena.take<float>(kMaxRows);
    keys = arena.take<float>(kKeys * dim);
    values = arena.take<float>(kKeys * dim);
    convert = arena.take<float>(kKeys * dim);
    scores = arena.take<float>(kRows * kKeys);
    weights = arena.take<float>(kRows * kKeys);
    factor = arena.take<float>(kRows);
    positions = arena.take<int32_t>(kKeys);
  }
};

// Which lanes of a tile a row may read: [low, high).
struct Visible {
  int low, high;
};

template <class Unit, class T> class Attention {
 public:
  Attention(const AttentionCall& call, Scratch& scratch)
      : call_(call), s_(scratch), dim_(call.batch.head_dim), depth_(dim_ / Unit::kValues) {}

  void run(const Item& item, float* part) {
    begin(item);
    const QueryBlock& block = call_.batch.query_blocks[item.block];
    KeyList list(call_, block, item.block, item.head);
    Sequence seq(call_.batch, block.seq);
    TileRows k, v;
    for (int64_t n = item.begin; n < item.end; n += k.count) {
      gather(list, seq, n, item.end, k, v);
      KeyTile<Unit, T>::pack(k, dim_, s_.keys, s_.convert);
      ValueTile<Unit, T>::pack(v, dim_, s_.values);
      for (int64_t row = 0; row < rows_; row += kRows) tile(row, least(rows_ - row, (int64_t)kRows), k.count);
    }
    if (part) keep(part); else finish();
  }

  // Joins the parts of one item by their log-sum-exp.
  void merge(const Item& item, const float* parts, int64_t stride) {
    begin(item);
    for (int64_t row = 0; row < rows_; ++row) {
      float best = -INFINITY;
      for (int p = 0; p < item.parts; ++p) best = most(best, parts[p * stride + row * (dim_ + 2)]);
      if (best == -INFINITY) continue;
      s_.best[row] = best;
      for (int p = 0; p < item.parts; ++p) {
        const float* from = parts + p * stride + row * (dim_ + 2);
        float factor = from[0] == -INFINITY ? 0.f : exp2f(from[0] - best);
        s_.sum[row] += factor * from[1];
        for (int64_t c = 0; c < dim_; ++c) s_.out[row * dim_ + c] += factor * from[2 + c];
      }
    }
    finish();
  }

 private:
  // Row r of an item: query row r / group_, query head head * group_ + r % group_.
  void begin(const Item& item) {
    item_ = &item;
    const QueryBlock& block = call_.batch.query_blocks[item.block];
    int64_t heads = most(call_.index_heads, call_.batch.num_kv_heads);
    group_ = call_.batch.num_q_heads / heads;
    kv_head_ = item.head * call_.batch.num_kv_heads / heads;
    rows_ = item.num_rows * group_;
    token_ = block.row + item.first_row;
    position_ = block.position + item.first_row;
    for (int64_t r = 0; r < rows_; ++r) {
      pack_row<Unit, T>(q_row(r), dim_, s_.q + r * depth_);
      s_.best[r] = -INFINITY;
      s_.sum[r] = 0;
    }
    memset(s_.out, 0, rows_ * dim_ * 4);
  }
  const T* q_row(int64_t r) const {
    return (const T*)call_.q.data + (token_ + r / group_) * call_.q.row_stride +
           (item_->head * group_ + r % group_) * call_.q.head_stride;
  }

  void gather(const KeyList& list, const Sequence& seq, int64_t n, int64_t end, TileRows& k,
              TileRows& v) {
    int count = 0;
    int64_t limit = least(end - n, (int64_t)kKeys);
    while (count < limit) {
      int64_t run, key = list.at(n + count, &run);
      run = least(run, limit - count);
      while (run > 0) {
        int64_t slot = key % seq.page_size, here = least(run, seq.page_size - slot);
        const T* k_row = key_row<T>(call_.k, seq, kv_head_, key);
        const T* v_row = key_row<T>(call_.v, seq, kv_head_, key);
        for (int64_t i = 0; i < here; ++i, ++count, ++key) {
          k.row[count] = k_row + i * call_.k.slot_stride;
          v.row[count] = v_row + i * call_.v.slot_stride;
          s_.positions[count] = (int32_t)key;
        }
        run -= here;
      }
    }
    k.count = v.count = count;
    pad(k);
    pad(v);
    v.count = least((count + 1) / 2 * 2, (int)kKeys);
  }

  Visible visible(int64_t row, int count) const {
    int64_t p = position_ + row / group_;
    Visible seen{0, count};
    if (s_.positions[count - 1] > p)
      while (seen.high > 0 && s_.positions[seen.high - 1] > p) --seen.high;
    if (call_.sliding_window)
      while (seen.low < seen.high && s_.positions[seen.low] <= p - call_.sliding_window) ++seen.low;
    return seen;
  }

  void tile(int64_t row, int64_t count, int keys) {
    Visible seen[kRows];
    int high = 0;
    for (int64_t r = 0; r < count; ++r) {
      seen[r] = visible(row + r, keys);
      if (seen[r].low < seen[r].high) high = most(high, seen[r].high);
    }
    if (!high) return;
    switch (count) {
      case 1: return tile_of<1>(row, seen, high);
      case 2: return tile_of<2>(row, seen, high);
      case 3: return tile_of<3>(row, seen, high);
      case 4: return tile_of<4>(row, seen, high);
      case 5: return tile_of<5>(row, seen, high);
      default: return tile_of<6>(row, seen, high);
    }
  }

  template <int kM> void tile_of(int64_t row, const Visible* seen, int high) {
    constexpr int kWide = kColumns * kLanes;
    int padded = (high + 15) / 16 * 16;
    for (int c = 0; c < padded; c += kWide) {
      vf acc[kM][kColumns] = {};
      product<Unit, kM, kColumns>(s_.q + row * depth_, depth_, s_.keys + c, kKeys, depth_, acc);
      for (int r = 0; r < kM; ++r)
        for (int i = 0; i < kColumns; ++i) store(s_.scores + r * kKeys + c + i * kLanes, acc[r][i]);
    }
    for (int r = 0; r < kM; ++r) soften(row + r, r, seen[r], padded);
    int units = (high + Unit::kValues - 1) / Unit::kValues;
    int64_t c = 0;
    for (; c + kWide <= dim_; c += kWide) accumulate<kM, kColumns>(row, c, units);
    for (; c < dim_; c += kLanes) accumulate<kM, 1>(row, c, units);
  }

  // Online softmax of one row of scores: weights, running maximum and sum, and the factor by which
  // what was accumulated before shrinks.
  void soften(int64_t row, int r, Visible seen, int padded) {
    constexpr int kVectors = kKeys / kLanes;
    const int vectors = padded / kLanes;
    const bool whole = seen.low == 0 && seen.high == padded;
    float* weights = s_.weights + r * (kKeys / Unit::kValues);
    vf x[kVectors], top = splat(-INFINITY);
    vi lane;
    for (int i = 0; i < kLanes; ++i) lane[i] = i;
    const float scale = call_.sm_scale * kLog2e;
    for (int i = 0; i < vectors; ++i) {
      x[i] = load(s_.scores + r * kKeys + i * kLanes);
      x[i] = call_.softcap > 0 ? capped(x[i]) : x[i] * scale;
      if (!whole) {
        vi at = lane + i * kLanes;
        x[i] = (at >= seen.low) & (at < seen.high) ? x[i] : splat(-INFINITY);
      }
      top = maximum(x[i], top);
    }
    float before = s_.best[row], best = most(before, fast_max(top));
    s_.factor[r] = 1.f;
    if (best == -INFINITY) {
      for (int i = 0; i < vectors; ++i) x[i] = vf{};
      pack_weights<Unit>(x, vectors, weights);
      return;
    }
    if (best != before) {
      s_.factor[r] = before == -INFINITY ? 0.f : exp2f(before - best);
      s_.best[row] = best;
    }
    vf sum = vf{};
    for (int i = 0; i < vectors; ++i) {
      vf p = exp2v<Unit::kDegree>(x[i] - best);
      if (!whole) p = x[i] == splat(-INFINITY) ? vf{} : p;
      sum += p;
      x[i] = p;
    }
    pack_weights<Unit>(x, vectors, weights);
    s_.sum[row] = s_.sum[row] * s_.factor[r] + reduce_sum(sum);
  }

  vf capped(vf x) const {
    // c * tanh(y), from e^-2|y|, which never overflows.
    vf y = x * (call_.sm_scale / call_.softcap);
    vf size = y < 0.f ? -y : y;
    vf e = exp2v<6>(size * (-2.f * kLog2e));
    vf t = (1.f - e) / (1.f + e);
    return (y < 0.f ? -t : t) * (call_.softcap * kLog2e);
  }

  template <int kM, int kN> void accumulate(int64_t row, int64_t column, int units) {
    vf acc[kM][kN];
    for (int r = 0; r < kM; ++r)
      for (int c = 0; c < kN; ++c)
        acc[r][c] = load(s_.out + (row + r) * dim_ + column + c * kLanes) * s_.factor[r];
    product<Unit, kM, kN>(s_.weights, kKeys / Unit::kValues, s_.values + column, dim_, units, acc);
    for (int r = 0; r < kM; ++r)
      for (int c = 0; c < kN; ++c)
        store(s_.out + (row + r) * dim_ + column + c * kLanes, acc[r][c]);
  }

  void keep(float* part) const {
    for (int64_t row = 0; row < rows_; ++row) {
      float* to = part + row * (dim_ + 2);
      to[0] = s_.best[row];
      to[1] = s_.sum[row];
      memcpy(to + 2, s_.out + row * dim_, dim_ * 4);
    }
  }

  void finish() {
    for (int64_t row = 0; row < rows_; ++row) {
      int64_t token = token_ + row / group_, head = item_->head * group_ + row % group_;
      T* out = (T*)call_.out.data + token * call_.out.row_stride + head * call_.out.head_stride;
      float sum = s_.sum[row], inverse = sum > 0 ? 1.f / sum : 0.f;
      for (int64_t c = 0; c < dim_; ++c) from_float(s_.out[row * dim_ + c] * inverse, out + c);
      float lse = sum > 0 ? (s_.best[row] + log2f(sum)) * kLn2 : -INFINITY;
      call_.lse[token * call_.batch.num_q_heads + head] = lse;
    }
  }

  const AttentionCall& call_;
  Scratch& s_;
  const int64_t dim_, depth_;
  const Item* item_ = nullptr;
  int64_t group_ = 1, kv_head_ = 0, rows_ = 0, token_ = 0, position_ = 0;
};

// Cuts the call into items; the split of a key list depends on its length alone, never on threads.
class Plan {
 public:
  explicit Plan(const AttentionCall& call) {
    const Batch& batch = call.batch;
    int64_t heads = most(call.index_heads, batch.num_kv_heads);
    int64_t group = batch.num_q_heads / heads;
    int64_t most_rows = most(kMaxRows / group, (int64_t)1);
    for (int pass = 0; pass < 2; ++pass) {
      count = 0;
      part_rows = 0;
      for (int64_t b = batch.num_query_blocks - 1; b >= 0; --b)
        for (int64_t head = 0; head < heads; ++head)
          add(call, b, head, group, most_rows, pass);
      if (!pass) items = (Item*)malloc(sizeof(Item) * most(count, (int64_t)1));
    }
  }
  ~Plan() { free(items); }
  Item* items = nullptr;
  int64_t count = 0, part_rows = 0;  // rows of all parts that must be merged

 private:
  void add(const AttentionCall& call, int64_t b, int64_t head, int64_t group, int64_t most_rows,
           bool write) {
    const QueryBlock& block = call.batch.query_blocks[b];
    int64_t keys = KeyList(call, block, b, head).size();
    for (int64_t first = 0; first < block.num_rows; first += most_rows) {
      int64_t rows = least(most_rows, block.num_rows - first);
      bool split = rows * group <= kSplitRows && keys > 2 * kSplitKeys;
      int64_t size = split ? kSplitKeys : keys, parts = split ? (keys + size - 1) / size : 1;
      for (int64_t p = 0; p < parts; ++p, ++count)
        if (write)
          items[count] = {(int32_t)b, (int32_t)head, (int32_t)first, (int32_t)rows, p * size,
                          least(keys, (p + 1) * size), (int32_t)p, (int32_t)parts};
      if (split) part_rows += parts * rows * group;
    }
  }
};

template <class Unit, class T> static void attention_as(const AttentionCall& call) {
  Plan plan(call);
  const int64_t dim = call.batch.head_dim;
  int64_t heads = most(call.index_heads, call.batch.num_kv_heads);
  int64_t group = call.batch.num_q_heads / heads;
  float* parts = plan.part_rows ? (float*)malloc(plan.part_rows * (dim + 2) * 4) : nullptr;
  int64_t* place = (int64_t*)malloc(sizeof(int64_t) * (plan.count + 1));
  int64_t rows = 0;
  for (int64_t i = 0; i < plan.count; ++i) {
    place[i] = rows * (dim + 2);
    if (plan.items[i].parts > 1) rows += plan.items[i].num_rows * group;
  }
#pragma omp parallel if (plan.count > 1)
  {
    Arena arena(Scratch::bytes(dim));
    Scratch scratch(arena, dim);
    Attention<Unit, T> attention(call, scratch);
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < plan.count; ++i)
      attention.run(plan.items[i], plan.items[i].parts > 1 ? parts + place[i] : nullptr);
    if (plan.part_rows) {
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < plan.count; ++i) {
        const Item& item = plan.items[i];
        if (item.parts > 1 && item.part == 0)
          attention.merge(item, parts + place[i], item.num_rows * group * (dim + 2));
      }
    }
  }
  free(parts);
  free(place);
}

static void attention(const AttentionCall& call) {
  switch (call.batch.dtype) {
    case Dtype::bf16:
#if defined(__AVX512BF16__)
      return attention_as<Pair, bf16>(call);
#else
      return attention_as<Single, bf16>(call);
#endif
    case Dtype::f16: return attention_as<Single, f16>(call);
    default: return attention_as<Single, float>(call);
  }
}

}  // namespace HIPSERVE_TIER
}  // namespace hipserve
