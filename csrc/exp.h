// Exponentials of vectors.
#pragma once
#include "simd.h"

namespace hipserve {
namespace HIPSERVE_TIER {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// 2^x = 2^round(x) * p(x - round(x)) for x <= 126, with a polynomial p on [-1/2, 1/2] that is exact
// to 1e-7 (degree 6) or 4e-5 (degree 4, enough where the weight is rounded to bfloat16).
template <int kDegree> static inline vf exp2v(vf x) {
#if defined(__AVX512F__)
  vf whole = (vf)_mm512_roundscale_ps((__m512)x, 8);
#else
  x = maximum(x, splat(-126.f));
  vf whole = (x + 12582912.f) - 12582912.f;
#endif
  vf r = x - whole;
  vf p = splat(9.6181291e-3f);
  if (kDegree == 6) {
    p = splat(1.5403530e-4f);
    p = p * r + 1.3333558e-3f;
    p = p * r + 9.6181291e-3f;
  }
  p = p * r + 5.5504109e-2f;
  p = p * r + 2.4022651e-1f;
  p = p * r + 6.9314718e-1f;
  p = p * r + 1.f;
#if defined(__AVX512F__)
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)whole);
#else
  vi exponent = (__builtin_convertvector(whole, vi) + 127) << 23;
  return p * (vf)exponent;
#endif
}

// c * tanh(x * scale / c) * log2(e), the soft cap in units of log 2. tanh comes from e^-2|y|, which
// never overflows.
static inline vf soft_cap(vf x, float scale, float cap) {
  vf y = x * (scale / cap);
  vf size = y < 0.f ? -y : y;
  vf e = exp2v<6>(size * (-2.f * kLog2e));
  vf t = (1.f - e) / (1.f + e);
  return (y < 0.f ? -t : t) * (cap * kLog2e);
}

}  // namespace HIPSERVE_TIER
}  // namespace hipserve
