// The paper's search: a beam of nodes, each a range of blocks, is halved until nodes are blocks.
#pragma once
#include "select/keys.h"

namespace hipserve {
namespace HIPSERVE_TIER {

// A hash of a range, as `mix` in ops/select_blocks/reference/tree.py.
static inline int64_t mix(int64_t left, int64_t right, int64_t seed) {
  uint32_t x =
      (uint32_t)left * 0x9E3779B1u + (uint32_t)right * 0x85EBCA77u + (uint32_t)seed * 0xC2B2AE3Du;
  x = (x ^ (x >> 15)) * 0x2C1B3C6Du;
  x = (x ^ (x >> 12)) * 0x297A2D39u;
  return (x ^ (x >> 15)) & 0x7FFFFFFF;
}

struct TreeSize {
  int64_t beam;    // nodes that are kept: as many as blocks are found
  int64_t scores;  // of both halves of each
  explicit TreeSize(const TreeCall& call)
      : beam(call.budget / call.key_block_size), scores(2 * beam) {}
};

template <class Keys> class Tree {
 public:
  using Call = TreeCall;
  using Size = TreeSize;
  Tree(Arena& arena, const Call& call, const Size& size, int64_t, SampledRows&, Scorer&,
       BlockRank<Keys>& blocks)
      : call_(call), block_rank_(blocks), beam_(size.beam) {
    left_ = arena.take<int32_t>(beam_);
    right_ = arena.take<int32_t>(beam_);
    child_left_ = arena.take<int32_t>(2 * beam_);
    child_right_ = arena.take<int32_t>(2 * beam_);
    probes_ = arena.take<int32_t>(2 * beam_);
    best_children_ = arena.take<int32_t>(2 * beam_);
  }

  // Blocks of `budget` keys, ascending.
  BlockList find(int64_t, const Middle& middle) {
    const int64_t first = middle.begin / call_.key_block_size;
    const int64_t count = middle.end / call_.key_block_size - first;
    for (int64_t i = 0; i < beam_; ++i) {
      left_[i] = (int32_t)(first + i * count / beam_);
      right_[i] = (int32_t)(first + (i + 1) * count / beam_);
    }
    for (int64_t longest = ceil_div(count, beam_); longest > 1; longest = (longest + 1) / 2) {
      const int64_t n = split();
      for (int64_t i = 0; i < n; ++i)
        probes_[i] = (int32_t)representative(child_left_[i], child_right_[i]);
      const int64_t kept = block_rank_.best(probes_, n, beam_, middle, best_children_);
      for (int64_t i = 0; i < kept; ++i) {
        left_[i] = child_left_[best_children_[i]];
        right_[i] = child_right_[best_children_[i]];
      }
    }
    return {left_, beam_};  // nodes of one block are where they begin
  }

 private:
  // Halves the nodes; a half of no block is no child.
  int64_t split() {
    int64_t n = 0;
    for (int64_t i = 0; i < beam_; ++i) {
      const int32_t middle = (left_[i] + right_[i]) / 2;
      const int32_t edges[3] = {left_[i], middle, right_[i]};
      for (int half = 0; half < 2; ++half)
        if (edges[half] < edges[half + 1]) {
          child_left_[n] = edges[half];
          child_right_[n++] = edges[half + 1];
        }
    }
    return n;
  }

  // The block of [left, right) that is scored for all of them.
  int64_t representative(int64_t left, int64_t right) const {
    switch (call_.representative) {
      case 1: return left;
      case 2: return right - 1;
      case 3: return left + mix(left, right, call_.seed) % (right - left);
      default: return (left + right) / 2;
    }
  }

  const Call& call_;
  BlockRank<Keys>& block_rank_;
  const int64_t beam_;
  int32_t *left_, *right_;              // the beam: ranges of blocks, ascending
  int32_t *child_left_, *child_right_;  // its halves
  int32_t *probes_, *best_children_;    // the block scored for each; positions among the halves
};

}  // namespace HIPSERVE_TIER
}  // namespace hipserve
