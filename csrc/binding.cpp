// The operators of the namespace hipserve_cpu, through torch's stable ABI: one build serves every
// torch from 2.10 on. Python has checked all arguments; head_dim is a multiple of 16, at most 512.
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "kernels.h"

#if defined(HIPSERVE_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

using hipserve::Batch;
using hipserve::Dtype;
using hipserve::Kernels;
using hipserve::Pages;
using hipserve::Rows;
using torch::stable::Tensor;

struct Tier {
  const char* name;
  const Kernels* kernels;
  bool (*supported)();
};

constexpr int64_t kTilesGranted = 0, kNoTiles = -1, kNotBuilt = -2;

// Whether the tile registers of AMX may be used here: one of the above, or the errno with which
// Linux refused them. It saves their 8 KiB only for processes that ask.
int64_t tile_refusal() {
#if defined(HIPSERVE_AMX)
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // of arch_prctl; of XSAVE
  static const int64_t refusal = [] {
    unsigned a = 0, b = 0, c = 0, d = 0;
    __get_cpuid_count(7, 0, &a, &b, &c, &d);
    if (!(d & kBf16) || !(d & kTile)) return kNoTiles;
    if (!syscall(SYS_arch_prctl, kRequestPermission, kTileData)) return kTilesGranted;
    return (int64_t)errno;
  }();
  return refusal;
#else
  return kNotBuilt;
#endif
}

#if defined(HIPSERVE_X86)
bool has_avx512_bf16() {
  return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq");
}
const Tier kTiers[] = {
    {"baseline", &hipserve::kernels_baseline, [] { return true; }},
    {"avx2", &hipserve::kernels_avx2,
     [] {
       return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
              __builtin_cpu_supports("f16c");
     }},
    {"avx512", &hipserve::kernels_avx512,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
     }},
    {"avx512_bf16", &hipserve::kernels_avx512_bf16, has_avx512_bf16},
#if defined(HIPSERVE_AMX)
    {"amx", &hipserve::kernels_amx,
     [] { return has_avx512_bf16() && tile_refusal() == kTilesGranted; }},
#endif
};
#else
const Tier kTiers[] = {{"baseline", &hipserve::kernels_baseline, [] { return true; }}};
#endif
constexpr int64_t kNumTiers = sizeof(kTiers) / sizeof(kTiers[0]);

std::string supported_names() {
  std::string names;
  for (const Tier& tier : kTiers)
    if (tier.supported()) names += (names.empty() ? "" : ", ") + std::string(tier.name);
  return names;
}

int64_t first_tier() {
  const char* forced = std::getenv("HIPSERVE_CPU_ISA");
  for (int64_t i = kNumTiers - 1; i >= 0; --i) {
    if (forced && std::strcmp(forced, kTiers[i].name)) continue;
    if (kTiers[i].supported()) return i;
  }
  throw std::runtime_error("HIPSERVE_CPU_ISA: expected one of " + supported_names() + ", got " +
                           forced + "; unset it to let the machine decide");
}

int64_t& current() {
  static int64_t tier = first_tier();
  return tier;
}
const Kernels& kernels() { return *kTiers[current()].kernels; }

// Raised with every change of a call: Python never runs kernels of another version.
constexpr int64_t kCalls = 7;
int64_t calls() { return kCalls; }
int64_t isa() { return current(); }
void set_isa(int64_t tier) {
  if (tier < 0 || tier >= kNumTiers || !kTiers[tier].supported())
    throw std::runtime_error("isa: expected a tier of this machine (" + supported_names() + ")");
  current() = tier;
}

