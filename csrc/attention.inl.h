// Attention over the paged cache, run of keys by run of keys, with a running softmax.
//
// Letters: M product rows computed together (pairs of a query token and a query head of one kv head), E head size,
// S positions in a block, P key positions of a run.
//
// What gives a row the same bits in any company: runs are cut at absolute positions, and product rows are computed
// together only if their tokens lie in one run, so that a row's sums pass the same runs whether its token came alone
// or in a chunk of 500. Within a run a row's level and total are made of the keys it sees, in one order; its
// weighted values add up in ascending order of position, where hidden positions add 0 times a finite value. That can
// change at most the sign of a zero, and a zero's sign is dropped at the end.
#pragma once

#include <cstddef>

#include "kernels.h"
#include "rows.inl.h"
#include "vec.h"

namespace gyrfalcon::GYRFALCON_ISA {

// Positions of a run, which is some blocks or part of one. Scores, keys and values of a run and the queries' own
// buffers should stay in the first-level cache: tile products take half as long again where they do not.
constexpr int kRun = 64;
constexpr int kMostProducts = 32;  // product rows computed together: two tiles
constexpr int kScoreStride = kRun + 16;  // rows a power of two apart would share cache sets

// What a thread computes with; see attend_scratch_bytes.
struct AttentionScratch {
  float* scores;     // [M][kScoreStride]; weights take their place, those in bfloat16 from the row's beginning on
  float* sums;       // [M][E rounded up to 16]: weighted values
  float* totals;     // [M][16]: sums of weights, lane by lane
  float* positions; // [kRun]: the run's positions rounded to bfloat16, for the bias
  float* queries;    // [M][E], or bfloat16 for tiles
  float* keys;       // [E][kRun]; tiles do not use it
  float* values;     // [kRun][E rounded up to 16]; tiles: one step's values, bfloat16 [16][E][2]
  float levels[kMostProducts];       // the scores that have weight 1
  float slopes[kMostProducts];       // of the bias, rounded to bfloat16
  int num_positions[kMostProducts];  // that a product row sees, from the first of its row on
};

// Product rows computed together, of one row of the batch and one kv head. Their tokens lie in one run.
struct AttentionPart {
  const AttentionShape& shape;
  const void* keys;  // of the layer's block 0, the kv head
  const void* values;
  int64_t block_stride;  // elements from a block to the next
  const int32_t* block_table;
  const float* slopes;  // of the kv head's first query head, or null
  const float* q;       // the first query head of the kv head, at the row's first token
  int64_t q_stride;
  int context_len;
  int group;  // query heads on the kv head
  int first_product;
  int num_products;

