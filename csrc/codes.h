// Codes: rows of numbers in few bits and a scale, as ops/codes.py defines them, bit by bit.
#pragma once
#include "product.h"

namespace hipserve {
namespace HIPSERVE_TIER {

constexpr int kSummaryBits = 8, kQueryBits = 8;
constexpr int kTurnedBits = 14;  // as TURNED_BITS in ops/codes.py
constexpr int kReachSteps = 64;  // as REACH_STEPS in ops/codes.py

// Channels that are rotated together: the greatest power of two that divides n.
static inline int64_t rotation_size(int64_t n) { return n & -n; }

// The steps of a rotation that pair lanes of one vector. The upper one of a pair becomes a - b.
static inline vf rotate_lanes(vf x) {
  for (int step = 1; step < kLanes; step *= 2)
    x = swap_lanes(x, step) + ((lanes() & step) != 0 ? -x : x);
  return x;
}

// The Walsh-Hadamard transform of every rotation_size(n) numbers, n a multiple of 16.
static inline void rotate(float* x, int64_t n) {
  for (int64_t c = 0; c < n; c += kLanes) store(x + c, rotate_lanes(load(x + c)));
  for (int64_t step = kLanes; step < rotation_size(n); step *= 2)
    for (int64_t block = 0; block < n; block += 2 * step)
      for (int64_t c = block; c < block + step; c += kLanes) {
        const vf a = load(x + c), b = load(x + c + step);
        store(x + c, a + b);
        store(x + c + step, a - b);
      }
}

// Rounds up to a power of two, or to 4 significant bits for codes of 4 bits.
static inline float round_scale(float scale, int bits) {
  const uint32_t below = (1u << (bits == 4 ? 20 : 23)) - 1;
  uint32_t x;
  memcpy(&x, &scale, 4);
  x = (x + below) & ~below;
  memcpy(&scale, &x, 4);
  return scale;
}

// floor(x) of numbers that fit an integer.
static inline vi floor_of(vf x) {
  const vi whole = __builtin_convertvector(x, vi);  // towards zero
  return whole + (__builtin_convertvector(whole, vf) > x);
}

// Replaces x by integers of `bits` bits and returns their scale: x was about scale * integers.
static inline float to_integers(float* x, int64_t n, int bits) {
  const int limit = (1 << (bits - 1)) - 1;
  vf top = splat(0.f);
  for (int64_t c = 0; c < n; c += kLanes) top = maximum(maximum(load(x + c), -load(x + c)), top);
  const float scale = round_scale(reduce_max(top) / (float)limit, bits);
  const float divisor = scale > 0.f ? scale : 1.f;  // 0: a row of zeros
  for (int64_t c = 0; c < n; c += kLanes) {
    vi nearest = floor_of(load(x + c) / divisor + 0.5f);
    nearest = nearest > limit ? vi{} + limit : nearest;
    nearest = nearest < -limit ? vi{} - limit : nearest;
    store(x + c, __builtin_convertvector(nearest, vf));
  }
  return scale;
}

// Writes integers of at most 8 bits and returns their scale; they are left in x as well.
static inline float encode(float* x, int64_t n, int bits, int8_t* numbers) {
  const float scale = to_integers(x, n, bits);
  for (int64_t c = 0; c < n; c += kLanes)
    store_bytes(numbers + c, __builtin_convertvector(load(x + c), vi));
  return scale;
}

// The bytes of n integers: of 4 bits each, plus 8, two in a byte, the first of a pair in its low
// bits.
static inline void pack(const int8_t* numbers, int64_t n, int bits, uint8_t* bytes) {
  if (bits == 8) {
    memcpy(bytes, numbers, n);
    return;
  }
  for (int64_t i = 0; i < n / 2; ++i)
    bytes[i] = (uint8_t)((numbers[2 * i] + 8) | (numbers[2 * i + 1] + 8) << 4);
}

// The code of a key: of the rotated key.
template <class K>
static inline void encode_key(const K* key, int64_t n, int bits, uint8_t* code, bf16* scale) {
  float x[kMaxDim];
  int8_t numbers[kMaxDim];
  to_floats(key, (int)n, x);
  rotate(x, n);
  from_float(encode(x, n, bits, numbers), scale);
  pack(numbers, n, bits, code);
}

}  // namespace HIPSERVE_TIER
}  // namespace hipserve
