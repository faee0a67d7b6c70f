// Products of a tile with few query rows (decode): keys and values are used where they lie, and the
// rows of the next tile are asked for meanwhile, a few at a time.
#pragma once
#include "pack.h"
#include "pages.h"
#include "rows.h"

namespace hipserve {
namespace HIPSERVE_TIER {

constexpr int64_t kFewRows = 8;

// Whether so many rows of `dim` values take this way.
static inline bool few_rows(int64_t rows, int64_t dim) { return rows <= kFewRows && dim % 64 == 0; }

// (sum x[0], ..., sum x[kLanes - 1]), the sums over the lanes of as many vectors
#if defined(__AVX512F__)
static inline vf lane_sums(const vf* x) {
  __m512 t[8], u[4], w[2];
  for (int i = 0; i < 8; ++i) {
    const __m512 a = (__m512)x[2 * i], b = (__m512)x[2 * i + 1];
    t[i] = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  }
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
#elif defined(__AVX2__)
static inline vf lane_sums(const vf* x) {
  __m256 pairs[4], halves[2];
  for (int i = 0; i < 4; ++i) pairs[i] = _mm256_hadd_ps((__m256)x[2 * i], (__m256)x[2 * i + 1]);
  for (int i = 0; i < 2; ++i) halves[i] = _mm256_hadd_ps(pairs[2 * i], pairs[2 * i + 1]);
  return (vf)_mm256_add_ps(_mm256_permute2f128_ps(halves[0], halves[1], 0x20),
                           _mm256_permute2f128_ps(halves[0], halves[1], 0x31));
}
#else
static inline vf lane_sums(const vf* x) {
  vf sums;
  for (int i = 0; i < kLanes; ++i) sums[i] = reduce_sum(x[i]);
  return sums;
}
#endif

// kLanes units of a key stored as K, from the c-th on.
template <class Unit, class K> static inline vf key_units(const void* key, int64_t c) {
  if constexpr (Unit::kValues == 1) return load_floats((const K*)key + c);
  else return load((const float*)key + c);
}

// scores[row][key] = q_row . k_key for kM rows of `depth` units and `count` keys stored as K, of
// which a multiple of 8 can be read.
template <class Unit, class K, int kM>
static void score_few(const float* q, const void* const* keys, int count, int64_t depth,
                      float* scores, const TileRows& next) {
  constexpr int kN = kM <= kLanes / 8   ? 8
                     : kM <= kLanes / 4 ? 4
                     : kM <= kLanes / 2 ? 2
                                        : 1;  // keys at a time
  constexpr int kSums = round_up(kM * kN, kLanes);
  for (int j = 0; j < count; j += kN) {
    vf acc[kSums] = {};
    for (int n = 0; n < kN; ++n)
      if (j + n < next.count) prefetch_row(next.row[j + n], depth * Unit::kValues * sizeof(K));
    for (int64_t c = 0; c < depth; c += kLanes) {
      vf key[kN];
      for (int n = 0; n < kN; ++n) key[n] = key_units<Unit, K>(keys[j + n], c);
      for (int r = 0; r < kM; ++r) {
        const vf row = load(q + r * depth + c);
        for (int n = 0; n < kN; ++n) acc[r * kN + n] = Unit::madd(acc[r * kN + n], row, key[n]);
      }
    }
    float out[kSums];
    for (int i = 0; i < kSums; i += kLanes) store(out + i, lane_sums(acc + i));
    for (int r = 0; r < kM; ++r)
      for (int n = 0; n < kN; ++n) scores[r * kKeys + j + n] = out[r * kN + n];
  }
}

// Columns of the value rows that a unit of weights meets, a vector for each of its values.
template <class Unit, class V> struct ValueUnits {
  void of(const TileRows& values, int p, int64_t c, vf* units) const {
    units[0] = load_floats((const V*)values.row[p] + c);
  }
};
#if defined(__AVX512BF16__)
template <> struct ValueUnits<Pair, bf16> {
  ColumnPairs pair;
  void of(const TileRows& values, int p, int64_t c, vf* units) const {
    pair.of((const uint16_t*)values.row[2 * p] + c, (const uint16_t*)values.row[2 * p + 1] + c,
            units);
  }
};
#endif

// out[row] += sum_key weights[row][key] * values[key], for kM rows and `count` units of keys whose
// values are stored as V.
template <class Unit, class V, int kM>
static void add_few(const float* weights, const TileRows& values, int count, int64_t dim,
                    float* out, const TileRows& next) {
  constexpr int kVectors = kM <= kLanes / 4 ? 4 : kM <= kLanes / 2 ? 2 : 1;  // of columns
  static_assert(kVectors % Unit::kValues == 0);
  const ValueUnits<Unit, V> units;
  for (int64_t c = 0; c < dim; c += kVectors * kLanes) {
    vf acc[kM][kVectors];
    for (int r = 0; r < kM; ++r)
      for (int n = 0; n < kVectors; ++n) acc[r][n] = load(out + r * dim + c + n * kLanes);
    for (int p = 0; p < count; ++p) {
      vf column[kVectors];
      for (int n = 0; n < kVectors; n += Unit::kValues)
        units.of(values, p, c + n * kLanes, column + n);
      if (c == 0)
        for (int j = p * Unit::kValues; j < (p + 1) * Unit::kValues; ++j)
          if (j < next.count) prefetch_row(next.row[j], dim * sizeof(V));
      for (int r = 0; r < kM; ++r) {
        const float weight = weights[r * (kKeys / Unit::kValues) + p];
        for (int n = 0; n < kVectors; ++n) acc[r][n] = Unit::madd(acc[r][n], weight, column[n]);
      }
    }
    for (int r = 0; r < kM; ++r)
      for (int n = 0; n < kVectors; ++n) store(out + r * dim + c + n * kLanes, acc[r][n]);
  }
}

}  // namespace HIPSERVE_TIER
}  // namespace hipserve