  int token_of(int m) const { return (first_product + m) / group; }
  int head_of(int m) const { return (first_product + m) % group; }
  int position_of(int m) const { return context_len + token_of(m); }
  const float* query_of(int m) const { return q + token_of(m) * q_stride + head_of(m) * shape.head_size; }
  int first_position() const { return position_of(0); }
  int last_position() const { return position_of(num_products - 1); }
  // Element number of a position's block and kv head.
  int64_t block_at(int position) const { return block_table[position / shape.block_size] * block_stride; }
};

inline int round_up(int x, int unit) { return (x + unit - 1) / unit * unit; }

// ---- softmax of a run ----

inline vec16 round_to_bf16(vec16 x) {  // of finite values
  const ivec16 bits = (ivec16)x;
  return (vec16)((bits + 0x7fff + ((bits >> 16) & 1)) & (int32_t)0xffff0000);
}

inline void round_positions(int run_begin, float* positions) {
  const ivec16 numbers = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  for (int p = 0; p < kRun; p += 16) store(positions + p, round_to_bf16(from_int(numbers + (run_begin + p))));
}

// Adds the bias of a run's positions to `count` of a row's scores.
inline void add_bias(float* scores, const float* positions, float slope, int count) {
  for (int p = 0; p < count; p += 16)
    store(scores + p, load(scores + p) + round_to_bf16(splat(slope) * load(positions + p)));
}

// The largest of a row's `seen` scores; hides the others of the last sixteen.
inline float hide_and_find_largest(float* scores, int seen) {
  const int whole = seen / 16 * 16;
  vec16 maxima = splat(-kInfinity);
  if (whole < seen) {
    maxima = choose(first_elements(seen - whole), load(scores + whole), maxima);
    store(scores + whole, maxima);
  }
  for (int p = 0; p < whole; p += 16) maxima = max(maxima, load(scores + p));
  return largest(maxima);
}

// A row's level follows its largest score, but only when that has got ahead of it by this many powers of 2: sums are
// seldom brought to a new level, and weights up to 2^8 are as exact as those up to 1.
constexpr float kSlack = 8.0f;

// Brings a run's scores to their final form, the sums so far to the new levels, and hands every row to
// `weigh(scores, seen, factor, offset, totals)`, which turns the scores into weights 2^(factor * score + offset), zeros
// beyond the `seen` first, and adds them to the totals.
template <typename Weigh>
inline void weigh_run(const AttentionPart& part, int run_begin, AttentionScratch& scratch, const Weigh& weigh) {
  const int sums_stride = round_up(part.shape.head_size, 16);
  const float factor = part.shape.scale * 1.44269504f;  // to powers of 2
  int seen[kMostProducts];
  if (part.slopes != nullptr) round_positions(run_begin, scratch.positions);
  // All levels before all weights: a row's weights wait for its level, so that other rows' had better come between.
  for (int m = 0; m < part.num_products; ++m) {
    float* scores = scratch.scores + m * kScoreStride;
    const int ahead = scratch.num_positions[m] - run_begin;
    seen[m] = ahead < kRun ? ahead : kRun;
    if (part.slopes != nullptr) add_bias(scores, scratch.positions, scratch.slopes[m], seen[m]);
    const float old_level = scratch.levels[m], largest_score = hide_and_find_largest(scores, seen[m]);
    // False if both are -infinity or one is NaN: the row's weights are NaN then.
    if (!(factor * (largest_score - old_level) > kSlack)) continue;
    scratch.levels[m] = largest_score;
    const vec16 decay = exp2(splat(factor * old_level - factor * largest_score));
    float* totals = scratch.totals + m * 16;
    store(totals, load(totals) * decay);
    float* sums = scratch.sums + m * sums_stride;
    for (int e = 0; e < sums_stride; e += 16) store(sums + e, load(sums + e) * decay);
  }
  for (int m = 0; m < part.num_products; ++m)
    weigh(scratch.scores + m * kScoreStride, seen[m], factor, -(factor * scratch.levels[m]), scratch.totals + m * 16);
}

// ---- values that are not finite ----

// Whether the values at the positions first .. last are all finite.
inline bool values_are_finite(const AttentionPart& part, int first, int last) {
  const int64_t head_size = part.shape.head_size, block_size = part.shape.block_size;
  for (int position = first; position <= last; ++position) {
    const int64_t slot = position % block_size, block = part.block_at(position);
    uint32_t largest_exponent = 0;
    if (part.shape.is_bf16) {
      const uint16_t* v = static_cast<const uint16_t*>(part.values) + block + slot / 2 * head_size * 2 + slot % 2;
      for (int64_t e = 0; e < head_size; ++e) {
        const uint32_t exponent = v[2 * e] & 0x7f80u;
        largest_exponent = largest_exponent > exponent ? largest_exponent : exponent;
      }
      if (largest_exponent == 0x7f80u) return false;
    } else {
      const float* v = static_cast<const float*>(part.values) + block + slot * head_size;
      for (int64_t e = 0; e < head_size; ++e) {
        uint32_t bits;
        std::memcpy(&bits, v + e, 4);
        const uint32_t exponent = bits & 0x7f800000u;
        largest_exponent = largest_exponent > exponent ? largest_exponent : exponent;
      }
      if (largest_exponent == 0x7f800000u) return false;
    }
  }
  return true;
}

}  // namespace gyrfalcon::GYRFALCON_ISA

#include "attention_vectors.inl.h"
#if defined(__AMX_BF16__)
#include "attention_tiles.inl.h"
#endif

