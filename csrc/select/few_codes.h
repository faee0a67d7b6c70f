// Rows in codes, and the codes of queries that meet them; few query rows (decode) as integers.
#pragma once
#include "select/products.h"

namespace hipserve {
namespace HIPSERVE_TIER {

// Units of expanded codes: those of the tier that are multiplied fastest.
#if defined(__AVX512BF16__)
using CodeUnit = Pair;
using CodeValue = bf16;
#else
using CodeUnit = Single;
using CodeValue = float;
#endif
#if defined(__AVX512VNNI__)
constexpr bool kFewCodes = true;
#else
constexpr bool kFewCodes = false;
#endif

// A row in pages: kParts codes of head_dim numbers, one after the other, and a scale of each.
template <int kBits, int kParts> struct CodeRow {
  const uint8_t* numbers;
  const bf16* scales;
};

// The codes of sampled rows as columns. Few rows are integers instead, as code_sums() takes them.
template <int kBits, int kParts_> struct CodedColumns : Columns<CodeUnit> {
  static constexpr int kParts = kParts_;
  static constexpr int kSlices = 8 / kBits;  // numbers in a byte
  int64_t dim, side;                         // numbers of a part; with those that fill it up
  int64_t slice;                             // bytes of a part of a row, in whole vectors
  int8_t* integers;                          // [kFewRows][kParts][kSlices][slice]
  float scale[kFewRows];
  float excess[kFewRows][kParts];  // what code_sums() counts too much

  CodedColumns(Arena& arena, int64_t max_rows, int64_t head_dim)
      : Columns<CodeUnit>(arena, max_rows, kParts * side_of(head_dim)),
        dim(head_dim),
        side(side_of(head_dim)),
        slice(round_up(head_dim / kSlices, (int64_t)64)) {
    integers = arena.take<int8_t>(kFewRows * part_bytes() * kParts);
  }
  // Parts of more than one begin on a whole step.
  static int64_t side_of(int64_t head_dim) {
    return kParts > 1 ? depth_of<CodeUnit>(head_dim) * CodeUnit::kValues : head_dim;
  }
  bool asks_ahead() const { return few; }
  int64_t part_bytes() const { return kSlices * slice; }

  // Takes `count` rows: encode(r, numbers) writes the kParts * dim integers of the r-th and returns
  // its scale. `convert` holds kKeys * kParts * side floats.
  template <class Encode> void fill(int64_t count, float* convert, const Encode& encode) {
    int8_t numbers[kParts * kMaxDim];
    if (kFewCodes && count <= kFewRows) {
      rows = count;
      few = true;
      for (int64_t r = 0; r < count; ++r) {
        scale[r] = encode(r, numbers);
        for (int p = 0; p < kParts; ++p) put_integers(r, p, numbers + p * dim);
      }
      return;
    }
    Columns<CodeUnit>::template fill<CodeValue>(count, width, false, nullptr, [&](int64_t r) {
      CodeValue* row = (CodeValue*)convert + r % kChunk * kParts * side;
      const float step = encode(r, numbers);
      for (int p = 0; p < kParts; ++p) {
        CodeValue* part = row + p * side;
        for (int64_t c = 0; c < dim; c += kLanes) {
          const vi whole = load_bytes(numbers + p * dim + c);
          store_floats(__builtin_convertvector(whole, vf) * step, part + c);
        }
        for (int64_t c = dim; c < side; ++c) from_float(0.f, part + c);
      }
      return row;
    });
  }

 private:
  void put_integers(int64_t r, int part, const int8_t* numbers) {
    int8_t* to = integers + (r * kParts + part) * part_bytes();
    memset(to, 0, part_bytes());
    for (int i = 0; i < kSlices; ++i)
      for (int64_t c = 0; c < dim / kSlices; ++c) to[i * slice + c] = numbers[c * kSlices + i];
    int32_t sum = 0;
    for (int64_t c = 0; c < dim; ++c) sum += numbers[c];
    excess[r][part] = (float)(sum << (kBits - 1));
  }
};

#if defined(__AVX512VNNI__)
// sums[row][key] = sum_c q_row[c] (n_key[c] + 2^(kBits - 1)) for kM rows and `count` codes of
// `bytes` bytes, a multiple of 8 of which can be read: bytes without a sign meet bytes with one.
// The codes of the next batch are asked for.
template <int kM, class Queries, class Row>
static void code_sums(const Queries& queries, int part, const RowBatch<Row>& batch,
                      const uint8_t* const* keys, int count, int64_t bytes, float* sums) {
  constexpr int kN = kM <= 2 ? 8 : kM <= 4 ? 4 : 2;  // keys at a time
  constexpr int kSlices = Queries::kSlices;
  const int64_t apart = queries.part_bytes() * Queries::kParts;
  const int8_t* q = queries.integers + part * queries.part_bytes();
  const __m512i low = _mm512_set1_epi8(15), sign = _mm512_set1_epi8((char)128);
  for (int j = 0; j < count; j += kN) {
    for (int i = j; i < minimum(j + kN, batch.num_next); ++i) {
      prefetch_row(batch.next[i].numbers + part * bytes, bytes);
      __builtin_prefetch(batch.next[i].scales, 0, 2);
    }
    __m512i acc[16];
    for (int i = 0; i < 16; ++i) acc[i] = _mm512_setzero_si512();
    for (int64_t b = 0; b < bytes; b += 64) {
      const __mmask64 mask = bytes - b >= 64 ? ~0ull : (1ull << (bytes - b)) - 1;
      for (int n = 0; n < kN; ++n) {
        const __m512i code = _mm512_maskz_loadu_epi8(mask, keys[j + n] + b);
        __m512i slices[2] = {_mm512_xor_si512(code, sign)};
        if constexpr (kSlices == 2) {
          slices[0] = _mm512_and_si512(code, low);
          slices[1] = _mm512_and_si512(_mm512_srli_epi16(code, 4), low);
        }
        for (int r = 0; r < kM; ++r)
          for (int s = 0; s < kSlices; ++s)
            acc[r * kN + n] =
                _mm512_dpbusd_epi32(acc[r * kN + n], slices[s],
                                    _mm512_loadu_si512(q + r * apart + s * queries.slice + b));
      }
    }
    __m512 exact[16];
    for (int i = 0; i < 16; ++i) exact[i] = _mm512_cvtepi32_ps(acc[i]);
    float out[16];
    store(out, lane_sums(exact));
    for (int r = 0; r < kM; ++r) memcpy(sums + r * kKeys + j, out + r * kN, kN * 4);
  }
}

// best[r][key]: the score of a key with each of few rows.
template <int kBits, int kParts>
static void few_products(const RowBatch<CodeRow<kBits, kParts>>& batch,
                         const CodedColumns<kBits, kParts>& queries, float* best) {
  const int padded = round_up(batch.count, kLanes);
  const int64_t bytes = queries.dim * kBits / 8;
  const uint8_t* keys[kBatch];
  float scales[kBatch], sums[kFewRows * kKeys];
  for (int p = 0; p < kParts; ++p) {
    for (int j = 0; j < padded; ++j) {
      const CodeRow<kBits, kParts>& row = batch.found[minimum(j, batch.count - 1)];
      keys[j] = row.numbers + p * bytes;
      scales[j] = to_float(row.scales[p]);
    }
    with_rows<kFewRows>(queries.rows, [&]<int kM>() {
      code_sums<kM>(queries, p, batch, keys, padded, bytes, sums);
    });
    for (int64_t r = 0; r < queries.rows; ++r)
      for (int j = 0; j < padded; j += kLanes) {
        const vf score = (load(sums + r * kKeys + j) - queries.excess[r][p]) * load(scales + j) *
                         queries.scale[r];
        float* at = best + r * kKeys + j;
        store(at, p ? load(at) + score : score);
      }
  }
}
#endif

}  // namespace HIPSERVE_TIER
}  // namespace hipserve
