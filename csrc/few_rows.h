// Products of a tile with few query rows (decode): keys and values are used where they lie, and the
// rows of the next tile are asked for meanwhile, a few at a time. Only for bfloat16 pairs: other
// tiers pack tiles for few rows too.
#pragma once
#include "pack.h"
#include "pages.h"
#include "rows.h"

namespace hipserve {
namespace HIPSERVE_TIER {

constexpr int64_t kFewRows = 8;

// Whether so many rows of `dim` values take this way.
template <class Unit> static inline bool few_rows(int64_t rows, int64_t dim) {
  return Unit::kValues == 2 && rows <= kFewRows && dim % 64 == 0;
}

#if defined(__AVX512BF16__)
// (sum x[0], ..., sum x[15]), the sums over the lanes of sixteen vectors
static inline vf lane_sums(__m512 x[16]) {
  __m512 t[8], u[4], w[2];
  for (int i = 0; i < 8; ++i)
    t[i] = _mm512_add_ps(_mm512_unpacklo_ps(x[2 * i], x[2 * i + 1]),
                         _mm512_unpackhi_ps(x[2 * i], x[2 * i + 1]));
  for (int i = 0; i < 4; ++i) {
    __m512d a = _mm512_castps_pd(t[2 * i]), b = _mm512_castps_pd(t[2 * i + 1]);
    u[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)),
                         _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  for (int i = 0; i < 2; ++i)
    w[i] = _mm512_add_ps(_mm512_shuffle_f32x4(u[2 * i], u[2 * i + 1], 0x88),
                         _mm512_shuffle_f32x4(u[2 * i], u[2 * i + 1], 0xdd));
  return (vf)_mm512_add_ps(_mm512_shuffle_f32x4(w[0], w[1], 0x88),
                           _mm512_shuffle_f32x4(w[0], w[1], 0xdd));
}

// scores[row][key] = q_row . k_key for kM rows and `count` keys, of which a multiple of 8 can be
// read.
template <int kM>
static void score_few(const float* q, const void* const* keys, int count, int64_t dim,
                      float* scores, const TileRows& next) {
  constexpr int kN = kM <= 2 ? 8 : kM <= 4 ? 4 : 2;  // keys at a time
  const int64_t depth = dim / 2;
  for (int j = 0; j < count; j += kN) {
    const float* key[kN];
    __m512 acc[16];
    for (int i = 0; i < 16; ++i) acc[i] = _mm512_setzero_ps();
    for (int n = 0; n < kN; ++n) {
      key[n] = (const float*)keys[j + n];
      if (j + n < next.count) prefetch_row(next.row[j + n], dim * 2);
    }
    for (int64_t c = 0; c < depth; c += kLanes)
      for (int r = 0; r < kM; ++r) {
        const __m512bh row = (__m512bh)load(q + r * depth + c);
        for (int n = 0; n < kN; ++n)
          acc[r * kN + n] = _mm512_dpbf16_ps(acc[r * kN + n], row, (__m512bh)load(key[n] + c));
      }
    float out[16];
    store(out, lane_sums(acc));
    for (int r = 0; r < kM; ++r)
      for (int n = 0; n < kN; ++n) scores[r * kKeys + j + n] = out[r * kN + n];
  }
}

// out[row] += sum_key weights[row][key] * values[key], for kM rows and `pairs` pairs of keys.
template <int kM>
static void add_few(const float* weights, const TileRows& values, int pairs, int64_t dim,
                    float* out, const TileRows& next) {
  constexpr int kN = kM <= 4 ? 2 : 1;  // stretches of 32 columns at a time
  const ColumnPairs pair;
  for (int64_t c = 0; c < dim; c += 32 * kN) {
    vf acc[kM][2 * kN];
    for (int r = 0; r < kM; ++r)
      for (int n = 0; n < 2 * kN; ++n) acc[r][n] = load(out + r * dim + c + n * kLanes);
    for (int p = 0; p < pairs; ++p) {
      vf column[2 * kN];
      for (int n = 0; n < kN; ++n)
        pair.of((const uint16_t*)values.row[2 * p] + c + 32 * n,
                (const uint16_t*)values.row[2 * p + 1] + c + 32 * n, column + 2 * n);
      if (c == 0 && 2 * p + 1 < next.count) {
        prefetch_row(next.row[2 * p], dim * 2);
        prefetch_row(next.row[2 * p + 1], dim * 2);
      }
      for (int r = 0; r < kM; ++r)
        for (int n = 0; n < 2 * kN; ++n)
          acc[r][n] = Pair::madd(acc[r][n], weights[r * (kKeys / 2) + p], column[n]);
    }
    for (int r = 0; r < kM; ++r)
      for (int n = 0; n < 2 * kN; ++n) store(out + r * dim + c + n * kLanes, acc[r][n]);
  }
}
#endif

}  // namespace HIPSERVE_TIER
}  // namespace hipserve
