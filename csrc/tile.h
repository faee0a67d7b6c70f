// Tiles of keys and the small matrix products over them, in vector extensions. Everything here
// is static: each tier compiles its own copy, and no symbol of one ISA can replace another's.
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "kernels.h"

namespace hipserve {
namespace HIPSERVE_TIER {

#if defined(__AVX512F__)
constexpr int kLanes = 16, kColumns = 4;
#elif defined(__AVX2__)
constexpr int kLanes = 8, kColumns = 2;
#else
constexpr int kLanes = 4, kColumns = 2;
#endif
constexpr int kRows = 6;        // rows of a register tile
#if defined(__AMX_BF16__)
constexpr int kKeys = 128;      // keys of a tile
#else
constexpr int kKeys = 64;
#endif
constexpr int kMaxDim = 512;

typedef float unit __attribute__((aligned(2), may_alias));  // 32 bits of a row in memory
typedef float vf __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));

template <class A> static constexpr A least(A a, A b) { return a < b ? a : b; }
template <class A> static constexpr A most(A a, A b) { return a > b ? a : b; }

static inline vf splat(float x) { return vf{} + x; }
static inline vf load(const float* p) { return *(const vf*)p; }
static inline void store(float* p, vf x) { *(vf*)p = x; }
static inline vf maximum(vf a, vf b) { return a > b ? a : b; }

static inline float reduce_max(vf x) {
  float best = x[0];
  for (int i = 1; i < kLanes; ++i) best = most(best, x[i]);
  return best;
}
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
static inline float fast_max(vf x) { return _mm512_reduce_max_ps((__m512)x); }
static inline bool any_above(vf x, float limit) {
  return _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(limit), _CMP_GT_OQ);
}
#else
static inline float fast_max(vf x) { return reduce_max(x); }
static inline bool any_above(vf x, float limit) { return reduce_max(x) > limit; }
#endif
static inline vi lanes() {
  vi lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  return lane;
}

// 2^x for x <= 126; a polynomial on [-1/2, 1/2], exact to 1e-7 (degree 6) or 4e-5 (degree 4, enough
// where the weight is rounded to bfloat16).
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

// An integer that orders as the float of which it has the bits; its own inverse.
template <class Bits> static inline Bits ordered(Bits x) {
  return x ^ (x >> (8 * sizeof(Bits) - 1) & (Bits)(~0ull >> (65 - 8 * sizeof(Bits))));
}

// Storage types.

struct bf16 { uint16_t bits; };
#if defined(__aarch64__)
using half = __fp16;  // gcc has _Float16 there from 13 on
#else
using half = _Float16;
#endif
struct f16 { half value; };

static inline float to_float(bf16 x) {
  uint32_t bits = (uint32_t)x.bits << 16;
  float y;
  memcpy(&y, &bits, 4);
  return y;
}
static inline float to_float(f16 x) { return (float)x.value; }
static inline float to_float(float x) { return x; }
static inline void from_float(float y, float* x) { *x = y; }
static inline void from_float(float y, f16* x) { x->value = (half)y; }
static inline void from_float(float y, bf16* x) {
  uint32_t bits;
  memcpy(&bits, &y, 4);
  bool nan = (bits & 0x7fffffff) > 0x7f800000;
  x->bits = nan ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}
template <class T> static inline void convert(const T* x, int n, float* y) {
  for (int i = 0; i < n; ++i) y[i] = to_float(x[i]);
}

// A unit is 32 bits wide and holds one or two values along the axis that a product sums over:
// one float, or a pair of bfloat16 for vdpbf16ps. All tiles are arrays of units.

struct Single {
  static constexpr int kValues = 1, kDegree = 6;
  static inline vf madd(vf acc, float a, vf b) { return acc + a * b; }
};
#if defined(__AVX512BF16__)
struct Pair {
  static constexpr int kValues = 2, kDegree = 4;
  static inline vf madd(vf acc, float a, vf b) {
    __m512bh pair = (__m512bh)_mm512_castps_si512(_mm512_set1_ps(a));
    return (vf)_mm512_dpbf16_ps((__m512)acc, pair, (__m512bh)b);
  }
};
using BfUnit = Pair;
#else
using BfUnit = Single;
#endif

