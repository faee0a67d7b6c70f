// The small matrix product over units. A unit is 32 bits wide and holds one or two values along the
// axis that a product sums over: one float, or a pair of bfloat16 for vdpbf16ps.
#pragma once
#include "storage.h"

namespace hipserve {
namespace HIPSERVE_TIER {

#if defined(__AVX512F__)
constexpr int kColumns = 4;  // vectors of columns of a register tile
#else
constexpr int kColumns = 2;
#endif
constexpr int kRows = 6;  // rows of a register tile
#if defined(__AMX_BF16__)
constexpr int kKeys = 128;  // keys of a tile
#else
constexpr int kKeys = 64;
#endif
constexpr int kMaxDim = 512;

typedef float unit __attribute__((aligned(2), may_alias));  // a unit of a row in memory

struct Single {
  static constexpr int kValues = 1, kExpDegree = 6;
  // acc + a b
  static inline vf madd(vf acc, float a, vf b) { return acc + a * b; }
  static inline vf madd(vf acc, vf a, vf b) { return acc + a * b; }
};
#if defined(__AVX512BF16__)
struct Pair {
  static constexpr int kValues = 2, kExpDegree = 4;
  // acc + a[0] b[0] + a[1] b[1]
  static inline vf madd(vf acc, vf a, vf b) {
    return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
  }
  static inline vf madd(vf acc, float a, vf b) { return madd(acc, (vf)_mm512_set1_ps(a), b); }
};
#endif

// The unit in which queries stored as Q meet keys stored as K.
template <class Q, class K> struct UnitOf {
  using type = Single;
};
#if defined(__AVX512BF16__)
template <> struct UnitOf<bf16, bf16> {
  using type = Pair;
};
#endif

// The i-th value of each unit.
template <class Unit> static inline vf value_of(vf units, uint32_t i) {
  if constexpr (Unit::kValues == 1) return units;
  else return (vf)((vu)units << 16 * (1 - i) & 0xffff0000);
}
// Units of which value(i) gives the i-th values; they become numbers that are stored as Q.
template <class Unit, class Q, class Value> static inline vf units_of(const Value& value) {
  if constexpr (Unit::kValues == 1) return rounded<Q>(value(0));
#if defined(__AVX512BF16__)
  else {  // values of one kind, then those of the other, become neighbours
    const vi low = lanes(), both = low | (low + kLanes) << 16;
    const __m512bh apart = _mm512_cvtne2ps_pbh((__m512)value(1), (__m512)value(0));
    return (vf)_mm512_permutexvar_epi16((__m512i)both, (__m512i)apart);
  }
#endif
}

// Whether products of these units are on tile registers (amx.h), unless query rows are few.
#if defined(__AMX_BF16__)
template <class Unit> constexpr bool kTiled = Unit::kValues == 2;
#else
template <class Unit> constexpr bool kTiled = false;
#endif

// acc[r][c] += sum_k a_r[k] * b[k][c], with rows a_r wherever they lie and kN vectors of columns.
// What may alias memory is copied: sums stay in registers then, in a call of its own too.
template <class Unit, int kM, int kN>
static inline void product(const unit* const* rows, const float* b, int64_t ldb, int depth,
                           vf acc[kM][kN]) {
  const unit* a[kM];
  vf sum[kM][kN];
  for (int r = 0; r < kM; ++r) a[r] = rows[r];
  for (int r = 0; r < kM; ++r)
    for (int c = 0; c < kN; ++c) sum[r][c] = acc[r][c];
  for (int k = 0; k < depth; ++k) {
    vf column[kN];
    for (int c = 0; c < kN; ++c) column[c] = load(b + k * ldb + c * kLanes);
    for (int r = 0; r < kM; ++r)
      for (int c = 0; c < kN; ++c) sum[r][c] = Unit::madd(sum[r][c], a[r][k], column[c]);
  }
  for (int r = 0; r < kM; ++r)
    for (int c = 0; c < kN; ++c) acc[r][c] = sum[r][c];
}

// The same with rows that are `lda` units apart.
template <class Unit, int kM, int kN>
static inline void product(const float* a, int64_t lda, const float* b, int64_t ldb, int depth,
                           vf acc[kM][kN]) {
  const unit* rows[kM];
  for (int r = 0; r < kM; ++r) rows[r] = a + r * lda;
  product<Unit, kM, kN>(rows, b, ldb, depth, acc);
}

}  // namespace HIPSERVE_TIER
}  // namespace hipserve
