// Rows turned by positions, as ops/rope.py defines it, and which keys a search sees nearer.
#pragma once
#include "arena.h"
#include "product.h"

namespace hipserve {
namespace HIPSERVE_TIER {

// cos and sin of 2^-32 `turns` of a whole turn: of what is left of the nearest quarter, by Taylor.
static inline void cos_sin(vu turns, vf* cos, vf* sin) {
  constexpr float kStep = 1.4629180792671596e-9f;  // 2 pi / 2^32
  const vi quarter = (vi)(turns + (1u << 29)) >> 30;
  const vf x = __builtin_convertvector((vi)(turns - ((vu)quarter << 30)), vf) * kStep, y = x * x;
  const vf s = x + x * y * (-1.f / 6 + y * (1.f / 120 + y * (-1.f / 5040 + y * (1.f / 362880))));
  const vf c = 1.f + y * (-1.f / 2 + y * (1.f / 24 + y * (-1.f / 720 + y * (1.f / 40320))));
  const vi odd = (quarter & 1) != 0;
  const vf a = odd ? s : c, b = odd ? c : s;
  *cos = ((quarter + 1) & 2) != 0 ? -a : a;
  *sin = (quarter & 2) != 0 ? -b : b;
}

// A turn by some positions: x cos + x[partner] sin.
class Turn {
 public:
  Turn(Arena& arena, const Batch& batch) : rope_(batch.rope), dim_(batch.head_dim) {
    if (!rope_.partner) return;
    cos_ = arena.take<float>(dim_);
    sin_ = arena.take<float>(dim_);
    half_ = rope_.partner[0];
    if (!in_halves()) half_ = 0;
  }

  void set(int64_t by) {
    if (by == by_) return;
    by_ = by;
    for (int64_t c = 0; c < (half_ ? half_ : dim_); c += kLanes) {
      vf cos, sin;
      cos_sin(*(const vu*)(rope_.step + c) * (uint32_t)by, &cos, &sin);
      store(cos_ + c, cos);
      store(sin_ + c, sin);
    }
  }

  template <class T> void apply(const T* row, T* out) const {
    if (half_) return apply_in_halves(row, out);
    float x[kMaxDim];
    for (int64_t c = 0; c < dim_; c += kLanes) store(x + c, load_floats(row + c));
    for (int64_t c = 0; c < dim_; c += kLanes)
      store_floats(load(x + c) * load(cos_ + c) + partners(x, c) * load(sin_ + c), out + c);
  }
  // The same for `lanes` rows of queries as columns, units[channel][row], `stride` of them apart.
  template <class Unit, class Q>
  void apply_to_columns(const float* units, int64_t lanes, int64_t stride, float* out) const {
    constexpr int kValues = Unit::kValues;
    for (int64_t k = 0; k < dim_ / kValues; ++k) {
      Factors by[kValues];
      const float *x = units + k * stride, *y[kValues];
      uint32_t in_unit[kValues];
      for (int i = 0; i < kValues; ++i) {
        const uint32_t partner = rope_.partner[k * kValues + i];
        by[i] = factors(k * kValues + i);
        y[i] = units + partner / kValues * stride;
        in_unit[i] = partner % kValues;
      }
      for (int64_t lane = 0; lane < lanes; lane += kLanes)
        store(out + k * stride + lane, units_of<Unit, Q>([&](int i) {
                return value_of<Unit>(load(x + lane), i) * by[i].cos +
                       value_of<Unit>(load(y[i] + lane), in_unit[i]) * by[i].sin;
              }));
    }
  }

 private:
  struct Factors {
    float cos, sin;  // of a channel and of its partner
  };
  Factors factors(int64_t c) const {
    if (!half_ || c < half_) return {cos_[c], sin_[c]};
    if (c < 2 * half_) return {cos_[c - half_], -sin_[c - half_]};
    return {1.f, 0.f};
  }

  // Whether channels c and half_ + c are pairs, as most models have them, in whole vectors, and
  // the channels behind never turn.
  bool in_halves() const {
    if (half_ % kLanes || 2 * half_ > dim_) return false;
    for (int64_t c = 0; c < dim_; ++c) {
      const int64_t partner = c < half_ ? c + half_ : c < 2 * half_ ? c - half_ : c;
      if (rope_.partner[c] != partner || rope_.step[c] != -rope_.step[partner]) return false;
    }
    return true;
  }
  template <class T> void apply_in_halves(const T* row, T* out) const {
    const int64_t half = half_;  // in registers, whatever `out` may alias
    const float *cosines = cos_, *sines = sin_;
    for (int64_t c = 0; c < half; c += kLanes) {
      const vf a = load_floats(row + c), b = load_floats(row + half + c);
      const vf cos = load(cosines + c), sin = load(sines + c);
      store_floats(a * cos + b * sin, out + c);
      store_floats(b * cos - a * sin, out + half + c);
    }
    if (2 * half < dim_) memcpy(out + 2 * half, row + 2 * half, (dim_ - 2 * half) * sizeof(T));
  }

  // x[partner] of channels c and behind: neighbours too, unless a model pairs even with odd ones.
  vf partners(const float* x, int64_t c) const {
    const int32_t* partner = rope_.partner + c;
    if (partner[kLanes - 1] - partner[0] == kLanes - 1) return load(x + partner[0]);
    float found[kLanes];
    for (int i = 0; i < kLanes; ++i) found[i] = x[partner[i]];
    return load(found);
  }

  const Rope rope_;
  const int64_t dim_;
  int64_t half_ = 0;  // channels of a half, or 0
  int64_t by_ = 0;    // no turn at all: nobody asks for that
  float *cos_ = nullptr, *sin_ = nullptr;
};

// Whether the rows of a query block lie beyond the trained length.
static inline bool streams(const Batch& batch, const QueryBlock& block) {
  return batch.rope.partner && block.position >= batch.rope.trained_length;
}

// Keys that are moved together are 2 to the power of this: segment_length in ops/rope.py.
static inline int segment_bits(const Rope& rope) {
  int bits = 0;
  while ((int64_t)8 << bits <= rope.trained_length) ++bits;
  return bits;
}

// How much nearer a query block sees the keys of far segments: those before `nearest` as if their
// segment began there.
class FarKeys {
 public:
  FarKeys(const Batch& batch, const QueryBlock& block, int64_t window_start) {
    if (!streams(batch, block)) return;
    bits_ = segment_bits(batch.rope);
    nearest_ = maximum((window_start >> bits_) - 1, (int64_t)0) << bits_;
  }

  // How many positions nearer a key is seen: whole segments.
  int64_t shift_of(int64_t key) const {
    return maximum(nearest_ - (key >> bits_ << bits_), (int64_t)0);
  }
  // The end, `limit` at most, of the ascending keys key(first), key(first + 1), ... that are seen
  // as much nearer as the first of them.
  template <class Key> int64_t seen_alike(int64_t first, int64_t limit, const Key& key) const {
    if (!nearest_) return limit;
    const int64_t shift = shift_of(key(first));
    while (++first < limit && shift_of(key(first)) == shift) {
    }
    return first;
  }

 private:
  int64_t nearest_ = 0;
  int bits_ = 0;
};

}  // namespace HIPSERVE_TIER
}  // namespace hipserve
