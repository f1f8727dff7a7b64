// One table of kernels for each kind of processor. Everything here runs on the calling thread; who shares the work out
// decides by ranges.
//
// The promise all of them keep: an output row's bits depend on its own input row alone - not on how many rows are
// computed together, on the range asked for, or on the thread.
#pragma once

#include "matrix.h"

namespace gyrfalcon {

// Paged keys and values of one layer. A block holds `block_size` positions (a multiple of 16) of all kv heads:
//
//   float32   keys   [kv head][E][block_size]        values [kv head][block_size][E]
//   bfloat16  keys   [kv head][E / 2][block_size][2]  values [kv head][block_size / 2][E][2]
//
// so that 16 positions' keys, or 16 elements of a value, lie side by side, in pairs where bfloat16 products want pairs.
struct Cache {
  void* keys;
  void* values;
};

struct AttentionShape {
  int32_t num_heads;
  int32_t num_kv_heads;
  int32_t head_size;   // E, even
  int32_t block_size;  // S, a multiple of 16
  bool is_bf16;        // the cache; float32 otherwise
  float scale;         // of query-key products
  const float* slopes; // [num_heads] ALiBi slopes; null with rotary positions
};

// Which tokens belong to which row (as gyrfalcon.kernels.interface.AttentionInputs).
struct Batch {
  int32_t num_rows;
  int32_t num_tokens;
  int32_t table_width;
  const int32_t* query_starts;  // [rows + 1]
  const int32_t* context_lens;  // [rows] tokens in the cache before this step
  const int32_t* block_tables;  // [rows][table_width]
  const int32_t* positions;     // [tokens]
  const int32_t* token_rows;    // [tokens] the row of each token
};

// A piece of a step's attention: `num_products` pairs of (query token, query head of one kv head), counted token by
// token, head by head within a token, from `first_product` on, of one row and one kv head.
struct AttentionTask {
  int32_t row;
  int32_t kv_head;
  int32_t first_product;
  int32_t num_products;
};

struct Kernels {
  const char* name;

  // Matrix products.
  Form (*form)(Storage storage);
  // Row `row` of `x` from `values` [K], read in `order` where that is not null.
  void (*prepare)(const float* values, const int32_t* order, const Activations& x, int row);
  // Rows 0 .. num_rows of X W^T + bias for the panels first_panel .. last_panel, finished into their columns of `out`.
  // `scratch`: matmul_scratch_bytes(w, num_rows) bytes of the calling thread's own, aligned to 64.
  void (*matmul)(const Matrix& w, const Activations& x, int num_rows, int first_panel, int last_panel,
                 const Output& out, void* scratch);
  size_t (*matmul_scratch_bytes)(const Matrix& w, int num_rows);

  // Rows of width D, float32.
  void (*layer_norm)(const float* x, const float* weight, const float* bias, float epsilon, int width, float* out);
  void (*rms_norm)(const float* x, const float* weight, float epsilon, int width, float* out);

  // One token's [Q | K | V] (float32, heads in order): rotates the kv heads first .. last and their query heads in place
  // by cosines and sines [E / 2] (half-split convention; null: no rotation), then stores their keys and values at
  // `position` of the row's block table.
  void (*rotate_and_store)(float* qkv, const float* cosines, const float* sines, const AttentionShape& shape,
                           const Cache& cache, const int32_t* block_table, int position, int first_kv_head,
                           int last_kv_head);

  // Attention of one task: q [tokens][q_stride] float32 (rotated; only the first num_heads * E columns are read), out
  // [tokens][out_stride] float32 or bfloat16. `scratch`: attend_scratch_bytes(shape) bytes, aligned to 64.
  void (*attend)(const AttentionTask& task, const float* q, int64_t q_stride, const AttentionShape& shape,
                 const Cache& cache, const Batch& batch, void* out, int64_t out_stride, bool out_is_bf16,
                 void* scratch);
  size_t (*attend_scratch_bytes)(const AttentionShape& shape);
  // Products that a task should have, so that loaded keys serve many of them: tasks are cut to this many.
  int (*attend_products)(const AttentionShape& shape);

  // The largest of `width` logits (the first of equals) and its log-probability: it minus ln of the sum of exp of all.
  // Returns false if one of them is NaN or +infinity, or if all are -infinity.
  bool (*choose_greedy)(const float* logits, int width, int32_t* id, float* log_probability);

  // Called by every thread at the beginning of each piece of work in which it uses the table: other libraries may have
  // left the thread's tiles in another state. Tells whether the processor lets it use the table at all.
  bool (*enter_thread)();
};

// Null where this build does not have the table.
const Kernels* kernels_avx2();
const Kernels* kernels_avx512();
const Kernels* kernels_amx();

}  // namespace gyrfalcon