// acc[r][c] += sum_k a_r[k] * b[k][c], with rows a_r wherever they lie and kN vectors of columns.
template <class Unit, int kM, int kN>
static inline void product(const unit* const* rows, const float* b, int64_t ldb, int depth,
                           vf acc[kM][kN]) {
  const unit* a[kM];
  for (int r = 0; r < kM; ++r) a[r] = rows[r];
  for (int k = 0; k < depth; ++k) {
    vf column[kN];
    for (int c = 0; c < kN; ++c) column[c] = load(b + k * ldb + c * kLanes);
    for (int r = 0; r < kM; ++r)
      for (int c = 0; c < kN; ++c) acc[r][c] = Unit::madd(acc[r][c], a[r][k], column[c]);
  }
}
template <class Unit, int kM, int kN>
static inline void product(const float* a, int64_t lda, const float* b, int64_t ldb, int depth,
                           vf acc[kM][kN]) {
  const unit* rows[kM];
  for (int r = 0; r < kM; ++r) rows[r] = a + r * lda;
  product<Unit, kM, kN>(rows, b, ldb, depth, acc);
}

// Queries: one row of units.

template <class Unit, class T> static inline void pack_row(const T* x, int n, float* units) {
  convert(x, n, units);
}
#if defined(__AVX512BF16__)
template <> inline void pack_row<Pair, bf16>(const bf16* x, int n, float* units) {
  memcpy(units, x, n * 2);
}
#endif

// Products of these units are on tile registers (amx.h), unless query rows are few.
#if defined(__AMX_BF16__)
template <class Unit> constexpr bool kTiled = Unit::kValues == 2;
#else
template <class Unit> constexpr bool kTiled = false;
#endif

// Keys: rows become columns, units[k][key].

