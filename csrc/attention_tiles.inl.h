// Attention's two products on AMX tiles, straight from a bfloat16 cache whose layout is that of the tiles: sixteen
// positions' keys of 32 elements are a tile, sixteen elements of 32 positions' values too. Queries and weights are
// rounded to bfloat16.
//
// Tiles always have 16 rows, whatever the number of product rows: a tile's row depends on no other, so that what the
// rows beyond the last hold does not matter.
#pragma once

#include "attention.inl.h"
#include "tiles.h"

namespace gyrfalcon::GYRFALCON_ISA {

constexpr int kStep = 32;  // positions whose values one tile instruction takes

// Products of one or two tiles of queries and sixteen keys, left in the tiles kFirst and, of the second tile of
// queries, kFirst + 1. (The names of tiles are part of the instructions.)
#define GYRFALCON_SCORE_SIXTEEN(kFirst, kSecond, kKeys)                           \
  do {                                                                            \
    _tile_zero(kFirst);                                                           \
    if (kTwo) _tile_zero(kSecond);                                                \
    for (int64_t e = 0; e < head_size; e += 32) {                                 \
      _tile_loadd(6, (kKeys) + e * block_size, key_bytes);                        \
      _tile_loadd(4, queries + e, query_bytes);                                   \
      _tile_dpbf16ps(kFirst, 4, 6);                                               \
      if (kTwo) {                                                                 \
        _tile_loadd(5, queries + 16 * head_size + e, query_bytes);                \
        _tile_dpbf16ps(kSecond, 5, 6);                                            \
      }                                                                           \
    }                                                                             \
  } while (false)

#define GYRFALCON_STORE_SIXTEEN(kFirst, kSecond, scores)                          \
  do {                                                                            \
    _tile_stored(kFirst, scores, score_bytes);                                    \
    if (kTwo) _tile_stored(kSecond, (scores) + 16 * kScoreStride, score_bytes);   \
  } while (false)

// Scores of `num_steps` steps of keys for one or two tiles of product rows. Results are stored one product late: a
// store that waits for its product keeps the following ones from starting.
template <bool kTwo>
inline void score_run(const uint16_t* queries, int64_t head_size, const uint16_t* const* steps, int num_steps,
                      int64_t block_size, float* scores) {
  const int64_t query_bytes = head_size * 2, key_bytes = block_size * 4, score_bytes = kScoreStride * 4;
  finish_stores();
  for (int i = 0; i < num_steps; ++i, scores += kStep) {
    GYRFALCON_SCORE_SIXTEEN(0, 1, steps[i]);
    if (i > 0) GYRFALCON_STORE_SIXTEEN(2, 3, scores - 16);
    GYRFALCON_SCORE_SIXTEEN(2, 3, steps[i] + 32);
    GYRFALCON_STORE_SIXTEEN(0, 1, scores);
  }
  GYRFALCON_STORE_SIXTEEN(2, 3, scores - 16);
}

#undef GYRFALCON_SCORE_SIXTEEN
#undef GYRFALCON_STORE_SIXTEEN

// Rounded to bfloat16; numbers below the normal ones, which tile products take for zero, become zero.
inline void store_rounded(void* p, __m512 x) {
  const __m256bh rounded = _mm512_cvtneps_pbh(x);
  std::memcpy(p, &rounded, sizeof rounded);
}

// The weights, rounded to bfloat16, take the place of scores already read; `end` is a multiple of 16. The powers of 2
// are within 3e-6 of themselves, a thousandth of what the rounding changes.
inline void weigh_rounded(float* scores, int seen, int end, float factor, float offset, float* totals) {
  __m512 total = _mm512_loadu_ps(totals);
  const __m512 factors = _mm512_set1_ps(factor), offsets = _mm512_set1_ps(offset);
  char* weights = reinterpret_cast<char*>(scores);
  int p = 0;
  for (; p < seen; p += 16) {
    const __m512 x = _mm512_fmadd_ps(_mm512_loadu_ps(scores + p), factors, offsets);
    const __m512 fraction = _mm512_reduce_ps(x, 9);  // x - floor(x); 0 for -infinity
    __m512 w = _mm512_set1_ps(1.35341669e-2f);
    w = _mm512_fmadd_ps(w, fraction, _mm512_set1_ps(5.20114601e-2f));
    w = _mm512_fmadd_ps(w, fraction, _mm512_set1_ps(2.41442755e-1f));
    w = _mm512_fmadd_ps(w, fraction, _mm512_set1_ps(6.93003833e-1f));
    w = _mm512_fmadd_ps(w, fraction, _mm512_set1_ps(1.00000262f));
    w = _mm512_scalef_ps(w, x);  // times 2^floor(x)
    total = _mm512_add_ps(total, w);
    store_rounded(weights + 2 * p, w);
  }
  _mm512_storeu_ps(totals, total);
  for (; p < end; p += 16) std::memset(weights + 2 * p, 0, 32);
}

// Adds the products of weights and the elements e .. e + 31 of a run's values to the sums [M][E].
template <bool kTwo>
inline void add_values(const uint16_t* weights, const uint16_t* const* steps, int64_t e, int num_steps,
                       int64_t head_size, float* sums) {
  sums += e;
  const int64_t weight_bytes = kScoreStride * 4, value_bytes = head_size * 4, sum_bytes = head_size * 4;
  finish_stores();
  _tile_loadd(0, sums, sum_bytes);
  _tile_loadd(1, sums + 16, sum_bytes);
  if (kTwo) {
    _tile_loadd(2, sums + 16 * head_size, sum_bytes);
    _tile_loadd(3, sums + 16 * head_size + 16, sum_bytes);
  }
  for (int i = 0; i < num_steps; ++i) {
    _tile_loadd(4, weights + i * kStep, weight_bytes);
    _tile_loadd(6, steps[i] + e * 2, value_bytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, steps[i] + e * 2 + 32, value_bytes);
    _tile_dpbf16ps(1, 4, 7);
    if (kTwo) {
      _tile_loadd(5, weights + 16 * kScoreStride * 2 + i * kStep, weight_bytes);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sums, sum_bytes);
  _tile_stored(1, sums + 16, sum_bytes);
  if (kTwo) {
    _tile_stored(2, sums + 16 * head_size, sum_bytes);
    _tile_stored(3, sums + 16 * head_size + 16, sum_bytes);
  }
}

// A step's values with zeros for the positions from `count` on: whatever lies there must not get into a product.
inline const uint16_t* copy_first_values(const uint16_t* step, int count, int64_t head_size, uint16_t* copy) {
  for (int p = 0; p < kStep; p += 2, step += head_size * 2) {
    const ivec16 wanted = (ivec16){} + (p + 1 < count ? -1 : (p < count ? 0xffff : 0));
    for (int64_t e = 0; e < head_size; e += 16) {
      const ivec16 pairs = load_int(step + e * 2) & wanted;
      std::memcpy(copy + (p / 2 * head_size + e) * 2, &pairs, 64);
    }
  }
  return copy;
}

inline void attend_with_tiles(const AttentionPart& part, AttentionScratch& scratch) {
  static const TileConfig config = full_tile_config();
  configure_tiles(config);
  const int64_t head_size = part.shape.head_size, block_size = part.shape.block_size;
  const int num_products = part.num_products;
  const bool two = num_products > 16;
  uint16_t* queries = reinterpret_cast<uint16_t*>(scratch.queries);
  uint16_t* last_values = reinterpret_cast<uint16_t*>(scratch.values);
  for (int m = 0; m < num_products; ++m) {
    const float* q = part.query_of(m);
    for (int64_t e = 0; e < head_size; e += 16) store_rounded(queries + m * head_size + e, _mm512_loadu_ps(q + e));
  }

  const int end = part.last_position() + 1;
  for (int run_begin = 0; run_begin < end; run_begin += kRun) {
    const int count = end - run_begin < kRun ? end - run_begin : kRun, num_steps = (count + kStep - 1) / kStep;
    const uint16_t *keys[kRun / kStep], *values[kRun / kStep];
    for (int i = 0; i < num_steps; ++i) {
      const int position = run_begin + i * kStep;
      const int64_t slot = position % block_size, block = part.block_at(position);
      keys[i] = static_cast<const uint16_t*>(part.keys) + block + slot * 2;
      values[i] = static_cast<const uint16_t*>(part.values) + block + slot * head_size;
      if (position + kStep > end) values[i] = copy_first_values(values[i], end - position, head_size, last_values);
    }
    if (two) score_run<true>(queries, head_size, keys, num_steps, block_size, scratch.scores);
    else score_run<false>(queries, head_size, keys, num_steps, block_size, scratch.scores);
    weigh_run(part, run_begin, scratch, [=](float* scores, int seen, float factor, float offset, float* totals) {
      weigh_rounded(scores, seen, num_steps * kStep, factor, offset, totals);
    });
    const uint16_t* weights = reinterpret_cast<const uint16_t*>(scratch.scores);
    for (int64_t e = 0; e < head_size; e += 32) {
      if (two) add_values<true>(weights, values, e, num_steps, head_size, scratch.sums);
      else add_values<false>(weights, values, e, num_steps, head_size, scratch.sums);
    }
  }
}

}  // namespace gyrfalcon::GYRFALCON_ISA
