// Kernels over one row: norms, rotary positions and the cache's stores, the greedy choice; and the functions of vec.h.
#pragma once

#include <cmath>
#include <limits>

#include "kernels.h"
#include "vec.h"

namespace gyrfalcon::GYRFALCON_ISA {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// ---- comparisons ----
//
// Spelled out for AVX2, where the compiler compares a vector of two registers element by element.

// Where an element's number is below `count` (0 .. 16): all bits.
inline ivec16 first_elements(int count) {
  alignas(64) static constexpr int32_t kOnesThenZeros[32] = {-1, -1, -1, -1, -1, -1, -1, -1,
                                                             -1, -1, -1, -1, -1, -1, -1, -1};
  return load_int(kOnesThenZeros + 16 - count);
}

inline vec16 choose(ivec16 truths, vec16 a, vec16 b) { return (vec16)(((ivec16)a & truths) | ((ivec16)b & ~truths)); }

// `otherwise` where x < least; x NaN is not.
inline vec16 unless_below(vec16 x, vec16 least, vec16 value, vec16 otherwise) {
#if defined(__AVX512F__)
  return x < least ? otherwise : value;
#else
  const halves a = split(x), b = split(least), v = split(value), o = split(otherwise);
  return join(_mm256_blendv_ps(v.low, o.low, _mm256_cmp_ps(a.low, b.low, _CMP_LT_OQ)),
              _mm256_blendv_ps(v.high, o.high, _mm256_cmp_ps(a.high, b.high, _CMP_LT_OQ)));
#endif
}

inline bool any_equal(vec16 x, vec16 y) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)x, (__m512)y, _CMP_EQ_OQ) != 0;
#else
  const halves a = split(x), b = split(y);
  return _mm256_movemask_ps(_mm256_or_ps(_mm256_cmp_ps(a.low, b.low, _CMP_EQ_OQ),
                                         _mm256_cmp_ps(a.high, b.high, _CMP_EQ_OQ))) != 0;
#endif
}

// Whether one is NaN or +infinity.
inline bool any_not_below_infinity(vec16 x) {
  const vec16 infinity = splat(kInfinity);
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)x, (__m512)infinity, _CMP_NLT_UQ) != 0;
#else
  const halves a = split(x), b = split(infinity);
  return _mm256_movemask_ps(_mm256_or_ps(_mm256_cmp_ps(a.low, b.low, _CMP_NLT_UQ),
                                         _mm256_cmp_ps(a.high, b.high, _CMP_NLT_UQ))) != 0;
#endif
}

// ---- exponentials ----

// significand * 2^power for a whole power in -126 .. 128, and 0 where `x` is below `least`, whatever the rest.
inline vec16 times_power_of_two(vec16 significand, vec16 power, vec16 x, vec16 least) {
#if defined(__AVX512F__)
  const __mmask16 large_enough = _mm512_cmp_ps_mask((__m512)x, (__m512)least, _CMP_NLT_UQ);  // NaN is
  return (vec16)_mm512_maskz_scalef_ps(large_enough, (__m512)significand, (__m512)power);
#else
  // In two steps, since 2^128 is no float32 although 2^127.9 is.
  const ivec16 whole = to_int(power), half = whole >> 1;
  const vec16 result = significand * (vec16)((half + 127) << 23) * (vec16)((whole - half + 127) << 23);
  return unless_below(x, least, result, splat(0.0f));
#endif
}

inline vec16 exp(vec16 x) {
  x = min(splat(89.0f), x);  // whose result is infinite; the second operand where one is NaN
  const vec16 power = round_even(x * splat(1.44269504f));
  vec16 r = fma(power, splat(-0.693359375f), x);  // ln 2 in two parts: the first times `power` is exact
  r = fma(power, splat(2.12194440e-4f), r);
  // 1 + r + r^2 q(r) with the q of least relative error where |r| <= ln 2 / 2: 3.1e-9.
  vec16 p = splat(1.38146023e-3f);
  p = fma(p, r, splat(8.36871564e-3f));
  p = fma(p, r, splat(4.1668389e-2f));
  p = fma(p, r, splat(1.66665211e-1f));
  p = fma(p, r, splat(4.9999994e-1f));
  p = fma(p, r, splat(1.0f));
  p = fma(p, r, splat(1.0f));
  return times_power_of_two(p, power, x, splat(-87.3f));
}

