// A tile: up to kKeys keys of a list with their values, found by row pointer, so that pages cost
// nothing, and which of them a row may read.
#pragma once
#include "amx.h"
#include "attention/softmax.h"
#include "attention/work_plan.h"

namespace hipserve {
namespace HIPSERVE_TIER {

struct Tile {
  TileRows k, v;
  int32_t positions[kKeys];  // ascending
  int num_moved;
  struct Moved {
    int first, end;
    int64_t shift;
  } moved[kKeys];  // keys that are seen `shift` positions later
};

// The stacked rows of an item. Row r is query row r / group, query head head * group + r % group.
struct StackedRows {
  int64_t head, group, kv_head, count, token, position;
  StackedRows(const AttentionCall& call, const Item& item) {
    const HeadGroups heads(call);
    const QueryBlock& block = call.batch.query_blocks[item.block];
    head = item.head;
    group = heads.size;
    kv_head = head * call.batch.num_kv_heads / heads.count;
    count = item.num_rows * group;
    token = block.row + item.first_row;
    position = block.position + item.first_row;
  }
  int64_t token_of(int64_t r) const { return token + r / group; }
  int64_t head_of(int64_t r) const { return head * group + r % group; }
  int64_t position_of(int64_t r) const { return position + r / group; }
};

// Finds the keys of a list, and their values, up to its `end`-th key.
template <class Unit, class K> struct TileReader {
  const AttentionCall& call;
  const KeyList& list;
  const Sequence& seq;
  Turn& turn;
  float* turned;  // [kKeys][head_dim]
  int64_t kv_head, end;

  // Fills a tile with the keys from the n-th on, where they lie.
  void find(int64_t n, Tile& tile) const {
    int count = 0;
    tile.num_moved = 0;
    const int64_t limit = minimum(end - n, (int64_t)kKeys);
    auto add = [&](int64_t key, int64_t keys) {
      const K* k_row = key_row<K>(call.k, seq, kv_head, key);
      const K* v_row = key_row<K>(call.v, seq, kv_head, key);
      for (int64_t i = 0; i < keys; ++i, ++count) {
        tile.k.row[count] = k_row + i * call.k.slot_stride;
        tile.v.row[count] = v_row + i * call.v.slot_stride;
        tile.positions[count] = (int32_t)(key + i);
      }
    };
    while (count < limit) {
      const Segment segment = list.from(n + count);
      const int first = count;
      walk_pages(seq, segment.key, minimum(segment.count, limit - count), add);
      if (segment.shift) tile.moved[tile.num_moved++] = {first, count, segment.shift};
    }
    tile.k.count = tile.v.count = count;
    tile.k.fill_up();
    tile.v.fill_up();
    // An instruction sums over several keys.
    tile.v.count = kTiled<Unit> ? round_up(count, kStep) : round_up(count, 2);
  }

  // Replaces the keys of a tile that are seen elsewhere by turned copies.
  void turn_keys(Tile& tile) const {
    for (int i = 0; i < tile.num_moved; ++i) {
      const Tile::Moved& moved = tile.moved[i];
      turn.set(moved.shift);
      for (int j = moved.first; j < moved.end; ++j) {
        K* copy = (K*)turned + j * call.batch.head_dim;
        turn.apply((const K*)tile.k.row[j], copy);
        tile.k.row[j] = copy;
      }
    }
  }
};

// Whether every row reads every key of the tile.
static inline bool all_visible(const Tile& tile, const StackedRows& rows, int64_t sliding_window) {
  const int64_t last = rows.position_of(rows.count - 1);
  return tile.k.count == kKeys && tile.positions[kKeys - 1] <= rows.position &&
         (!sliding_window || tile.positions[0] > last - sliding_window);
}

// The keys of a tile that a row at `position` reads: those not behind it, and in its window.
static inline Visible visible(const Tile& tile, int64_t position, int64_t sliding_window) {
  Visible seen{0, tile.k.count};
  while (seen.high > 0 && tile.positions[seen.high - 1] > position) --seen.high;
  if (sliding_window)
    while (seen.any() && tile.positions[seen.low] <= position - sliding_window) ++seen.low;
  return seen;
}

}  // namespace HIPSERVE_TIER
}  // namespace hipserve
