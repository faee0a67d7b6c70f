// Exact attention over SINK + chosen blocks + WINDOW, or over everything. One work item is a KV
// head and some rows of one query block, the query heads of the group stacked into its rows; keys
// come in tiles, in position order, gathered by row pointer, so that pages cost nothing.
#pragma once
#include "amx.h"
#include "few_rows.h"
#include "plan.h"
#include "tile.h"

namespace hipserve {
namespace HIPSERVE_TIER {

constexpr int64_t kSharedWork = 1 << 17;  // products from which waking other threads pays
constexpr float kSlack = 8.f;  // a row's reference moves when a score is 2^8 times above it
constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

struct Scratch {
  float *q, *out, *best, *sum, *keys, *values, *convert, *scores, *weights;
  int32_t* high;  // lanes of the tile that a group of rows reads, at its first row
  static size_t bytes(int64_t dim) {
    const int64_t wide = dim + kStep;
    return room(kMaxRows * wide, 4) * 2 + room(kMaxRows, 4) * 2 + room(kMaxRows * kLanes, 4) +
           room(kKeys * wide, 4) * 3 + room(kBlockRows * kKeys, 4) + room(kMaxRows * kKeys, 4);
  }
  Scratch(Arena& arena, int64_t dim) {
    const int64_t wide = dim + kStep;
    q = arena.take<float>(kMaxRows * wide);
    out = arena.take<float>(kMaxRows * dim);
    best = arena.take<float>(kMaxRows);
    high = arena.take<int32_t>(kMaxRows);
    sum = arena.take<float>(kMaxRows * kLanes);
    keys = arena.take<float>(kKeys * wide);
    values = arena.take<float>(kKeys * dim);
    convert = arena.take<float>(kKeys * dim);
    scores = arena.take<float>(kBlockRows * kKeys);
    weights = arena.take<float>(kMaxRows * kKeys);
  }
};

struct Tile {
  TileRows k, v;
  int32_t positions[kKeys];
};

// Which lanes of a tile a row may read: [low, high).
struct Visible {
  int low, high;
};

template <class Unit, class T> class Attention {
 public:
  Attention(const AttentionCall& call, Scratch& scratch)
      : call_(call),
        s_(scratch),
        dim_(call.batch.head_dim),
        depth_(padded<Unit>(dim_) / Unit::kValues) {
    const int64_t used = dim_ / Unit::kValues;
    memset(s_.keys + used * kKeys, 0, (depth_ - used) * kKeys * 4);
  }

  void run(const Item& item, float* part) {
    begin(item);
    const QueryBlock& block = call_.batch.query_blocks[item.block];
    KeyList list(call_, block, item.block, item.head);
    Sequence seq(call_.batch, block.seq);
    if (few_) read_few(list, seq);
    else read(list, seq);
    if (part) keep(part); else finish();
  }

  void read(const KeyList& list, const Sequence& seq) {
    Tile tile;
    for (int64_t n = item_->begin; n < item_->end; n += tile.k.count) {
      gather(list, seq, n, tile);
      take(tile);
    }
  }
  // Few rows wait for memory: the next tile is asked for meanwhile.
  void read_few(const KeyList& list, const Sequence& seq) {
    Tile tiles[2];
    gather(list, seq, item_->begin, tiles[0]);
    int turn = 0;
    for (int64_t n = item_->begin; n < item_->end; turn ^= 1) {
      n += tiles[turn].k.count;
      gather(list, seq, n, tiles[turn ^ 1]);
      take_few(tiles[turn], tiles[turn ^ 1]);
    }
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
        s_.sum[row * kLanes] += factor * from[1];
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
    few_ = few_rows<Unit>(rows_, dim_);
    token_ = block.row + item.first_row;
    position_ = block.position + item.first_row;
    for (int64_t r = 0; r < rows_; ++r) {
      pack_row<Unit, T>(q_row(r), dim_, s_.q + r * depth_);
      for (int64_t k = dim_ / Unit::kValues; k < depth_; ++k) s_.q[r * depth_ + k] = 0.f;
      s_.best[r] = -INFINITY;
    }
    memset(s_.sum, 0, rows_ * kLanes * 4);
    memset(s_.out, 0, rows_ * dim_ * 4);
  }
  const T* q_row(int64_t r) const {
    return (const T*)call_.q.data + (token_ + r / group_) * call_.q.row_stride +
           (item_->head * group_ + r % group_) * call_.q.head_stride;
  }

  void gather(const KeyList& list, const Sequence& seq, int64_t n, Tile& tile) const {
    int count = 0;
    int64_t limit = least(item_->end - n, (int64_t)kKeys);
    while (count < limit) {
      int64_t run, key = list.at(n + count, &run);
      run = least(run, limit - count);
      while (run > 0) {
        int64_t slot = seq.slot(key), here = least(run, seq.page_size - slot);
        const T* k_row = key_row<T>(call_.k, seq, kv_head_, key);
        const T* v_row = key_row<T>(call_.v, seq, kv_head_, key);
        for (int64_t i = 0; i < here; ++i, ++count, ++key) {
          tile.k.row[count] = k_row + i * call_.k.slot_stride;
          tile.v.row[count] = v_row + i * call_.v.slot_stride;
          tile.positions[count] = (int32_t)key;
        }
        run -= here;
      }
    }
    tile.k.count = tile.v.count = count;
    pad(tile.k);
    pad(tile.v);
    const int together = kTiled<Unit> ? kStep : 2;  // keys that an instruction sums over
    tile.v.count = (count + together - 1) / together * together;
  }

  // All rows over one tile: first the weights, while its keys are in the cache, then the values.
  void take(const Tile& tile) {
    if constexpr (kTiled<Unit>) return take_in_blocks(tile);
    const bool whole = all_see(tile);
    KeyTile<Unit, T>::pack(tile.k, dim_, s_.keys, s_.convert);
    for (int64_t row = 0; row < rows_; row += kRows) {
      const int64_t count = least(rows_ - row, (int64_t)kRows);
      weigh(row, count, tile, whole, [&](int padded) { score(row, count, padded); });
    }
    ValueTile<Unit, T>::pack(tile.v, dim_, s_.values);
    for (int64_t row = 0; row < rows_; row += kRows) add(row);
  }

  // The same on tile registers: a block of rows from its scores to its output, so that scores and
  // weights stay in the first cache.
  void take_in_blocks(const Tile& tile) {
    const bool whole = all_see(tile);
    KeyTile<Unit, T>::pack(tile.k, dim_, s_.keys, s_.convert);
    ValueTile<Unit, T>::pack(tile.v, dim_, s_.values);
    for (int64_t row = 0; row < rows_; row += kBlockRows) {
      const int64_t count = least(rows_ - row, (int64_t)kBlockRows);
      weigh(row, count, tile, whole, [&](int padded) {
        multiply_block<false>(s_.q + row * depth_, depth_, count, s_.keys, kKeys, padded,
                              depth_ / kLanes, s_.scores, kKeys);
      });
      const int steps = (s_.high[row] + kStep - 1) / kStep;
      if (!steps) continue;
      multiply_block<true>(weights(row), kKeys / Unit::kValues, count, s_.values, dim_, dim_, steps,
                           s_.out + row * dim_, dim_);
    }
  }
  float* weights(int64_t row) const {
    return s_.weights + (kTiled<Unit> ? row % kBlockRows : row) * (kKeys / Unit::kValues);
  }

  // Every row reads every key of the tile.
  bool all_see(const Tile& tile) const {
    const int64_t last = position_ + (rows_ - 1) / group_;
    return tile.k.count == kKeys && tile.positions[kKeys - 1] <= position_ &&
           (!call_.sliding_window || tile.positions[0] > last - call_.sliding_window);
  }
  Visible visible(int64_t row, const Tile& tile) const {
    int64_t p = position_ + row / group_;
    Visible seen{0, tile.k.count};
    while (seen.high > 0 && tile.positions[seen.high - 1] > p) --seen.high;
    if (call_.sliding_window)
      while (seen.low < seen.high && tile.positions[seen.low] <= p - call_.sliding_window) ++seen.low;
    return seen;
  }

  template <class Score>
  void weigh(int64_t row, int64_t count, const Tile& tile, bool whole, const Score& score) {
    Visible seen[kBlockRows] = {};
    int high = whole ? kKeys : 0;
    for (int64_t r = 0; r < count && !whole; ++r) {
      seen[r] = visible(row + r, tile);
      if (seen[r].low < seen[r].high) high = most(high, seen[r].high);
    }
    s_.high[row] = high;
    if (!high) return;
    score((high + 15) / 16 * 16);
    for (int64_t r = 0; r < count; ++r) {
      float* scores = s_.scores + r * kKeys;
      if (call_.softcap > 0)
        for (int i = 0; i < kKeys; i += kLanes) store(scores + i, capped(load(scores + i)));
      if (whole) soften<true>(row + r, scores, seen[r]);
      else soften<false>(row + r, scores, seen[r]);
    }
  }

  void score(int64_t row, int64_t count, int padded) {
    switch (count) {
      case 1: return score_rows<1>(row, padded);
      case 2: return score_rows<2>(row, padded);
      case 3: return score_rows<3>(row, padded);
      case 4: return score_rows<4>(row, padded);
      case 5: return score_rows<5>(row, padded);
      default: return score_rows<6>(row, padded);
    }
  }
  template <int kM> void score_rows(int64_t row, int padded) {
    constexpr int kWide = kColumns * kLanes;
    for (int c = 0; c < padded; c += kWide) {
      vf acc[kM][kColumns] = {};
      product<Unit, kM, kColumns>(s_.q + row * depth_, depth_, s_.keys + c, kKeys, depth_, acc);
      for (int r = 0; r < kM; ++r)
        for (int i = 0; i < kColumns; ++i) store(s_.scores + r * kKeys + c + i * kLanes, acc[r][i]);
    }
  }

  // Online softmax of one row of scores: its weights, relative to the row's reference score.
  template <bool kWhole> void soften(int64_t row, const float* scores, Visible seen) {
    constexpr int kVectors = kKeys / kLanes;
    const float scale = call_.softcap > 0 ? 1.f : call_.sm_scale * kLog2e;
    auto shown = [&](int i, vf x, float otherwise) {
      if (kWhole) return x;
      vi at = lanes() + i * kLanes;
      return ((at >= seen.low) & (at < seen.high)) ? x : splat(otherwise);
    };
    float best = s_.best[row];
    vf x[kVectors], top = splat(-INFINITY);
    for (int i = 0; i < kVectors; ++i) {
      x[i] = load(scores + i * kLanes) * scale - best;
      top = maximum(shown(i, x[i], -INFINITY), top);
    }
    if (any_above(top, kSlack)) {
      top = splat(-INFINITY);
      for (int i = 0; i < kVectors; ++i)
        top = maximum(shown(i, load(scores + i * kLanes) * scale, -INFINITY), top);
      best = fast_max(top);
      shrink(row, best);
      for (int i = 0; i < kVectors; ++i) x[i] = load(scores + i * kLanes) * scale - best;
    }
    vf sum = vf{};
    for (int i = 0; i < kVectors; ++i) {
      x[i] = shown(i, exp2v<Unit::kDegree>(x[i]), 0.f);
      sum += x[i];
    }
    pack_weights<Unit>(x, kVectors, weights(row));
    store(s_.sum + row * kLanes, load(s_.sum + row * kLanes) + sum);
  }

  // Makes `best` the reference of a row: what was summed so far shrinks.
  void shrink(int64_t row, float best) {
    float before = s_.best[row];
    s_.best[row] = best;
    if (before == -INFINITY) return;
    const float factor = exp2f(before - best);
    store(s_.sum + row * kLanes, load(s_.sum + row * kLanes) * factor);
    for (int64_t c = 0; c < dim_; c += kLanes)
      store(s_.out + row * dim_ + c, load(s_.out + row * dim_ + c) * factor);
  }

  vf capped(vf x) const {
    // c * tanh(y), from e^-2|y|, which never overflows.
    vf y = x * (call_.sm_scale / call_.softcap);
    vf size = y < 0.f ? -y : y;
    vf e = exp2v<6>(size * (-2.f * kLog2e));
    vf t = (1.f - e) / (1.f + e);
    return (y < 0.f ? -t : t) * (call_.softcap * kLog2e);
  }

  void add(int64_t row) {
    const int units = (s_.high[row] + Unit::kValues - 1) / Unit::kValues;
    if (!units) return;
    switch (least(rows_ - row, (int64_t)kRows)) {
      case 1: return add_rows<1>(row, units);
      case 2: return add_rows<2>(row, units);
      case 3: return add_rows<3>(row, units);
      case 4: return add_rows<4>(row, units);
      case 5: return add_rows<5>(row, units);
      default: return add_rows<6>(row, units);
    }
  }
  template <int kM> void add_rows(int64_t row, int units) {
    constexpr int kWide = kColumns * kLanes;
    int64_t c = 0;
    for (; c + kWide <= dim_; c += kWide) accumulate<kM, kColumns>(row, c, units);
    for (; c < dim_; c += kLanes) accumulate<kM, 1>(row, c, units);
  }
  template <int kM, int kN> void accumulate(int64_t row, int64_t column, int units) {
    constexpr int kStride = kKeys / Unit::kValues;
    vf acc[kM][kN];
    for (int r = 0; r < kM; ++r)
      for (int c = 0; c < kN; ++c) acc[r][c] = load(s_.out + (row + r) * dim_ + column + c * kLanes);
    product<Unit, kM, kN>(s_.weights + row * kStride, kStride, s_.values + column, dim_, units, acc);
    for (int r = 0; r < kM; ++r)
      for (int c = 0; c < kN; ++c)
        store(s_.out + (row + r) * dim_ + column + c * kLanes, acc[r][c]);
  }

  void take_few(const Tile& tile, const Tile& next) {
#if defined(__AVX512BF16__)
    const bool whole = all_see(tile);
    with_rows(rows_, [&]<int kM>() {
      weigh(0, kM, tile, whole, [&](int) {
        score_few<kM>(s_.q, tile.k.row, tile.k.count, dim_, s_.scores, next.k);
      });
      add_few<kM>(s_.weights, tile.v, (s_.high[0] + 1) / 2, dim_, s_.out, next.v);
    });
#endif
  }

  float sum(int64_t row) const { return reduce_sum(load(s_.sum + row * kLanes)); }

  void keep(float* part) const {
    for (int64_t row = 0; row < rows_; ++row) {
      float* to = part + row * (dim_ + 2);
      to[0] = s_.best[row];
      to[1] = sum(row);
      memcpy(to + 2, s_.out + row * dim_, dim_ * 4);
    }
  }

  void finish() {
    for (int64_t row = 0; row < rows_; ++row) {
      int64_t token = token_ + row / group_, head = item_->head * group_ + row % group_;
      T* out = (T*)call_.out.data + token * call_.out.row_stride + head * call_.out.head_stride;
      float sum = this->sum(row), inverse = sum > 0 ? 1.f / sum : 0.f;
      for (int64_t c = 0; c < dim_; ++c) from_float(s_.out[row * dim_ + c] * inverse, out + c);
      float lse = sum > 0 ? (s_.best[row] + log2f(sum)) * kLn2 : -INFINITY;
      call_.lse[token * call_.batch.num_q_heads + head] = lse;
    }
  }

  const AttentionCall& call_;
  Scratch& s_;
  const int64_t dim_, depth_;
  const Item* item_ = nullptr;
  bool few_ = false;
  int64_t group_ = 1, kv_head_ = 0, rows_ = 0, token_ = 0, position_ = 0;
};

template <class Unit, class T> static void attention_as(const AttentionCall& call) {
  Plan plan(call);
  const int64_t dim = call.batch.head_dim, heads = most(call.index_heads, call.batch.num_kv_heads);
  const int64_t group = call.batch.num_q_heads / heads, row = dim + 2;
  float* parts = plan.part_rows ? (float*)malloc(plan.part_rows * row * 4) : nullptr;
#pragma omp parallel if (plan.count > 1 && plan.pairs * dim >= kSharedWork)
  {
    const TileRegisters registers;
    Arena arena(Scratch::bytes(dim));
    Scratch scratch(arena, dim);
    Attention<Unit, T> attention(call, scratch);
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < plan.count; ++i) {
      const Item& item = plan.items[i];
      attention.run(item, item.parts > 1 ? parts + item.place * row : nullptr);
    }
    if (parts) {
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < plan.count; ++i) {
        const Item& item = plan.items[i];
        if (item.parts > 1 && item.part == 0)
          attention.merge(item, parts + item.place * row, item.num_rows * group * row);
      }
    }
  }
  free(parts);
}

static void attention(const AttentionCall& call) {
  switch (call.batch.dtype) {
    case Dtype::bf16: return attention_as<BfUnit, bf16>(call);
#if defined(__AMX_BF16__)
    default: return kernels_avx512_bf16.attention(call);
#else
    case Dtype::f16: return attention_as<Single, f16>(call);
    default: return attention_as<Single, float>(call);
#endif
  }
}

}  // namespace HIPSERVE_TIER
}  // namespace hipserve
