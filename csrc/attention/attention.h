// Exact attention over SINK + chosen blocks + WINDOW, or over everything: the rows of an item
// against its keys, tile by tile in position order.
#pragma once
#include "attention/tile.h"
#include "dispatch.h"
#include "few_rows.h"

namespace hipserve {
namespace HIPSERVE_TIER {

constexpr int64_t kSharedWork = 1 << 17;  // products from which waking other threads pays

// What one thread computes with: rows of an item and one tile.
template <class Unit> struct AttentionPieces {
  static constexpr int64_t kWeights = kKeys / Unit::kValues;  // units of a row's weights
  int64_t depth;                                              // units of a query row
  float *q, *out, *reference, *sum;  // [rows][depth], [rows][dim], [rows], [rows][kLanes]
  float *keys, *values, *convert;    // [depth][kKeys], [kWeights][dim], [kKeys][dim]
  float *scores, *weights;           // [block of rows][kKeys], [rows][kWeights]
  int32_t* high;  // [rows]: lanes of the tile that a group of rows reads, at its first row
  Turn turn;
  float* turned = nullptr;  // [kKeys][dim]
  AttentionPieces(Arena& arena, const Batch& batch, int64_t max_rows)
      : depth(depth_of<Unit>(batch.head_dim)), turn(arena, batch) {
    const int64_t dim = batch.head_dim;
    const int64_t rows = round_up(max_rows, (int64_t)kBlockRows);
    q = arena.take<float>(rows * depth);
    out = arena.take<float>(rows * dim);
    reference = arena.take<float>(rows);
    sum = arena.take<float>(rows * kLanes);
    keys = arena.take<float>(depth * kKeys);
    values = arena.take<float>(kWeights * dim);
    convert = arena.take<float>(kKeys * dim);
    scores = arena.take<float>(kBlockRows * kKeys);
    weights = arena.take<float>((kTiled<Unit> ? kBlockRows : rows) * kWeights);
    high = arena.take<int32_t>(rows);
    if (batch.rope.partner) turned = arena.take<float>(kKeys * dim);
  }
};

// Attention of one thread. Queries and outputs are stored as Q, keys and values as K.
template <class Q, class K> class Attention {
 public:
  using Unit = typename UnitOf<Q, K>::type;
  using Pieces = AttentionPieces<Unit>;
  using Reader = TileReader<Unit, K>;

  Attention(const AttentionCall& call, Pieces& pieces)
      : call_(call),
        s_(pieces),
        dim_(call.batch.head_dim),
        depth_(pieces.depth),
        scale_{call.sm_scale, call.softcap} {
    const int64_t used = dim_ / Unit::kValues;
    memset(s_.keys + used * kKeys, 0, (depth_ - used) * kKeys * 4);
  }

  // One item: writes its output, or its part for merge().
  void run(const Item& item, float* part) {
    const StackedRows rows(call_, item);
    begin(rows);
    const QueryBlock& block = call_.batch.query_blocks[item.block];
    const KeyList list(call_, block, item.block, item.head);
    const Sequence seq(call_.batch, block.seq);
    const Reader reader{call_, list, seq, s_.turn, s_.turned, rows.kv_head, item.end};
    if (few_rows(rows.count, dim_)) read_few(item, rows, reader);
    else read(item, rows, reader);
    if (part) put_part(rows, part);
    else put_output(rows);
  }

  // Joins the parts p of an item: out = sum_p 2^(reference_p - max_p reference_p) out_p, and so
  // sum.
  void merge(const Item& item, const float* parts, int64_t stride) {
    const StackedRows rows(call_, item);
    begin(rows);
    for (int64_t row = 0; row < rows.count; ++row) {
      const float* first = parts + row * part_size();
      float best = -INFINITY;
      for (int p = 0; p < item.parts; ++p) best = maximum(best, first[p * stride]);
      if (best == -INFINITY) continue;
      s_.reference[row] = best;
      for (int p = 0; p < item.parts; ++p) {
        const float* from = first + p * stride;
        float factor = from[0] == -INFINITY ? 0.f : exp2f(from[0] - best);
        s_.sum[row * kLanes] += factor * from[1];
        for (int64_t c = 0; c < dim_; ++c) s_.out[row * dim_ + c] += factor * from[2 + c];
      }
    }
    put_output(rows);
  }
  // Floats of a row of a part: reference, sum, out.
  int64_t part_size() const { return dim_ + 2; }

 private:
  // Packs the rows; nothing is summed yet.
  void begin(const StackedRows& rows) {
    for (int64_t r = 0; r < rows.count; ++r) {
      const Q* q = token_row<const Q>(call_.q, rows.token_of(r), rows.head_of(r));
      pack_row<Unit, Q>(q, dim_, s_.q + r * depth_);
      for (int64_t k = dim_ / Unit::kValues; k < depth_; ++k) s_.q[r * depth_ + k] = 0.f;
      s_.reference[r] = -INFINITY;
    }
    memset(s_.sum, 0, rows.count * kLanes * 4);
    memset(s_.out, 0, rows.count * dim_ * 4);
  }

  void read(const Item& item, const StackedRows& rows, const Reader& reader) {
    Tile tile;
    for (int64_t n = item.begin; n < item.end; n += tile.k.count) {
      reader.find(n, tile);
      reader.turn_keys(tile);
      if constexpr (kTiled<Unit>) attend_in_blocks(tile, rows);
      else attend(tile, rows);
    }
  }
  // Few rows wait for memory: the next tile is asked for meanwhile.
  void read_few(const Item& item, const StackedRows& rows, const Reader& reader) {
    Tile tiles[2];
    reader.find(item.begin, tiles[0]);
    int turn = 0;
    for (int64_t n = item.begin; n < item.end; turn ^= 1) {
      n += tiles[turn].k.count;
      reader.find(n, tiles[turn ^ 1]);
      reader.turn_keys(tiles[turn]);
      attend_few(tiles[turn], tiles[turn ^ 1], rows);
    }
  }

  // All rows over one tile: first the weights, while its keys are in the cache, then the values.
  void attend(const Tile& tile, const StackedRows& rows) {
    const bool whole = all_visible(tile, rows, call_.sliding_window);
    KeyTile<Unit, K>::pack(tile.k, dim_, s_.keys, s_.convert);
    for (int64_t row = 0; row < rows.count; row += kRows) {
      const int64_t count = minimum(rows.count - row, (int64_t)kRows);
      weigh(row, count, tile, rows, whole, [&](int columns) {
        with_rows<kRows>(count, [&]<int kM>() { score_keys<kM>(row, columns); });
      });
    }
    ValueTile<Unit, K>::pack(tile.v, dim_, s_.values);
    for (int64_t row = 0; row < rows.count; row += kRows) {
      const int units = ceil_div(s_.high[row], Unit::kValues);
      if (units)
        with_rows<kRows>(minimum(rows.count - row, (int64_t)kRows),
                         [&]<int kM>() { add_values<kM>(row, units); });
    }
  }

  // The same on tile registers: a block of rows from its scores to its output, so that scores and
  // weights stay in the first cache.
  void attend_in_blocks(const Tile& tile, const StackedRows& rows) {
    const bool whole = all_visible(tile, rows, call_.sliding_window);
    KeyTile<Unit, K>::pack(tile.k, dim_, s_.keys, s_.convert);
    ValueTile<Unit, K>::pack(tile.v, dim_, s_.values);
    for (int64_t row = 0; row < rows.count; row += kBlockRows) {
      const int64_t count = minimum(rows.count - row, (int64_t)kBlockRows);
      weigh(row, count, tile, rows, whole, [&](int columns) {
        multiply_block<false>({s_.q + row * depth_, depth_}, count, {s_.keys, kKeys}, columns,
                              depth_ / kLanes, {s_.scores, kKeys});
      });
      const int steps = ceil_div(s_.high[row], (int32_t)kStep);
      if (!steps) continue;
      multiply_block<true>({weights(row), Pieces::kWeights}, count, {s_.values, dim_}, dim_, steps,
                           {s_.out + row * dim_, dim_});
    }
  }

  // The same for few rows, on keys and values where they lie.
  void attend_few(const Tile& tile, const Tile& next, const StackedRows& rows) {
    const bool whole = all_visible(tile, rows, call_.sliding_window);
    with_rows<kFewRows>(rows.count, [&]<int kM>() {
      weigh(0, kM, tile, rows, whole, [&](int) {
        score_few<Unit, K, kM>(s_.q, tile.k.row, tile.k.count, depth_, s_.scores, next.k);
      });
      const int units = ceil_div(s_.high[0], Unit::kValues);
      add_few<Unit, K, kM>(s_.weights, tile.v, units, dim_, s_.out, next.v);
    });
  }

  // The weights of `count` rows from `row` on, of which score(columns) computes q . k. Leaves in
  // high[row] how many keys of the tile they read.
  template <class Score>
  void weigh(int64_t row, int64_t count, const Tile& tile, const StackedRows& rows, bool whole,
             const Score& score) {
    Visible seen[kBlockRows] = {};
    int high = whole ? kKeys : 0;
    for (int64_t r = 0; r < count && !whole; ++r) {
      seen[r] = visible(tile, rows.position_of(row + r), call_.sliding_window);
      if (seen[r].any()) high = maximum(high, seen[r].high);
    }
    s_.high[row] = high;
    if (!high) return;
    score(round_up(high, 16));
    const float factor = scale_.factor();
    for (int64_t r = 0; r < count; ++r) {
      float* scores = s_.scores + r * kKeys;
      scale_.cap(scores);
      const RowState state = state_of(row + r);
      if (whole) online_softmax<Unit, true>(scores, factor, seen[r], state, weights(row + r));
      else online_softmax<Unit, false>(scores, factor, seen[r], state, weights(row + r));
    }
  }
  RowState state_of(int64_t row) const {
    return {s_.reference + row, s_.sum + row * kLanes, s_.out + row * dim_, dim_};
  }
  float* weights(int64_t row) const {
    return s_.weights + (kTiled<Unit> ? row % kBlockRows : row) * Pieces::kWeights;
  }

  // scores[r][key] = q_r . k_key for kM rows and `columns` keys of the tile
  template <int kM> void score_keys(int64_t row, int columns) {
    constexpr int kWide = kColumns * kLanes;
    for (int c = 0; c < columns; c += kWide) {
      vf acc[kM][kColumns] = {};
      product<Unit, kM, kColumns>(s_.q + row * depth_, depth_, s_.keys + c, kKeys, depth_, acc);
      for (int r = 0; r < kM; ++r)
        for (int i = 0; i < kColumns; ++i) store(s_.scores + r * kKeys + c + i * kLanes, acc[r][i]);
    }
  }

  // out[r] += sum_key weights[r][key] v_key for kM rows and `units` units of keys
  template <int kM> void add_values(int64_t row, int units) {
    constexpr int kWide = kColumns * kLanes;
    int64_t c = 0;
    for (; c + kWide <= dim_; c += kWide) add_columns<kM, kColumns>(row, c, units);
    for (; c < dim_; c += kLanes) add_columns<kM, 1>(row, c, units);
  }
  template <int kM, int kN> void add_columns(int64_t row, int64_t column, int units) {
    constexpr int kStride = kKeys / Unit::kValues;
    vf acc[kM][kN];
    for (int r = 0; r < kM; ++r)
      for (int c = 0; c < kN; ++c)
        acc[r][c] = load(s_.out + (row + r) * dim_ + column + c * kLanes);
    product<Unit, kM, kN>(s_.weights + row * kStride, kStride, s_.values + column, dim_, units,
                          acc);
    for (int r = 0; r < kM; ++r)
      for (int c = 0; c < kN; ++c)
        store(s_.out + (row + r) * dim_ + column + c * kLanes, acc[r][c]);
  }

  float sum_of(int64_t row) const { return reduce_sum(load(s_.sum + row * kLanes)); }

  void put_part(const StackedRows& rows, float* part) const {
    for (int64_t row = 0; row < rows.count; ++row) {
      float* to = part + row * part_size();
      to[0] = s_.reference[row];
      to[1] = sum_of(row);
      memcpy(to + 2, s_.out + row * dim_, dim_ * 4);
    }
  }

  // out / sum and ln(sum) + ln(2) * reference; zeros and -inf for rows that read nothing.
  void put_output(const StackedRows& rows) const {
    for (int64_t row = 0; row < rows.count; ++row) {
      const int64_t token = rows.token_of(row), head = rows.head_of(row);
      Q* out = token_row<Q>(call_.out, token, head);
      float sum = sum_of(row), inverse = sum > 0 ? 1.f / sum : 0.f;
      for (int64_t c = 0; c < dim_; ++c) from_float(s_.out[row * dim_ + c] * inverse, out + c);
      float lse = sum > 0 ? (s_.reference[row] + log2f(sum)) * kLn2 : -INFINITY;
      call_.lse[token * call_.batch.num_q_heads + head] = lse;
    }
  }

  const AttentionCall& call_;
  Pieces& s_;
  const int64_t dim_, depth_;
  const ScoreScale scale_;
};

template <class Q, class K> static void attend_all(const AttentionCall& call) {
  const WorkPlan plan(call);
  const int64_t dim = call.batch.head_dim, group = HeadGroups(call).size;
  const Array<float> parts(plan.part_rows() * (dim + 2));
#pragma omp parallel if (plan.count() > 1 && plan.pairs() * dim >= kSharedWork)
  {
    const TileRegisters registers;
    Scratch<typename Attention<Q, K>::Pieces> scratch(call.batch, plan.max_rows());
    Attention<Q, K> attention(call, *scratch);
    const int64_t row = attention.part_size();
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < plan.count(); ++i) {
      const Item& item = plan[i];
      attention.run(item, item.parts > 1 ? parts.data + item.part_row * row : nullptr);
    }
    if (plan.part_rows()) {
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < plan.count(); ++i) {
        const Item& item = plan[i];
        if (item.parts > 1 && item.part == 0)
          attention.merge(item, parts.data + item.part_row * row, item.num_rows * group * row);
      }
    }
  }
}

static void attention(const AttentionCall& call) {
  dispatch(call.batch.dtype, call, &Kernels::attention,
           [&]<class Q, class K>() { attend_all<Q, K>(call); });
}

}  // namespace HIPSERVE_TIER
}  // namespace hipserve
