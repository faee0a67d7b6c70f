// Storage types of queries, keys and values: how a number in memory becomes a float and back.
#pragma once
#include "simd.h"

namespace hipserve {
namespace HIPSERVE_TIER {

struct bf16 {
  uint16_t bits;
};
#if defined(__aarch64__)
using half = __fp16;  // gcc has _Float16 there from 13 on
#else
using half = _Float16;
#endif
struct f16 {
  half value;
};

static inline float to_float(bf16 x) {
  uint32_t bits = (uint32_t)x.bits << 16;
  float y;
  memcpy(&y, &bits, 4);
  return y;
}
static inline float to_float(f16 x) { return (float)x.value; }
static inline float to_float(float x) { return x; }

// The nearest stored number; ties go to the even one, NaN stays NaN.
static inline void from_float(float y, float* x) { *x = y; }
static inline void from_float(float y, f16* x) { x->value = (half)y; }
static inline void from_float(float y, bf16* x) {
  uint32_t bits;
  memcpy(&bits, &y, 4);
  bool nan = (bits & 0x7fffffff) > 0x7f800000;
  x->bits = nan ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

// y[i] = x[i] for i < n
template <class T> static inline void to_floats(const T* x, int n, float* y) {
  for (int i = 0; i < n; ++i) y[i] = to_float(x[i]);
}

// A vector of stored numbers, and back.
template <class T> static inline vf load_floats(const T* x) {
  float y[kLanes];
  to_floats(x, kLanes, y);
  return load(y);
}
template <class T> static inline void store_floats(vf y, T* x) {
  for (int i = 0; i < kLanes; ++i) from_float(y[i], x + i);
}
typedef uint16_t vhalves __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));
static inline vf load_floats(const bf16* x) {
  return (vf)(__builtin_convertvector(*(const vhalves*)x, vu) << 16);
}
static inline void store_floats(vf y, bf16* x) {
#if defined(__AVX512BF16__)
  _mm256_storeu_si256((__m256i*)x, (__m256i)_mm512_cvtneps_pbh((__m512)y));
#else
  const vu bits = (vu)y, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const vu stored = (bits & 0x7fffffff) > 0x7f800000 ? vu{} + 0x7fc0 : rounded;
  *(vhalves*)x = __builtin_convertvector(stored, vhalves);
#endif
}
#if defined(__AVX512F__)
static inline vf load_floats(const f16* x) {
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)x));
}
#elif defined(__F16C__)
static inline vf load_floats(const f16* x) {
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)x));
}
#endif
static inline vf load_floats(const float* x) { return load(x); }
static inline void store_floats(vf y, float* x) { store(x, y); }

// The nearest numbers that are stored as T.
template <class T> static inline vf rounded(vf y) {
  T stored[kLanes];
  store_floats(y, stored);
  return load_floats(stored);
}
template <> inline vf rounded<float>(vf y) { return y; }

// An integer that orders as the number of which it has the bits; its own inverse.
template <class Bits> static inline Bits ordered(Bits x) {
  return x ^ (x >> (8 * sizeof(Bits) - 1) & (Bits)(~0ull >> (65 - 8 * sizeof(Bits))));
}

}  // namespace HIPSERVE_TIER
}  // namespace hipserve
