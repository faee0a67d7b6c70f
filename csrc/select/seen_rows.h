// The sampled rows of a query block as they meet near and far keys.
#pragma once
#include "select/rows_as_columns.h"

namespace hipserve {
namespace HIPSERVE_TIER {

// The keys between sinks and window of one query block and KV head: positions [begin, end).
struct Middle {
  Sequence seq;
  int64_t kv_head, begin, end;
  FarKeys far;
};

// The columns that meet groups of rows in memory, of which the i-th begins with the key key(i).
template <class Rows, class Key> struct SeenBy {
  using Queries = typename Rows::Queries;
  Rows& rows;
  const FarKeys& far;
  Key key;
  // Groups [group, alike(group, limit)) meet the same columns, which last until the next call.
  int64_t alike(int64_t group, int64_t limit) const { return far.seen_alike(group, limit, key); }
  const Queries& columns(int64_t group) const { return rows.nearer(far.shift_of(key(group))); }
  // For what all columns have in common.
  const Queries& any() const { return rows.nearer(0); }
};

// The sampled rows, packed once for each distance by which keys are seen nearer, as they meet what
// is Stored: keys or summaries.
template <class Stored> class SeenRows {
 public:
  using Queries = typename Stored::Queries;
  // convert: kKeys rows of floats.
  SeenRows(Arena& arena, int64_t max_rows, int64_t head_dim, const Stored& stored,
           SampledRows& rows, float* convert)
      : stored_(stored), rows_(rows), convert_(convert), shifts_(rows.shifts()) {
    columns_ = arena.take<Queries>(shifts_.slots);
    shift_ = arena.take<int64_t>(shifts_.slots);
    for (int64_t i = 0; i < shifts_.slots; ++i) {
      const Queries columns = Stored::queries(arena, max_rows, head_dim);
      if (columns_) columns_[i] = columns;
    }
  }

  // Other rows were sampled.
  void forget() {
    for (int64_t i = 0; i < shifts_.slots; ++i) shift_[i] = -1;
  }

  // The rows as they meet keys that are seen `shift` positions nearer.
  const Queries& nearer(int64_t shift) {
    const int64_t slot = shifts_.slot(shift);
    if (shift_[slot] != shift) {
      const Queries& unmoved = shift ? nearer(0) : columns_[0];
      stored_.take_queries(rows_, shift, convert_, unmoved, columns_[slot]);
    }
    shift_[slot] = shift;
    return columns_[slot];
  }

  template <class Key> SeenBy<SeenRows, Key> by(const FarKeys& far, const Key& key) {
    return {*this, far, key};
  }

 private:
  const Stored& stored_;
  SampledRows& rows_;
  float* convert_;
  const Shifts& shifts_;
  Queries* columns_;  // of each slot
  int64_t* shift_;    // for which they are; -1: not yet
};

}  // namespace HIPSERVE_TIER
}  // namespace hipserve