namespace gyrfalcon::GYRFALCON_ISA {

// ---- the table's entries ----

inline bool use_tiles(const AttentionShape& shape) {
#if defined(__AMX_BF16__)
  return shape.is_bf16 && shape.head_size % 32 == 0 && shape.block_size % 32 == 0;
#else
  (void)shape;
  return false;
#endif
}

inline int attend_products(const AttentionShape&) { return kMostProducts; }

// Lays the buffers out from `memory` on and returns their size.
inline size_t lay_out(const AttentionShape& shape, void* memory, AttentionScratch* scratch) {
  const size_t head_size = shape.head_size, padded = round_up(shape.head_size, 16);
  const bool tiles = use_tiles(shape);
  size_t used = 0;
  const auto take = [&](size_t num_floats) {
    float* start = memory == nullptr ? nullptr : reinterpret_cast<float*>(static_cast<char*>(memory) + used);
    used += (num_floats * sizeof(float) + 63) / 64 * 64;
    return start;
  };
  AttentionScratch laid_out;
  laid_out.scores = take(kMostProducts * kScoreStride);
  laid_out.sums = take(kMostProducts * padded);
  laid_out.totals = take(kMostProducts * 16);
  laid_out.positions = take(kRun);
  laid_out.queries = take(kMostProducts * head_size);
  laid_out.keys = take(tiles ? 0 : head_size * kRun);
  laid_out.values = take(tiles ? 16 * head_size : kRun * padded);
  if (scratch != nullptr) *scratch = laid_out;
  return used;
}

inline size_t attend_scratch_bytes(const AttentionShape& shape) { return lay_out(shape, nullptr, nullptr); }

// Where a part's results go: the kv head's first query head, at the row's first token.
struct AttentionOutput {
  void* data;
  int64_t stride;
  bool is_bf16;
};

inline void store_means(const AttentionPart& part, const AttentionScratch& scratch, const AttentionOutput& out) {
  const int head_size = part.shape.head_size, sums_stride = round_up(head_size, 16);
  for (int m = 0; m < part.num_products; ++m) {
    const float* sums = scratch.sums + m * sums_stride;
    const vec16 factor = splat(1.0f / sum(load(scratch.totals + m * 16)));
    const int64_t at = part.token_of(m) * out.stride + static_cast<int64_t>(part.head_of(m)) * head_size;
    for (int e = 0; e < head_size; e += 16) {
      const int count = head_size - e < 16 ? head_size - e : 16;
      const vec16 mean = load(sums + e) * factor + splat(0.0f);  // -0 becomes 0
      if (out.is_bf16) {
        uint16_t rounded[16];
        store_bf16(rounded, mean);
        std::memcpy(static_cast<uint16_t*>(out.data) + at + e, rounded, sizeof(uint16_t) * count);
      } else if (count == 16) {
        store(static_cast<float*>(out.data) + at + e, mean);
      } else {
        store_part(static_cast<float*>(out.data) + at + e, mean, count);
      }
    }
  }
}

inline void attend_part(AttentionPart part, const AttentionOutput& out, AttentionScratch& scratch) {
  if (!values_are_finite(part, part.first_position() + 1, part.last_position())) {
    // 0 times such a value would reach tokens that do not see it: one token at a time, the values after it left out.
    const int end = part.first_product + part.num_products;
    while (part.first_product < end) {
      const int rest_of_token = part.group - part.first_product % part.group;
      part.num_products = rest_of_token < end - part.first_product ? rest_of_token : end - part.first_product;
      attend_part(part, out, scratch);
      part.first_product += part.num_products;
    }
    return;
  }
  for (int m = 0; m < part.num_products; ++m) {
    scratch.levels[m] = -kInfinity;
    scratch.num_positions[m] = part.position_of(m) + 1;
    if (part.slopes != nullptr) scratch.slopes[m] = widen(narrow(part.slopes[part.head_of(m)]));
  }
  std::memset(scratch.totals, 0, sizeof(float) * 16 * part.num_products);
  std::memset(scratch.sums, 0, sizeof(float) * round_up(part.shape.head_size, 16) * kMostProducts);
#if defined(__AMX_BF16__)
  if (use_tiles(part.shape)) {
    attend_with_tiles(part, scratch);
    store_means(part, scratch, out);
    return;
  }
#endif
  attend_with_vectors(part, scratch);
  store_means(part, scratch, out);
}

// shape.scale is positive.
inline void attend(const AttentionTask& task, const float* q, int64_t q_stride, const AttentionShape& shape,
                   const Cache& cache, const Batch& batch, void* out, int64_t out_stride, bool out_is_bf16,
                   void* scratch_memory) {
  AttentionScratch scratch;
  lay_out(shape, scratch_memory, &scratch);
  const int64_t group = shape.num_heads / shape.num_kv_heads, first_token = batch.query_starts[task.row];
  const int64_t first_column = task.kv_head * group * shape.head_size;
  const int64_t in_block = static_cast<int64_t>(shape.head_size) * shape.block_size * task.kv_head;
  const int64_t element_bytes = shape.is_bf16 ? 2 : 4;
  const AttentionOutput output{
      static_cast<char*>(out) + (first_token * out_stride + first_column) * (out_is_bf16 ? 2 : 4), out_stride,
      out_is_bf16};
  AttentionPart part{shape,
                     static_cast<const char*>(cache.keys) + in_block * element_bytes,
                     static_cast<const char*>(cache.values) + in_block * element_bytes,
                     static_cast<int64_t>(shape.num_kv_heads) * shape.head_size * shape.block_size,
                     batch.block_tables + static_cast<int64_t>(task.row) * batch.table_width,
                     shape.slopes == nullptr ? nullptr : shape.slopes + task.kv_head * group,
                     q + first_token * q_stride + first_column,
                     q_stride,
                     batch.context_lens[task.row],
                     static_cast<int>(group),
                     task.first_product,
                     0};
  for (int rest = task.num_products; rest > 0; rest -= part.num_products, part.first_product += part.num_products) {
    const int run_end = (part.position_of(0) / kRun + 1) * kRun;
    const int64_t in_run = (run_end - part.context_len) * group - part.first_product;
    part.num_products = rest < kMostProducts ? rest : kMostProducts;
    if (in_run < part.num_products) part.num_products = static_cast<int>(in_run);
    attend_part(part, output, scratch);
  }
}

}  // namespace gyrfalcon::GYRFALCON_ISA