Dtype dtype_of(const Tensor& x) {
  using torch::headeronly::ScalarType;
  switch (x.scalar_type()) {
    case ScalarType::BFloat16: return Dtype::bf16;
    case ScalarType::Half: return Dtype::f16;
    case ScalarType::Float: return Dtype::f32;
    default: throw std::runtime_error("dtype: expected bfloat16, float16 or float32");
  }
}
Rows rows_of(const Tensor& x) { return {(char*)x.data_ptr(), x.stride(0), x.stride(1)}; }
Pages pages_of(const Tensor& x) {
  return {(char*)x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
}
Pages pages_of(const std::optional<Tensor>& x) { return x ? pages_of(*x) : Pages{}; }
hipserve::IndexPages index_of(const std::optional<Tensor>& codes,
                              const std::optional<Tensor>& code_scales,
                              const std::optional<Tensor>& summaries,
                              const std::optional<Tensor>& summary_scales, int64_t run_size,
                              int64_t code_bits) {
  return {pages_of(codes),
          pages_of(summaries),
          pages_of(code_scales),
          pages_of(summary_scales),
          run_size,
          summaries ? summaries->size(1) : 0,
          code_bits};
}
template <class A> A* ints(const Tensor& x) { return (A*)x.data_ptr(); }

hipserve::Rope rope_of(const std::optional<Tensor>& rope, int64_t trained_length) {
  if (!rope) return {};
  const int32_t* partner = ints<const int32_t>(*rope);
  return {partner, partner + rope->stride(0), trained_length};
}

// keys: anything in their pages, for each of their heads.
Batch batch_of(const Tensor& q, const Tensor& keys, const Tensor& block_table,
               const Tensor& query_blocks, const std::optional<Tensor>& rope,
               int64_t trained_length) {
  return {ints<const int32_t>(block_table),
          block_table.stride(0),
          ints<const hipserve::QueryBlock>(query_blocks),
          query_blocks.size(0),
          keys.size(1),
          q.size(1),
          keys.size(2),
          q.size(2),
          dtype_of(q),
          rope_of(rope, trained_length)};
}

void block_sparse_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table,
                            Tensor query_blocks, std::optional<Tensor> indices,
                            std::optional<Tensor> window_start, int64_t num_sink_tokens,
                            int64_t key_block_size, int64_t sliding_window, double sm_scale,
                            double softcap, std::optional<Tensor> rope, int64_t trained_length,
                            Tensor out, Tensor lse) {
  hipserve::AttentionCall call{};
  call.batch = batch_of(q, k_cache, block_table, query_blocks, rope, trained_length);
  call.q = rows_of(q);
  call.out = rows_of(out);
  call.lse = ints<float>(lse);
  call.k = pages_of(k_cache);
  call.v = pages_of(v_cache);
  if (indices && window_start) {
    call.indices = ints<const int32_t>(*indices);
    call.window_start = ints<const int32_t>(*window_start);
    call.index_heads = indices->size(1);
    call.max_selected = indices->size(2);
  }
  call.num_sink_tokens = num_sink_tokens;
  call.key_block_size = key_block_size;
  call.sliding_window = sliding_window;
  call.sm_scale = (float)sm_scale;
  call.softcap = (float)softcap;
  kernels().attention(call);
}

// The part of a search that is the same for every selector.
void set_search(hipserve::SelectCall& call, const Tensor& q, const Tensor& codes,
                const Tensor& block_table, const Tensor& query_blocks, const Tensor& window_starts,
                const std::optional<Tensor>& rope, int64_t trained_length, const Tensor& indices) {
  call.batch = batch_of(q, codes, block_table, query_blocks, rope, trained_length);
  call.q = rows_of(q);
  call.heads = indices.size(1);
  call.max_selected = indices.size(2);
  call.window_starts = ints<const int32_t>(window_starts);
  call.indices = ints<int32_t>(indices);
}

void select_by_tree(Tensor q, Tensor codes, std::optional<Tensor> code_scales, int64_t code_bits,
                    Tensor block_table, Tensor query_blocks, Tensor window_starts,
                    std::optional<Tensor> rope, int64_t trained_length, int64_t budget,
                    int64_t key_block_size, int64_t query_stride, bool relative_scores,
                    int64_t num_sink_tokens, int64_t representative, int64_t seed, Tensor indices) {
  hipserve::TreeCall call{};
  set_search(call, q, codes, block_table, query_blocks, window_starts, rope, trained_length,
             indices);
  call.index = index_of(codes, code_scales, {}, {}, 1, code_bits);
  call.budget = budget;
  call.key_block_size = key_block_size;
  call.query_stride = query_stride;
  call.relative_scores = relative_scores;
  call.num_sink_tokens = num_sink_tokens;
  call.representative = representative;
  call.seed = seed;
  kernels().select_by_tree(call);
}