// 2^x for x <= 100, within 3e-7 of the result; 0 below -126 (and for -infinity), NaN for NaN.
inline vec16 exp2(vec16 x) {
  const vec16 power = round_even(x);
  const vec16 r = x - power;
  // The polynomial through (0, 1) of least relative error on -1/2 .. 1/2: 9.2e-8.
  vec16 p = splat(1.3264727e-3f);
  p = fma(p, r, splat(9.6715130e-3f));
  p = fma(p, r, splat(5.5507336e-2f));
  p = fma(p, r, splat(2.4022243e-1f));
  p = fma(p, r, splat(6.9314700e-1f));
  p = fma(p, r, splat(1.0f));
#if defined(__AVX512F__)
  return times_power_of_two(p, power, x, splat(-126.0f));
#else
  const vec16 result = p * (vec16)((to_int(power) + 127) << 23);  // the powers that count fit one step
  return unless_below(x, splat(-126.0f), result, splat(0.0f));
#endif
}

inline vec16 erf(vec16 x) {
  // 1 - e^(-|x| g(|x|)), where g is the polynomial that makes the error of the whole least on 0 .. 4: 1.6e-8. Beyond 4
  // the float32 next to the value is 1.
  const ivec16 sign = (ivec16)x & std::numeric_limits<int32_t>::min();
  const vec16 a = min(splat(4.0f), (vec16)((ivec16)x & std::numeric_limits<int32_t>::max()));  // NaN stays NaN
  vec16 g = splat(3.1440184e-5f);
  g = fma(g, a, splat(-3.0880238e-4f));
  g = fma(g, a, splat(1.0324023e-3f));
  g = fma(g, a, splat(5.3693232e-4f));
  g = fma(g, a, splat(-1.9583959e-2f));
  g = fma(g, a, splat(1.0291962e-1f));
  g = fma(g, a, splat(6.3659775e-1f));
  g = fma(g, a, splat(1.1283803f));
  const vec16 magnitude = splat(1.0f) - exp(-(g * a));
  return (vec16)((ivec16)magnitude | sign);
}

// ---- parts of a vector ----

// The first `count` (0 .. 15) elements from `p`, zeros after them; reads no others.
inline vec16 load_part(const float* p, int count) {
#if defined(__AVX512F__)
  return (vec16)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p);
#else
  float e[16] = {};
  std::memcpy(e, p, sizeof(float) * count);
  return load(e);
#endif
}

inline void store_part(float* p, vec16 x, int count) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << count) - 1), (__m512)x);
#else
  float e[16];
  store(e, x);
  std::memcpy(p, e, sizeof(float) * count);
#endif
}

#if !defined(__AVX512F__)
inline __m256i to_bf16(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x), high = _mm256_srli_epi32(bits, 16);
  const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
  const __m256i rounded =
      _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
  return _mm256_blendv_epi8(rounded, quiet, _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)));
}
#endif

// Rounded to bfloat16, nearest even; NaN stays NaN.
inline void store_bf16(uint16_t* p, vec16 x) {
#if defined(__AVX512F__)
  const ivec16 bits = (ivec16)x;
  const ivec16 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const ivec16 result = x == x ? rounded : (bits >> 16) | 0x40;
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16((__m512i)result));
#else
  const halves h = split(x);
  const __m256i packed = _mm256_packus_epi32(to_bf16(h.low), to_bf16(h.high));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
#endif
}

// ---- norms ----