#if defined(__AVX512F__)
static inline void transpose16(const float* const* rows, int offset, float* out) {
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
static inline void transpose(const float* const* rows, int count, int depth, float* units) {
  int k = 0;
  for (; k + 16 <= depth; k += 16)
    for (int j = 0; j < count; j += 16) transpose16(rows + j, k, units + k * kKeys + j);
  for (; k < depth; ++k)
    for (int j = 0; j < count; ++j) units[k * kKeys + j] = rows[j][k];
}
#else
static inline void transpose(const float* const* rows, int count, int depth, float* units) {
  for (int j = 0; j < count; ++j)
    for (int k = 0; k < depth; ++k) units[k * kKeys + j] = rows[j][k];
}
#endif

// Rows of a tile: `row[j]` for j < count; the rest of the last 32 points at zeros.
struct TileRows {
  const void* row[kKeys];
  int count;
};

template <class Unit, class T> struct KeyTile {
  static void pack(const TileRows& tile, int n, float* units, float* scratch) {
    const float* rows[kKeys];
    int padded = (tile.count + 15) / 16 * 16;
    for (int j = 0; j < padded; ++j) {
      convert((const T*)tile.row[j], n, scratch + j * n);
      rows[j] = scratch + j * n;
    }
    transpose(rows, padded, n, units);
  }
};
template <> struct KeyTile<Single, float> {
  static void pack(const TileRows& tile, int n, float* units, float*) {
    transpose((const float* const*)tile.row, (tile.count + 15) / 16 * 16, n, units);
  }
};
#if defined(__AVX512BF16__)
template <> struct KeyTile<Pair, bf16> {
  static void pack(const TileRows& tile, int n, float* units, float*) {
    transpose((const float* const*)tile.row, (tile.count + 15) / 16 * 16, n / 2, units);
  }
};
#endif

// Rows as units, where they lie or converted.
template <class Unit, class T>
static inline void unit_rows(const T* const* rows, int count, int n, float* scratch,
                             const unit** units) {
  for (int j = 0; j < count; ++j) {
    convert(rows[j], n, scratch + j * n);
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

// Values: units[key / kValues][column].

template <class Unit, class T> struct ValueTile {
  static void pack(const TileRows& tile, int n, float* units) {
    for (int j = 0; j < tile.count; ++j) convert((const T*)tile.row[j], n, units + j * n);
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

// Weights of one row, `n` of them (a multiple of kLanes), as units.
template <class Unit> static inline void pack_weights(const vf* p, int vectors, float* units) {
  for (int i = 0; i < vectors; ++i) store(units + i * kLanes, p[i]);
}
#if defined(__AVX512BF16__)
template <> inline void pack_weights<Pair>(const vf* p, int vectors, float* units) {
  for (int i = 0; i < vectors; i += 2)
    _mm512_storeu_si512(units + i * 8,
                        (__m512i)_mm512_cvtne2ps_pbh((__m512)p[i + 1], (__m512)p[i]));
}
#endif

// The pages of a sequence, and where a position is in them.
struct Sequence {
  const int32_t* pages;
  int64_t page_size;
  int shift = 0;  // of a page size that is a power of two
  Sequence(const Batch& batch, int32_t seq)
      : pages(batch.block_table + seq * batch.table_stride), page_size(batch.page_size) {
    while (shift < 62 && (int64_t)1 << shift < page_size) ++shift;
    if ((int64_t)1 << shift != page_size) shift = -1;
  }
  int64_t page(int64_t key) const { return pages[shift >= 0 ? key >> shift : key / page_size]; }
  int64_t slot(int64_t key) const { return shift >= 0 ? key & (page_size - 1) : key % page_size; }
};

template <class T>
static inline const T* key_row(const Pages& pages, const Sequence& seq, int64_t head, int64_t key) {
  return (const T*)pages.data + seq.page(key) * pages.page_stride +
         seq.slot(key) * pages.slot_stride + head * pages.head_stride;
}

// Asks for a row that will be read soon; into the second cache, where many fit. The empty statement
// keeps gcc from taking a function that only prefetches for one that does nothing.
static inline void prefetch_row(const void* row, size_t bytes) {
  asm volatile("");
  for (size_t i = 0; i < bytes; i += 64) __builtin_prefetch((const char*)row + i, 0, 2);
}

alignas(64) static const float kZeros[2 * kMaxDim] = {};

static inline void pad(TileRows& tile) {
  for (int j = tile.count; j < (tile.count + 31) / 32 * 32; ++j) tile.row[j] = kZeros;
}

constexpr int64_t kCoarseRatio = 16;  // as in plan/runs.py
// Bound levels, fine runs first, as bound_levels in plan/runs.py: the number of runs of a page tells
// whether there is a coarse level.
struct BoundLevels {
  int64_t count = 0, length[2], offset[3] = {0};
  BoundLevels(int64_t page_size, int64_t bound_block_size, int64_t num_runs) {
    int64_t ratio = kCoarseRatio, fine = bound_block_size;
    while (ratio > 1 && ratio * fine > page_size) ratio /= 2;
    const bool fine_only = num_runs == (page_size + fine - 1) / fine;
    add(fine, page_size);
    if (ratio * 4 >= kCoarseRatio && !fine_only) add(ratio * fine, page_size);
  }
  int64_t ratio() const { return length[count - 1] / length[0]; }

 private:
  void add(int64_t size, int64_t page_size) {
    length[count++] = size;
    offset[count] = offset[count - 1] + (page_size + size - 1) / size;
  }
};

// Scratch of one thread, cut into aligned pieces.
struct Arena {
  char *base, *next;
  explicit Arena(size_t bytes) {
    void* p = nullptr;
    if (posix_memalign(&p, 64, bytes)) abort();
    base = next = (char*)p;
  }
  ~Arena() { free(base); }
  template <class A> A* take(size_t count) {
    A* piece = (A*)next;
    next += (count * sizeof(A) + 63) / 64 * 64;
    return piece;
  }
};
static inline size_t room(size_t count, size_t size) { return (count * size + 63) / 64 * 64; }

}  // namespace HIPSERVE_TIER
}  // namespace hipserve
