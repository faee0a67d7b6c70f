// Rows in memory become the operands of a product: queries as rows of units, keys as columns,
// values as rows of units that sum over keys.
#pragma once
#include "product.h"

namespace hipserve {
namespace HIPSERVE_TIER {

constexpr int kTogether = 32;  // unused rows of a tile that may be read fill up so many

alignas(64) static const float kZeros[2 * kMaxDim] = {};

// Rows of a tile: `row[j]` for j < count; those that fill up the last 32 point at zeros.
struct TileRows {
  const void* row[kKeys];
  int count;
  void fill_up() {
    for (int j = count; j < round_up(count, kTogether); ++j) row[j] = kZeros;
  }
};

// Queries: units[k] of one row of n values.

template <class Unit, class Q> static inline void pack_row(const Q* x, int n, float* units) {
  to_floats(x, n, units);
}
#if defined(__AVX512BF16__)
template <> inline void pack_row<Pair, bf16>(const bf16* x, int n, float* units) {
  memcpy(units, x, n * 2);
}
#endif

// Keys: rows become columns, units[k][key].

// out[k][i] = rows[i][offset + k] for kLanes rows and k < kLanes
#if defined(__AVX512F__)
static inline void transpose_square(const unit* const* rows, int offset, float* out) {
  __m512i r[16], t[16];
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(rows[i] + offset);
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    _mm512_storeu_si512(out + (i)*kKeys, _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88));
    _mm512_storeu_si512(out + (i + 8) * kKeys, _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd));
    _mm512_storeu_si512(out + (i + 4) * kKeys, _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88));
    _mm512_storeu_si512(out + (i + 12) * kKeys, _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd));
  }
}
#elif defined(__AVX2__)
static inline void transpose_square(const unit* const* rows, int offset, float* out) {
  __m256 r[8], t[8];
  for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(rows[i] + offset);
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; ++j) {
      r[i + 2 * j] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0x44);
      r[i + 2 * j + 1] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0xee);
    }
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(out + i * kKeys, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
    _mm256_storeu_ps(out + (i + 4) * kKeys, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
  }
}
#endif

// units[k][j] = rows[j][k] for j < count, a multiple of 16, and k < depth
static inline void transpose(const unit* const* rows, int count, int depth, float* units) {
  int k = 0;
#if defined(__AVX2__)
  for (; k + kLanes <= depth; k += kLanes)
    for (int j = 0; j < count; j += kLanes) transpose_square(rows + j, k, units + k * kKeys + j);
#endif
  for (; k < depth; ++k)
    for (int j = 0; j < count; ++j) units[k * kKeys + j] = rows[j][k];
}

// Packs rows of n values stored as K; `scratch` holds kKeys * n floats for those to be converted.
template <class Unit, class K> struct KeyTile {
  static void pack(const TileRows& tile, int n, float* units, float* scratch) {
    const unit* rows[kKeys];
    const int padded = round_up(tile.count, 16);
    for (int j = 0; j < padded; ++j) {
      to_floats((const K*)tile.row[j], n, scratch + j * n);
      rows[j] = scratch + j * n;
    }
    transpose(rows, padded, n, units);
  }
};
template <> struct KeyTile<Single, float> {
  static void pack(const TileRows& tile, int n, float* units, float*) {
    transpose((const unit* const*)tile.row, round_up(tile.count, 16), n, units);
  }
};
#if defined(__AVX512BF16__)
template <> struct KeyTile<Pair, bf16> {
  static void pack(const TileRows& tile, int n, float* units, float*) {
    transpose((const unit* const*)tile.row, round_up(tile.count, 16), n / 2, units);
  }
};
#endif

// Keys that are scored where they lie: units[j] points at row j, or at its copy in `scratch`.
template <class Unit, class K>
static inline void unit_rows(const K* const* rows, int count, int n, float* scratch,
                             const unit** units) {
  for (int j = 0; j < count; ++j) {
    to_floats(rows[j], n, scratch + j * n);
    units[j] = scratch + j * n;
  }
}
template <>
inline void unit_rows<Single, float>(const float* const* rows, int count, int, float*,
                                     const unit** units) {
  for (int j = 0; j < count; ++j) units[j] = rows[j];
}
#if defined(__AVX512BF16__)
template <>
inline void unit_rows<Pair, bf16>(const bf16* const* rows, int count, int, float*,
                                  const unit** units) {
  for (int j = 0; j < count; ++j) units[j] = (const unit*)rows[j];
}
#endif

// Values: units[key / kValues][column] of rows of n values.

template <class Unit, class V> struct ValueTile {
  static void pack(const TileRows& tile, int n, float* units) {
    for (int j = 0; j < tile.count; ++j) to_floats((const V*)tile.row[j], n, units + j * n);
  }
};
#if defined(__AVX512BF16__)
// Columns of two rows in turn: column c of both is unit c.
struct ColumnPairs {
  __m512i low, high;
  ColumnPairs() {
    uint16_t order[64];
    for (int i = 0; i < 64; ++i) order[i] = i / 2 + i % 2 * 32;
    low = _mm512_loadu_si512(order);
    high = _mm512_loadu_si512(order + 32);
  }
  // Units of 32 columns, in two vectors.
  void of(const uint16_t* even, const uint16_t* odd, vf units[2]) const {
    const __m512i a = _mm512_loadu_si512(even), b = _mm512_loadu_si512(odd);
    units[0] = (vf)_mm512_permutex2var_epi16(a, low, b);
    units[1] = (vf)_mm512_permutex2var_epi16(a, high, b);
  }
};
template <> struct ValueTile<Pair, bf16> {
  static void pack(const TileRows& tile, int n, float* units) {
    const ColumnPairs pair;
    for (int j = 0; j < tile.count; j += 2) {
      const uint16_t* even = (const uint16_t*)tile.row[j];
      const uint16_t* odd = (const uint16_t*)tile.row[j + 1];
      float* out = units + (j / 2) * n;
      int c = 0;
      for (; c + 32 <= n; c += 32) {
        vf both[2];
        pair.of(even + c, odd + c, both);
        store(out + c, both[0]);
        store(out + c + kLanes, both[1]);
      }
      for (; c < n; ++c) {
        uint32_t bits = even[c] | (uint32_t)odd[c] << 16;
        memcpy(out + c, &bits, 4);
      }
    }
  }
};
#endif

// Weights of one row, `vectors` vectors of them, as units.
template <class Unit> static inline void pack_weights(const vf* p, int vectors, float* units) {
  for (int i = 0; i < vectors; ++i) store(units + i * kLanes, p[i]);
}
#if defined(__AVX512BF16__)
template <> inline void pack_weights<Pair>(const vf* p, int vectors, float* units) {
  for (int i = 0; i < vectors; i += 2) {
    const __m512 low = (__m512)p[i], high = (__m512)p[i + 1];
    _mm512_storeu_si512(units + i * 8, (__m512i)_mm512_cvtne2ps_pbh(high, low));
  }
}
#endif

}  // namespace HIPSERVE_TIER
}  // namespace hipserve