void select_by_bound(Tensor q, Tensor codes, std::optional<Tensor> code_scales, Tensor summaries,
                     std::optional<Tensor> summary_scales, int64_t run_size, int64_t code_bits,
                     Tensor block_table, Tensor query_blocks, Tensor window_starts,
                     std::optional<Tensor> rope, int64_t trained_length, int64_t budget,
                     int64_t key_block_size, int64_t query_stride, bool relative_scores,
                     int64_t num_sink_tokens, double bound_reach, int64_t rerank,
                     std::optional<Tensor> head_blocks, Tensor indices) {
  hipserve::DescentCall call{};
  set_search(call, q, codes, block_table, query_blocks, window_starts, rope, trained_length,
             indices);
  call.index = index_of(codes, code_scales, summaries, summary_scales, run_size, code_bits);
  call.budget = budget;
  call.key_block_size = key_block_size;
  call.query_stride = query_stride;
  call.relative_scores = relative_scores;
  call.num_sink_tokens = num_sink_tokens;
  call.bound_reach = (float)bound_reach;
  call.rerank = rerank;
  if (head_blocks) call.head_blocks = ints<const int32_t>(*head_blocks);
  kernels().select_by_bound(call);
}

void write_kv(Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, Tensor slot_mapping,
              std::optional<Tensor> codes, std::optional<Tensor> code_scales,
              std::optional<Tensor> summaries, std::optional<Tensor> summary_scales,
              int64_t run_size, int64_t code_bits) {
  kernels().write_kv({rows_of(k), rows_of(v), pages_of(k_cache), pages_of(v_cache),
                      index_of(codes, code_scales, summaries, summary_scales, run_size, code_bits),
                      ints<const int64_t>(slot_mapping), k.size(0), k_cache.size(1), k.size(1),
                      k.size(2), dtype_of(k)});
}

void build_index(Tensor k, std::optional<Tensor> codes, std::optional<Tensor> code_scales,
                 std::optional<Tensor> summaries, std::optional<Tensor> summary_scales,
                 int64_t run_size, int64_t code_bits) {
  kernels().build_index(
      {pages_of(k), index_of(codes, code_scales, summaries, summary_scales, run_size, code_bits),
       k.size(0), k.size(1), k.size(2), k.size(3), dtype_of(k)});
}

}  // namespace

STABLE_TORCH_LIBRARY(hipserve_cpu, m) {
  m.def("calls() -> int");
  m.def("isa() -> int");
  m.def("set_isa(int tier) -> ()");
  m.def("tile_refusal() -> int");
  m.def(
      "block_sparse_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table, "
      "Tensor query_blocks, Tensor? indices, Tensor? window_start, int num_sink_tokens, "
      "int key_block_size, int sliding_window, float sm_scale, float softcap, Tensor? rope, "
      "int trained_length, Tensor(a!) out, "
      "Tensor(b!) lse) -> ()");
  m.def(
      "select_by_tree(Tensor q, Tensor codes, Tensor? code_scales, int code_bits, "
      "Tensor block_table, Tensor query_blocks, Tensor window_starts, Tensor? rope, "
      "int trained_length, int budget, "
      "int key_block_size, int query_stride, bool relative_scores, int num_sink_tokens, "
      "int representative, int seed, Tensor(a!) indices) -> ()");
  m.def(
      "select_by_bound(Tensor q, Tensor codes, Tensor? code_scales, Tensor summaries, "
      "Tensor? summary_scales, int run_size, int code_bits, Tensor block_table, "
      "Tensor query_blocks, Tensor window_starts, Tensor? rope, int trained_length, int budget, "
      "int key_block_size, "
      "int query_stride, bool relative_scores, int num_sink_tokens, float bound_reach, int rerank, "
      "Tensor? head_blocks, Tensor(a!) indices) -> ()");
  m.def(
      "write_kv(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot_mapping, "
      "Tensor(c!)? codes, Tensor(d!)? code_scales, Tensor(e!)? summaries, "
      "Tensor(f!)? summary_scales, int run_size, int code_bits) -> ()");
  m.def(
      "build_index(Tensor k, Tensor(a!)? codes, Tensor(b!)? code_scales, Tensor(c!)? summaries, "
      "Tensor(d!)? summary_scales, int run_size, int code_bits) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(hipserve_cpu, CompositeExplicitAutograd, m) {
  m.impl("calls", TORCH_BOX(&calls));
  m.impl("isa", TORCH_BOX(&isa));
  m.impl("set_isa", TORCH_BOX(&set_isa));
  m.impl("tile_refusal", TORCH_BOX(&tile_refusal));
}
STABLE_TORCH_LIBRARY_IMPL(hipserve_cpu, CPU, m) {
  m.impl("block_sparse_attention", TORCH_BOX(&block_sparse_attention));
  m.impl("select_by_tree", TORCH_BOX(&select_by_tree));
  m.impl("select_by_bound", TORCH_BOX(&select_by_bound));
  m.impl("write_kv", TORCH_BOX(&write_kv));
  m.impl("build_index", TORCH_BOX(&build_index));
}
