// The keys that one query block reads: sinks, chosen blocks and window, or all that are visible.
#pragma once
#include "pages.h"
#include "rope.h"

namespace hipserve {
namespace HIPSERVE_TIER {

// Keys without a gap: positions [key, key + count), seen `shift` positions later.
struct Segment {
  int64_t key, count, shift;
};

// The list, as ascending segments of positions, of one query block and head.
class KeyList {
 public:
  KeyList(const AttentionCall& call, const QueryBlock& block, int64_t block_id, int64_t head)
      : block_size_(call.key_block_size), end_(block.position + block.num_rows) {
    if (call.indices) {
      num_sinks_ = minimum(call.num_sink_tokens, end_);
      window_ = minimum((int64_t)call.window_start[block_id], end_);
      blocks_ = call.indices + (block_id * call.index_heads + head) * call.max_selected;
      while (num_blocks_ < call.max_selected && blocks_[num_blocks_] >= 0) ++num_blocks_;
    } else if (call.sliding_window) {
      window_ = block.position - call.sliding_window + 1;
    }
    window_ = maximum(window_, num_sinks_);
    const int64_t before = num_sinks_ + num_blocks_ * block_size_;
    moved_ = before < window_ && streams(call.batch, block);
    seen_from_ = window_ - before;
  }
  int64_t size() const { return num_sinks_ + num_blocks_ * block_size_ + (end_ - window_); }

  // The keys from the n-th of the list on, as far as they have no gap.
  Segment from(int64_t n) const {
    if (n < num_sinks_) return {n, num_sinks_ - n, shift(n, n)};
    const int64_t i = n - num_sinks_;
    if (i < num_blocks_ * block_size_) {
      const int64_t offset = i % block_size_, key = blocks_[i / block_size_] * block_size_ + offset;
      return {key, block_size_ - offset, shift(n, key)};
    }
    const int64_t key = window_ + i - num_blocks_ * block_size_;
    return {key, end_ - key, 0};
  }

 private:
  // Beyond the trained length, the list is seen at consecutive positions, up to its window's.
  int64_t shift(int64_t n, int64_t key) const { return moved_ ? seen_from_ + n - key : 0; }

  const int64_t block_size_, end_;  // the end of the window and of the sequence
  const int32_t* blocks_ = nullptr;
  int64_t num_sinks_ = 0, num_blocks_ = 0, window_ = 0;
  bool moved_ = false;
  int64_t seen_from_ = 0;  // where the first key of the list is seen
};

}  // namespace HIPSERVE_TIER
}  // namespace hipserve
