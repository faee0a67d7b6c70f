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

// Keys of the longest sequence of a call.
static inline int64_t longest_sequence(const SelectCall& call) {
  int64_t keys = 0;
  for (int64_t i = 0; i < call.batch.num_query_blocks; ++i) {
    const QueryBlock& block = call.batch.query_blocks[i];
    keys = maximum(keys, (int64_t)block.position + block.num_rows);
  }
  return keys;
}

constexpr int64_t kMostShifts = 64;  // for so many is kept what is made of rows; for others, once

// By how many positions keys are seen nearer: whole segments, or none. What is made of the rows
// for one of them is kept in its slot, where it may replace that of another.
struct Shifts {
  int bits = 0;
  int64_t slots = 1;
  explicit Shifts(const SelectCall& call) {
    if (!call.batch.rope.partner) return;
    bits = segment_bits(call.batch.rope);
    slots = minimum((longest_sequence(call) >> bits) + 1, kMostShifts);
  }
  int64_t slot(int64_t shift) const { return minimum(shift >> bits, slots - 1); }
};

// The sampled rows of one query block and head, turned back to see keys nearer.
class SampledRows {
 public:
  SampledRows(Arena& arena, const SelectCall& call)
      : call_(call), shifts_(call), turn_(arena, call.batch) {
    if (!call.batch.rope.partner) return;
    turned_ = arena.take<float>(kChunk * call.batch.head_dim);
  }
  void take(const QueryBlock& block, int64_t head) {
    block_ = &block;
    head_ = head;
  }
  const Shifts& shifts() const { return shifts_; }
  int64_t count() const { return num_sampled(call_, *block_); }

  // The r-th of them, as it meets keys that are seen `shift` positions nearer; lasts for kChunk
  // calls.
  template <class Q> const Q* row(int64_t r, int64_t shift) {
    if (!shift) return in_call<Q>(r);
    Q* turned = (Q*)turned_ + r % kChunk * call_.batch.head_dim;
    turn_to(shift).apply(in_call<Q>(r), turned);
    return turned;
  }
  // The turn of queries that meet keys seen `shift` positions nearer.
  const Turn& turn_to(int64_t shift) {
    turn_.set(-shift);
    return turn_;
  }

 private:
  template <class Q> const Q* in_call(int64_t r) const {
    const int64_t group = group_size(call_);
    const int64_t row = block_->num_rows - 1 - r / group * call_.query_stride;
    return token_row<const Q>(call_.q, block_->row + row, head_ * group + r % group);
  }
  const SelectCall& call_;
  const Shifts shifts_;
  Turn turn_;
  float* turned_ = nullptr;  // [kChunk][head_dim], of any dtype
  const QueryBlock* block_ = nullptr;
  int64_t head_ = 0;
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

  // Takes sampled rows of n values stored as Q, as they meet keys that are seen `shift` positions
  // nearer; `unmoved` took them for no shift.
  template <class Q> void take(SampledRows& sampled, int64_t shift, int64_t n, float* convert,
                               const Columns& unmoved) {
    const int64_t count = sampled.count();
    if (!shift || unmoved.few)
      return fill<Q>(count, n, few_rows(count, n), convert,
                     [&](int64_t r) { return sampled.template row<Q>(r, shift); });
    rows = count;
    few = false;
    for (int64_t first = 0; first < count; first += kChunk) {
      const int64_t lanes = minimum(count - first, (int64_t)kChunk);
      float* to = units + first * depth;
      sampled.turn_to(shift).template apply_to_columns<Unit, Q>(unmoved.units + first * depth,
                                                                lanes, kChunk, to);
      clear_tail(to);
    }
  }

  // Takes `count` rows of any number, of which row(r) gives the r-th, n values stored as Q; a
  // result of row(r) lasts for kChunk calls. `convert` holds kKeys * width floats.
  template <class Q, class Row> void fill(int64_t count, int64_t n, bool are_few, float* convert,
                                          const Row& row) {
    rows = count;
    few = are_few;
    for (int64_t first = 0; first < count; first += kChunk) {
      TileRows chunk;
      chunk.count = (int)minimum(count - first, (int64_t)kChunk);
      for (int j = 0; j < chunk.count; ++j) chunk.row[j] = row(first + j);
      if (few) put_few<Q>(chunk, n);
      else put_chunk<Q>(chunk, n, units + first * depth, convert);
    }
  }

 private:
  template <class Q> void put_few(const TileRows& chunk, int64_t n) {
    for (int j = 0; j < chunk.count; ++j)
      pack_row<Unit, Q>((const Q*)chunk.row[j], (int)n, units + j * depth);
  }
  template <class Q> void put_chunk(TileRows& chunk, int64_t n, float* to, float* convert) {
    chunk.fill_up();
    KeyTile<Unit, Q>::pack(chunk, (int)n, to, convert);
    clear_tail(to);
  }
  // Units behind the last value of a row.
  void clear_tail(float* chunk) {
    const int64_t used = width / Unit::kValues;
    memset(chunk + used * kChunk, 0, (depth - used) * kChunk * 4);
  }
};

}  // namespace HIPSERVE_TIER
}  // namespace hipserve
