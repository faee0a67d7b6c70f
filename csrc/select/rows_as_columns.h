// The sampled rows of a query block as columns of a product, so that a key is scored where it lies.
#pragma once
#include "amx.h"
#include "arena.h"
#include "few_rows.h"
#include "pages.h"
#include "rope.h"

namespace hipserve {
namespace HIPSERVE_TIER {

constexpr int kChunk = kKeys;  // sampled rows side by side

// Query heads that share the chosen blocks of one head.
static inline int64_t group_size(const SelectCall& call) {
  return call.batch.num_q_heads / call.heads;
}

// Stacked rows that stand for a query block: every query_stride-th one, the last one first.
static inline int64_t num_sampled(const SelectCall& call, const QueryBlock& block) {
  return ((block.num_rows - 1) / call.query_stride + 1) * group_size(call);
}

// The sampled rows of one query block and head, turned back to see keys `shift` positions nearer.
class SampledRows {
 public:
  SampledRows(Arena& arena, const SelectCall& call) : call_(call), turn_(arena, call.batch) {
    if (call.batch.rope.partner) turned_ = arena.take<float>(kChunk * call.batch.head_dim);
  }
  void take(const QueryBlock& block, int64_t head) {
    block_ = &block;
    head_ = head;
    shift_ = 0;
  }
  int64_t shift() const { return shift_; }
  void see(int64_t shift) {
    shift_ = shift;
    turn_.set(-shift);
  }
  int64_t count() const { return num_sampled(call_, *block_); }

  // The r-th of them; it lasts for kChunk calls.
  template <class Q> const Q* row(int64_t r) const {
    const int64_t group = group_size(call_);
    const int64_t row = block_->num_rows - 1 - r / group * call_.query_stride;
    const Q* q = token_row<const Q>(call_.q, block_->row + row, head_ * group + r % group);
    if (!shift_) return q;
    Q* turned = (Q*)turned_ + r % kChunk * call_.batch.head_dim;
    turn_.apply(q, turned);
    return turned;
  }

 private:
  const SelectCall& call_;
  Turn turn_;
  float* turned_ = nullptr;  // [kChunk][head_dim]
  const QueryBlock* block_ = nullptr;
  int64_t head_ = 0, shift_ = 0;
};

// Rows as columns: chunks of kChunk rows, units[k][row]. Lanes beyond the last row have a baseline
// of infinity and never count. Few rows (few_rows.h) are one behind the other instead.
template <class Unit_> struct Columns {
  using Unit = Unit_;
  static constexpr int kParts =
      1;  // of a row, each with a product of its own; a score is their sum
  float* units;
  int depth, width;  // units and values of a row
  int64_t rows = 0;
  bool few = false;
  Columns(Arena& arena, int64_t max_rows, int64_t width)
      : depth((int)depth_of<Unit>(width)), width((int)width) {
    units = arena.take<float>(max_rows * depth);
  }

  // Whether products ask for the rows of the next batch by themselves.
  bool asks_ahead() const { return false; }

  // Takes `count` rows of any number, of which row(r) gives the r-th, stored as Q; a result of
  // row(r) lasts for kChunk calls. `convert` holds kKeys * width floats.
  template <class Q, class Row> void fill(int64_t count, bool are_few, float* convert,
                                          const Row& row) {
    rows = count;
    few = are_few;
    for (int64_t first = 0; first < count; first += kChunk) {
      TileRows chunk;
      chunk.count = (int)minimum(count - first, (int64_t)kChunk);
      for (int j = 0; j < chunk.count; ++j) chunk.row[j] = row(first + j);
      if (few) put_few<Q>(chunk);
      else put_chunk<Q>(chunk, units + first * depth, convert);
    }
  }

 private:
  template <class Q> void put_few(const TileRows& chunk) {
    for (int j = 0; j < chunk.count; ++j)
      pack_row<Unit, Q>((const Q*)chunk.row[j], width, units + j * depth);
  }
  template <class Q> void put_chunk(TileRows& chunk, float* to, float* convert) {
    chunk.fill_up();
    KeyTile<Unit, Q>::pack(chunk, width, to, convert);
    const int64_t used = width / Unit::kValues;
    memset(to + used * kChunk, 0, (depth - used) * kChunk * 4);
  }
};

}  // namespace HIPSERVE_TIER
}  // namespace hipserve
