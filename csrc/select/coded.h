// The search through short codes. The numbers of a code, its integers times its scale, are numbers
// of bfloat16, and their sums of products are exact in float32: codes are expanded to units, a
// batch at a time, and multiplied like stored rows. Few query rows meet the integers themselves
// (few_codes.h). Both are exact, so all tiers choose the same blocks.
#pragma once
#include "codes.h"
#include "select/few_codes.h"
#include "select/summaries.h"

namespace hipserve {
namespace HIPSERVE_TIER {

// Integers 2i and 2i + 1 of a code.
template <int kBits>
static inline void two_integers(const uint8_t* code, int64_t i, int32_t* even, int32_t* odd) {
  if constexpr (kBits == 4) {
    *even = (code[i] & 15) - 8;
    *odd = (code[i] >> 4) - 8;
  } else {
    *even = (int8_t)code[2 * i];
    *odd = (int8_t)code[2 * i + 1];
  }
}

// Units of the n numbers of a code.
template <class Unit, int kBits>
static inline void expand(const uint8_t* code, int64_t n, float scale, float* units) {
  int32_t even, odd;
  for (int64_t i = 0; i < n / 2; ++i) {
    two_integers<kBits>(code, i, &even, &odd);
    const float a = (float)even * scale, b = (float)odd * scale;
    if constexpr (Unit::kValues == 2) {
      const uint32_t low = __builtin_bit_cast(uint32_t, a) >> 16;
      const uint32_t high = __builtin_bit_cast(uint32_t, b) & 0xffff0000;
      units[i] = __builtin_bit_cast(float, low | high);
    } else {
      units[2 * i] = a;
      units[2 * i + 1] = b;
    }
  }
}

template <int kBits, int kParts>
static inline void prefetch(const CodeRow<kBits, kParts>& row, int64_t width) {
  prefetch_row(row.numbers, width * kBits / 8);
  __builtin_prefetch(row.scales, 0, 2);
}
template <int kBits, int kParts>
static inline void to_units(const CodeRow<kBits, kParts>* rows, int count,
                            const CodedColumns<kBits, kParts>& columns, float* scratch,
                            const unit** units) {
  if (columns.few) return;
  const int64_t n = columns.dim, side = columns.side / CodeUnit::kValues;
  for (int j = 0; j < count; ++j) {
    float* out = scratch + j * kParts * side;
    units[j] = out;
    for (int p = 0; p < kParts; ++p, out += side) {
      expand<CodeUnit, kBits>(rows[j].numbers + p * n * kBits / 8, n, to_float(rows[j].scales[p]),
                              out);
      for (int64_t i = n / CodeUnit::kValues; i < side; ++i) out[i] = 0.f;
    }
  }
}

// A sampled row in floats.
static inline void query_floats(const Batch& batch, SampledRows& rows, int64_t r, int64_t shift,
                                float* x) {
  const int n = (int)batch.head_dim;
  switch (batch.dtype) {
    case Dtype::bf16: return to_floats(rows.row<bf16>(r, shift), n, x);
    case Dtype::f16: return to_floats(rows.row<f16>(r, shift), n, x);
    default: return to_floats(rows.row<float>(r, shift), n, x);
  }
}

// Keys in codes, met by the codes of rotated queries.
template <int kBits> class CodedKeys {
 public:
  using Row = CodeRow<kBits, 1>;
  using Queries = CodedColumns<kBits, 1>;
  explicit CodedKeys(const SelectCall& call) : call_(call) {}
  static Queries queries(Arena& arena, int64_t max_rows, int64_t head_dim) {
    return {arena, max_rows, head_dim};
  }
  Row at(const Middle& middle, int64_t key) const {
    return {key_row<uint8_t>(call_.index.codes, middle.seq, middle.kv_head, key),
            key_row<bf16>(call_.index.code_scales, middle.seq, middle.kv_head, key)};
  }
  Row next(const Row& row) const {
    return {row.numbers + call_.index.codes.slot_stride,
            row.scales + call_.index.code_scales.slot_stride};
  }
  void take_queries(SampledRows& rows, int64_t shift, float* convert, const Queries&,
                    Queries& queries) const {
    const int64_t n = call_.batch.head_dim;
    queries.fill(rows.count(), convert, [&](int64_t r, int8_t* numbers) {
      float x[kMaxDim];
      query_floats(call_.batch, rows, r, shift, x);
      const float scale = to_integers(x, n, kTurnedBits) / (float)rotation_size(n);
      rotate(x, n);
      return scale * encode(x, n, kQueryBits, numbers);
    });
  }

 private:
  const SelectCall& call_;
};

// Summaries in codes of 8 bits, met by the codes of queries, as they are and reaching out.
class CodedSummaries {
 public:
  using Row = CodeRow<kSummaryBits, 2>;
  using Queries = CodedColumns<kSummaryBits, 2>;
  explicit CodedSummaries(const DescentCall& call)
      : call_(call), steps_((int)__builtin_nearbyintf(call.bound_reach * kReachSteps)) {}
  static Queries queries(Arena& arena, int64_t max_rows, int64_t head_dim) {
    return {arena, max_rows, head_dim};
  }
  Row at(int64_t page, int64_t run, int64_t head) const {
    return {slot_row<const uint8_t>(call_.index.summaries, page, run, head),
            slot_row<const bf16>(call_.index.summary_scales, page, run, head)};
  }
  void take_queries(SampledRows& rows, int64_t shift, float* convert, const Queries&,
                    Queries& queries) const {
    const int64_t n = call_.batch.head_dim;
    queries.fill(rows.count(), convert, [&](int64_t r, int8_t* numbers) {
      float x[kMaxDim];
      query_floats(call_.batch, rows, r, shift, x);
      const float scale = encode(x, n, kQueryBits, numbers);
      for (int64_t c = 0; c < n; c += kLanes) {
        const vi whole = load_bytes(numbers + c), size = whole < 0 ? -whole : whole;
        const vu reached = (vu)(steps_ * size + kReachSteps / 2) / kReachSteps;
        store_bytes(numbers + n + c, (vi)reached);
      }
      return scale;
    });
  }

 private:
  const DescentCall& call_;
  const int steps_;  // of 1 / kReachSteps that queries reach out
};

}  // namespace HIPSERVE_TIER
}  // namespace hipserve
