// Vectors of one ISA tier, in the compiler's vector extensions. Everything in these headers is
// static or in the tier's namespace: each tier compiles its own copy, and no symbol of one ISA can
// replace another's.
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "kernels.h"

namespace hipserve {
namespace HIPSERVE_TIER {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

// Vectors of floats and of integers; in memory they may lie at any even address.
typedef float vf __attribute__((vector_size(kLanes * 4), aligned(2), may_alias));
typedef int32_t vi __attribute__((vector_size(kLanes * 4), aligned(2), may_alias));
typedef uint32_t vu __attribute__((vector_size(kLanes * 4), aligned(2), may_alias));
typedef int8_t vbytes __attribute__((vector_size(kLanes), aligned(1), may_alias));

template <class A> static constexpr A minimum(A a, A b) { return a < b ? a : b; }
template <class A> static constexpr A maximum(A a, A b) { return a > b ? a : b; }
static inline vf maximum(vf a, vf b) { return a > b ? a : b; }

// ceil(a / b) and a rounded up to a multiple of b, for a >= 0.
template <class A> static constexpr A ceil_div(A a, A b) { return (a + b - 1) / b; }
template <class A> static constexpr A round_up(A a, A b) { return (a + b - 1) / b * b; }

// Bytes in memory as integers, and back. gcc converts vectors of bytes one by one.
static inline vi load_bytes(const int8_t* x) {
#if defined(__AVX512F__)
  return (vi)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)x));
#else
  return __builtin_convertvector(*(const vbytes*)x, vi);
#endif
}
static inline void store_bytes(int8_t* x, vi y) {
#if defined(__AVX512F__)
  _mm_storeu_si128((__m128i*)x, _mm512_cvtepi32_epi8((__m512i)y));
#else
  *(vbytes*)x = __builtin_convertvector(y, vbytes);
#endif
}

static inline vf splat(float x) { return vf{} + x; }
static inline vf load(const float* p) { return *(const vf*)p; }
static inline void store(float* p, vf x) { *(vf*)p = x; }

// a b - c. With AVX-512 rounded once; elsewhere the compiler decides.
static inline vf multiply_subtract(vf a, float b, float c) {
#if defined(__AVX512F__)
  return (vf)_mm512_fmsub_ps((__m512)a, _mm512_set1_ps(b), _mm512_set1_ps(c));
#else
  return a * b - c;
#endif
}

// (0, 1, ..., kLanes - 1)
static inline vi lanes() {
  vi lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  return lane;
}

// (x[0 ^ step], x[1 ^ step], ...)
static inline vf swap_lanes(vf x, int step) {
#if defined(__clang__)
  vf swapped;
  for (int i = 0; i < kLanes; ++i) swapped[i] = x[i ^ step];
  return swapped;
#else
  return __builtin_shuffle(x, lanes() ^ step);
#endif
}

// sum_i x[i], in a tree
static inline float reduce_sum(vf x) {
  float lanes[kLanes];
  store(lanes, x);
  for (int step = kLanes / 2; step; step /= 2)
    for (int i = 0; i < step; ++i) lanes[i] += lanes[i + step];
  return lanes[0];
}
static inline int32_t reduce_sum(vi x) {
  int32_t sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += x[i];
  return sum;
}

#if defined(__AVX512F__)
// max_i x[i]
static inline float reduce_max(vf x) { return _mm512_reduce_max_ps((__m512)x); }
// Whether some x[i] > limit.
static inline bool any_above(vf x, float limit) {
  return _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(limit), _CMP_GT_OQ);
}
#else
static inline float reduce_max(vf x) {
  float best = x[0];
  for (int i = 1; i < kLanes; ++i) best = maximum(best, (float)x[i]);
  return best;
}
static inline bool any_above(vf x, float limit) { return reduce_max(x) > limit; }
#endif

}  // namespace HIPSERVE_TIER
}  // namespace hipserve
