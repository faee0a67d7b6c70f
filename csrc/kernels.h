// The calls that cross from the binding to the kernels: plain records, no torch, no STL.
#pragma once
#include <cstdint>

namespace hipserve {

enum class Dtype : int32_t { bf16, f16, f32 };

// Strides count elements; the last axis is contiguous everywhere.

struct Rows {  // [tokens, heads, head_dim]
  char* data;
  int64_t row_stride, head_stride;
};

struct Pages {  // [pages, slots, heads, numbers of a row]; of summaries, a slot is a run
  char* data;
  int64_t page_stride, slot_stride, head_stride;
};

// What a search reads of keys (KeyIndex in types.py); data is null where there is none.
struct IndexPages {
  Pages codes;           // of 16 bits, the keys; else rows of head_dim * code_bits / 8 bytes
  Pages summaries;       // rows of 2 * head_dim numbers, stored as keys are; bytes beside scales
  Pages code_scales;     // bfloat16, one a code; null with 16 bits
  Pages summary_scales;  // bfloat16, one for each side of a summary
  int64_t run_size;      // keys of the finest run
  int64_t num_runs;      // of a page
  int64_t code_bits;
};

struct QueryBlock {
  int32_t seq, row, num_rows, position;
};

// How a model turns its keys (ops/rope.py); null where no row lies beyond the trained length.
struct Rope {
  const int32_t *partner, *step;  // [head_dim]
  int64_t trained_length;
};

struct Batch {
  const int32_t* block_table;
  int64_t table_stride;
  const QueryBlock* query_blocks;
  int64_t num_query_blocks;
  int64_t page_size, num_q_heads, num_kv_heads, head_dim;
  Dtype dtype;
  Rope rope;
};

struct AttentionCall {
  Batch batch;
  Rows q, out;
  float* lse;  // [tokens, num_q_heads]
  Pages k, v;
  const int32_t* indices;  // [query blocks, index_heads, max_selected], or null: dense
  const int32_t* window_start;
  int64_t index_heads, max_selected;
  int64_t num_sink_tokens, key_block_size, sliding_window;
  float sm_scale, softcap;
};

struct SelectCall {  // what every search reads
  Batch batch;
  Rows q;
  IndexPages index;  // without summaries where the tree searches
  int64_t heads, max_selected;
  int64_t budget, key_block_size, query_stride, num_sink_tokens;
  bool relative_scores;
  const int32_t* window_starts;  // [query blocks]: the end of the searched middle
  int32_t* indices;              // [query blocks, heads, max_selected]
};

struct TreeCall : SelectCall {
  int64_t representative, seed;
};

struct DescentCall : SelectCall {
  int64_t rerank;
  float bound_reach;
  const int32_t* head_blocks;  // [heads]: blocks that each may choose, or null: of `budget` keys
};

struct WriteCall {
  Rows k, v;
  Pages k_cache, v_cache;
  IndexPages index;  // its codes are null with 16 bits
  const int64_t* slot_mapping;
  int64_t num_tokens, page_size, num_kv_heads, head_dim;
  Dtype dtype;
};

struct BuildCall {
  Pages k;
  IndexPages index;  // its codes are null with 16 bits
  int64_t num_pages, page_size, num_kv_heads, head_dim;
  Dtype dtype;
};

// One ISA tier: the same source compiled with other flags (see CMakeLists.txt).
struct Kernels {
  void (*attention)(const AttentionCall&);
  void (*select_by_tree)(const TreeCall&);
  void (*select_by_bound)(const DescentCall&);
  void (*write_kv)(const WriteCall&);
  void (*build_index)(const BuildCall&);
};

extern const Kernels kernels_baseline, kernels_avx2, kernels_avx512, kernels_avx512_bf16,
    kernels_amx;

}  // namespace hipserve