// The sum of f(x[i]) in one order for every caller: four running sums of 16, these together, their elements by halves.
// `f(values, count)` has `count` elements that count and must give 0 for the others.
template <typename F>
inline float sum_of(const float* x, int width, const F& f) {
  vec16 sums[4] = {splat(0.0f), splat(0.0f), splat(0.0f), splat(0.0f)};
  int i = 0;
  for (; i + 64 <= width; i += 64)
    for (int k = 0; k < 4; ++k) sums[k] += f(load(x + i + 16 * k), 16);
  for (; i + 16 <= width; i += 16) sums[0] += f(load(x + i), 16);
  if (i < width) sums[1] += f(load_part(x + i, width - i), width - i);
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// out[i] = f(x[i], i) for all i; `f(values, i, count)` reads no more than `count` elements of what else it needs.
template <typename F>
inline void map_row(const float* x, int width, float* out, const F& f) {
  int i = 0;
  for (; i + 16 <= width; i += 16) store(out + i, f(load(x + i), i, 16));
  if (i < width) store_part(out + i, f(load_part(x + i, width - i), i, width - i), width - i);
}

inline vec16 load_some(const float* p, int count) { return count == 16 ? load(p) : load_part(p, count); }

inline void layer_norm(const float* x, const float* weight, const float* bias, float epsilon, int width, float* out) {
  const float mean = sum_of(x, width, [](vec16 v, int) { return v; }) / width;
  const float squares = sum_of(x, width, [mean](vec16 v, int count) {
    const vec16 d = v - splat(mean);
    return choose(first_elements(count), d * d, splat(0.0f));
  });
  const float factor = 1.0f / std::sqrt(squares / width + epsilon);
  map_row(x, width, out, [=](vec16 v, int i, int count) {
    return fma((v - splat(mean)) * splat(factor), load_some(weight + i, count), load_some(bias + i, count));
  });
}

inline void rms_norm(const float* x, const float* weight, float epsilon, int width, float* out) {
  const float squares = sum_of(x, width, [](vec16 v, int) { return v * v; });
  const float factor = 1.0f / std::sqrt(squares / width + epsilon);
  map_row(x, width, out, [=](vec16 v, int i, int count) {
    return v * splat(factor) * load_some(weight + i, count);
  });
}

// ---- positions and the cache ----

inline void rotate_head(float* head, const float* cosines, const float* sines, int head_size) {
  const int half = head_size / 2;
  float* second_half = head + half;
  for (int e = 0; e < half; e += 16) {
    const int count = half - e < 16 ? half - e : 16;
    const vec16 a = load_some(head + e, count), b = load_some(second_half + e, count);
    const vec16 c = load_some(cosines + e, count), s = load_some(sines + e, count);
    const vec16 first = fma(a, c, -(b * s)), second = fma(b, c, a * s);
    if (count == 16) {
      store(head + e, first);
      store(second_half + e, second);
    } else {
      store_part(head + e, first, count);
      store_part(second_half + e, second, count);
    }
  }
}

inline void rotate_and_store(float* qkv, const float* cosines, const float* sines, const AttentionShape& shape,
                             const Cache& cache, const int32_t* block_table, int position, int first_kv_head,
                             int last_kv_head) {
  const int64_t head_size = shape.head_size, block_size = shape.block_size, num_kv_heads = shape.num_kv_heads;
  const float* keys = qkv + shape.num_heads * head_size;
  const float* values = keys + num_kv_heads * head_size;
  if (cosines != nullptr) {
    const int group = shape.num_heads / shape.num_kv_heads;
    for (int h = first_kv_head * group; h < last_kv_head * group; ++h)
      rotate_head(qkv + h * head_size, cosines, sines, shape.head_size);
    for (int h = shape.num_heads + first_kv_head; h < shape.num_heads + last_kv_head; ++h)
      rotate_head(qkv + h * head_size, cosines, sines, shape.head_size);
  }

  const int64_t slot = position % block_size;
  for (int64_t h = first_kv_head; h < last_kv_head; ++h) {
    const float* key = keys + h * head_size;
    const float* value = values + h * head_size;
    const int64_t base = (block_table[position / block_size] * num_kv_heads + h) * head_size * block_size;
    if (shape.is_bf16) {
      uint16_t* key_pairs = static_cast<uint16_t*>(cache.keys) + base + slot * 2;
      uint16_t* value_pairs = static_cast<uint16_t*>(cache.values) + base + slot / 2 * head_size * 2 + slot % 2;
      for (int64_t e = 0; e < head_size; ++e) {
        key_pairs[e / 2 * block_size * 2 + e % 2] = narrow(key[e]);
        value_pairs[e * 2] = narrow(value[e]);
      }
    } else {
      float* key_column = static_cast<float*>(cache.keys) + base + slot;
      for (int64_t e = 0; e < head_size; ++e) key_column[e * block_size] = key[e];
      std::memcpy(static_cast<float*>(cache.values) + base + slot * head_size, value, sizeof(float) * head_size);
    }
  }
}

// ---- the greedy choice ----

inline bool choose_greedy(const float* logits, int width, int32_t* id, float* log_probability) {
  const int whole = width / 16 * 16, rest = width - whole;
  // Elements of the last part that are not there count as -infinity: they are never chosen and add nothing.
  const vec16 last = choose(first_elements(rest), load_part(logits + whole, rest), splat(-kInfinity));
  if (any_not_below_infinity(last)) return false;
  vec16 maxima = last;
  for (int i = 0; i < whole; i += 16) {
    const vec16 x = load(logits + i);
    if (any_not_below_infinity(x)) return false;
    maxima = max(maxima, x);
  }
  const float maximum = largest(maxima);
  if (maximum == -kInfinity) return false;

  // Sums of 1024 in float32 and their sum in float64: no term is lost among many.
  double total = 0.0;
  for (int i = 0; i < whole;) {
    vec16 some = splat(0.0f);
    for (const int end = whole < i + 1024 ? whole : i + 1024; i < end; i += 16)
      some += exp(load(logits + i) - splat(maximum));
    total += sum(some);
  }
  total += sum(exp(last - splat(maximum)));
  *log_probability = static_cast<float>(-std::log(total));

  int first = 0;
  while (first < whole && !any_equal(load(logits + first), splat(maximum))) first += 16;
  while (logits[first] != maximum) ++first;
  *id = first;
  return true;
}

}  // namespace gyrfalcon::GYRFALCON_ISA
