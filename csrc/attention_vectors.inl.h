// Attention's two products on vectors, for any head size: a run's keys and values are gathered as float32, so that
// float32 and bfloat16 caches share the rest, and nothing a cache holds beyond the last position gets into a product.
#pragma once

#include "attention.inl.h"

namespace gyrfalcon::GYRFALCON_ISA {

// A register of float32: 16 or 8 of them.
#if defined(__AVX512F__)
typedef __m512 lanes;
constexpr int kLanes = 16, kRowsAtOnce = 4, kLanesAtOnce = 4, kLanesAlone = 8;
inline lanes read_lanes(const float* p) { return _mm512_loadu_ps(p); }
inline void write_lanes(float* p, lanes x) { _mm512_storeu_ps(p, x); }
inline lanes fill_lanes(float x) { return _mm512_set1_ps(x); }
inline lanes add_product_of_lanes(lanes a, lanes b, lanes c) { return _mm512_fmadd_ps(a, b, c); }
#else
typedef __m256 lanes;
constexpr int kLanes = 8, kRowsAtOnce = 4, kLanesAtOnce = 2, kLanesAlone = 8;
inline lanes read_lanes(const float* p) { return _mm256_loadu_ps(p); }
inline void write_lanes(float* p, lanes x) { _mm256_storeu_ps(p, x); }
inline lanes fill_lanes(float x) { return _mm256_set1_ps(x); }
inline lanes add_product_of_lanes(lanes a, lanes b, lanes c) { return _mm256_fmadd_ps(a, b, c); }
#endif

// out[r][c] += sum over i of left[r][i] * right[i][c] in ascending i, one chain an element, for R rows and C
// registers of columns.
template <int R, int C>
inline void add_product_block(const float* left, int left_stride, const float* right, int right_stride, int depth,
                              float* out, int out_stride) {
  lanes sums[R][C];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) sums[r][c] = read_lanes(out + r * out_stride + c * kLanes);
  for (int i = 0; i < depth; ++i) {
    lanes columns[C];
    for (int c = 0; c < C; ++c) columns[c] = read_lanes(right + static_cast<int64_t>(i) * right_stride + c * kLanes);
    for (int r = 0; r < R; ++r) {
      const lanes x = fill_lanes(left[r * left_stride + i]);
      for (int c = 0; c < C; ++c) sums[r][c] = add_product_of_lanes(x, columns[c], sums[r][c]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) write_lanes(out + r * out_stride + c * kLanes, sums[r][c]);
}

template <int R, int C>
inline void add_product_rows(const float* left, int left_stride, const float* right, int right_stride, int depth,
                             int num_columns, float* out, int out_stride) {
  int column = 0;
  for (; column + C * kLanes <= num_columns; column += C * kLanes)
    add_product_block<R, C>(left, left_stride, right + column, right_stride, depth, out + column, out_stride);
  for (; column < num_columns; column += kLanes)
    add_product_block<R, 1>(left, left_stride, right + column, right_stride, depth, out + column, out_stride);
}

// `num_columns` is a multiple of 16.
inline void add_product(const float* left, int left_stride, int num_rows, const float* right, int right_stride,
                        int depth, int num_columns, float* out, int out_stride) {
  int row = 0;
  for (; row + kRowsAtOnce <= num_rows; row += kRowsAtOnce)
    add_product_rows<kRowsAtOnce, kLanesAtOnce>(left + row * left_stride, left_stride, right, right_stride, depth,
                                                num_columns, out + row * out_stride, out_stride);
  for (; row < num_rows; ++row)
    add_product_rows<1, kLanesAlone>(left + row * left_stride, left_stride, right, right_stride, depth, num_columns,
                                     out + row * out_stride, out_stride);
}

// Keys of the positions run_begin .. run_begin + count - 1 (a multiple of 16, which may go beyond the last one
// written: what is computed with those is hidden later) as [E][kRun].
inline void gather_keys(const AttentionPart& part, int run_begin, int count, float* keys) {
  const int64_t head_size = part.shape.head_size, block_size = part.shape.block_size;
  for (int p = 0; p < count; p += 16) {
    const int64_t slot = (run_begin + p) % block_size, block = part.block_at(run_begin + p);
    if (part.shape.is_bf16) {
      const uint16_t* source = static_cast<const uint16_t*>(part.keys) + block + slot * 2;
      for (int64_t e = 0; e < head_size; e += 2, source += block_size * 2) {
        const ivec16 pairs = load_int(source);
        store(keys + e * kRun + p, even_bf16(pairs));
        store(keys + (e + 1) * kRun + p, odd_bf16(pairs));
      }
    } else {
      const float* source = static_cast<const float*>(part.keys) + block + slot;
      for (int64_t e = 0; e < head_size; ++e) store(keys + e * kRun + p, load(source + e * block_size));
    }
  }
}

// Values of the positions run_begin .. run_begin + count - 1 as [position][E rounded up to 16]; what is beyond E is
// zero.
inline void gather_values(const AttentionPart& part, int run_begin, int count, float* values) {
  const int64_t head_size = part.shape.head_size, block_size = part.shape.block_size;
  const int64_t padded = round_up(part.shape.head_size, 16), whole = head_size / 16 * 16;
  for (int p = 0; p < count; ++p, values += padded) {
    const int64_t slot = (run_begin + p) % block_size, block = part.block_at(run_begin + p);
    if (part.shape.is_bf16) {
      const uint16_t* source = static_cast<const uint16_t*>(part.values) + block + slot / 2 * head_size * 2;
      for (int64_t e = 0; e < whole; e += 16) {
        const ivec16 pairs = load_int(source + 2 * e);
        store(values + e, slot % 2 == 0 ? even_bf16(pairs) : odd_bf16(pairs));
      }
      for (int64_t e = whole; e < padded; ++e) values[e] = e < head_size ? widen(source[2 * e + slot % 2]) : 0.0f;
    } else {
      const float* source = static_cast<const float*>(part.values) + block + slot * head_size;
      for (int64_t e = 0; e < whole; e += 16) store(values + e, load(source + e));
      for (int64_t e = whole; e < padded; ++e) values[e] = e < head_size ? source[e] : 0.0f;
    }
  }
}

// The weights take the scores' place; `end` is a multiple of 16.
inline void weigh_in_place(float* scores, int seen, int end, float factor, float offset, float* totals) {
  vec16 total = load(totals);
  int p = 0;
  for (; p < seen; p += 16) {
    const vec16 w = exp2(fma(load(scores + p), splat(factor), splat(offset)));
    total += w;
    store(scores + p, w);
  }
  store(totals, total);
  for (; p < end; p += 16) store(scores + p, splat(0.0f));
}

inline void attend_with_vectors(const AttentionPart& part, AttentionScratch& scratch) {
  const int head_size = part.shape.head_size, padded = round_up(head_size, 16), num_products = part.num_products;
  for (int m = 0; m < num_products; ++m)
    std::memcpy(scratch.queries + m * head_size, part.query_of(m), sizeof(float) * head_size);
  const int end = part.last_position() + 1;
  for (int run_begin = 0; run_begin < end; run_begin += kRun) {
    const int count = end - run_begin < kRun ? end - run_begin : kRun, whole = round_up(count, 16);
    gather_keys(part, run_begin, whole, scratch.keys);
    gather_values(part, run_begin, count, scratch.values);
    for (int m = 0; m < num_products; ++m) std::memset(scratch.scores + m * kScoreStride, 0, sizeof(float) * whole);
    add_product(scratch.queries, head_size, num_products, scratch.keys, kRun, head_size, whole, scratch.scores,
                kScoreStride);
    weigh_run(part, run_begin, scratch, [whole](float* scores, int seen, float factor, float offset, float* totals) {
      weigh_in_place(scores, seen, whole, factor, offset, totals);
    });
    add_product(scratch.scores, kScoreStride, num_products, scratch.values, padded, count, padded, scratch.sums,
                padded);
  }
}

}  // namespace gyrfalcon::GYRFALCON_ISA
