// Sixteen float32 side by side, in one register with AVX-512 and in two with AVX2: kernels are written once.
//
// Included by files that are compiled once for each kind of processor, with GYRFALCON_ISA naming the namespace, so that
// no code of one kind is linked into another.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#ifndef GYRFALCON_ISA
#error "define GYRFALCON_ISA: avx2, avx512 or amx"
#endif

namespace gyrfalcon::GYRFALCON_ISA {

typedef float vec16 __attribute__((vector_size(64)));
typedef int32_t ivec16 __attribute__((vector_size(64)));

#if defined(__AVX512F__)

inline vec16 load(const float* p) { return (vec16)_mm512_loadu_ps(p); }
inline void store(float* p, vec16 x) { _mm512_storeu_ps(p, (__m512)x); }
inline vec16 splat(float x) { return (vec16)_mm512_set1_ps(x); }
// a * b + c, rounded once.
inline vec16 fma(vec16 a, vec16 b, vec16 c) { return (vec16)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
inline vec16 max(vec16 a, vec16 b) { return (vec16)_mm512_max_ps((__m512)a, (__m512)b); }
inline vec16 min(vec16 a, vec16 b) { return (vec16)_mm512_min_ps((__m512)a, (__m512)b); }
inline vec16 round_even(vec16 x) { return (vec16)_mm512_roundscale_ps((__m512)x, 8); }
inline vec16 from_int(ivec16 x) { return (vec16)_mm512_cvtepi32_ps((__m512i)x); }
inline ivec16 to_int(vec16 x) { return (ivec16)_mm512_cvtps_epi32((__m512)x); }
inline ivec16 load_int(const void* p) { return (ivec16)_mm512_loadu_si512(p); }
inline vec16 load_f16(const void* p) {
  return (vec16)_mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
}

#else

struct halves {
  __m256 low, high;
};
inline halves split(vec16 x) {
  halves h;
  std::memcpy(&h, &x, 64);
  return h;
}
inline vec16 join(__m256 low, __m256 high) {
  const halves h{low, high};
  vec16 x;
  std::memcpy(&x, &h, 64);
  return x;
}
inline vec16 load(const float* p) { return join(_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)); }
inline void store(float* p, vec16 x) {
  const halves h = split(x);
  _mm256_storeu_ps(p, h.low);
  _mm256_storeu_ps(p + 8, h.high);
}
inline vec16 splat(float x) { return join(_mm256_set1_ps(x), _mm256_set1_ps(x)); }
inline vec16 fma(vec16 a, vec16 b, vec16 c) {
  const halves x = split(a), y = split(b), z = split(c);
  return join(_mm256_fmadd_ps(x.low, y.low, z.low), _mm256_fmadd_ps(x.high, y.high, z.high));
}
inline vec16 max(vec16 a, vec16 b) {
  const halves x = split(a), y = split(b);
  return join(_mm256_max_ps(x.low, y.low), _mm256_max_ps(x.high, y.high));
}
inline vec16 min(vec16 a, vec16 b) {
  const halves x = split(a), y = split(b);
  return join(_mm256_min_ps(x.low, y.low), _mm256_min_ps(x.high, y.high));
}
inline vec16 round_even(vec16 x) {
  const halves h = split(x);
  return join(_mm256_round_ps(h.low, 8), _mm256_round_ps(h.high, 8));
}
inline vec16 from_int(ivec16 x) {
  __m256i h[2];
  std::memcpy(h, &x, 64);
  return join(_mm256_cvtepi32_ps(h[0]), _mm256_cvtepi32_ps(h[1]));
}
inline ivec16 to_int(vec16 x) {
  const halves h = split(x);
  const __m256i y[2] = {_mm256_cvtps_epi32(h.low), _mm256_cvtps_epi32(h.high)};
  ivec16 result;
  std::memcpy(&result, y, 64);
  return result;
}
inline ivec16 load_int(const void* p) {
  ivec16 x;
  std::memcpy(&x, p, 64);
  return x;
}
inline vec16 load_f16(const void* p) {
  const __m128i* q = static_cast<const __m128i*>(p);
  return join(_mm256_cvtph_ps(_mm_loadu_si128(q)), _mm256_cvtph_ps(_mm_loadu_si128(q + 1)));
}

#endif

// Pairs of bfloat16 (16 of them, low half first) as two vectors of float32.
inline vec16 even_bf16(ivec16 pairs) { return (vec16)(pairs << 16); }
inline vec16 odd_bf16(ivec16 pairs) { return (vec16)(pairs & (int32_t)0xffff0000); }

inline float widen(uint16_t bf16) {
  const uint32_t bits = static_cast<uint32_t>(bf16) << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// To bfloat16, nearest even; NaN stays NaN.
inline uint16_t narrow(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Adds up the elements in a fixed order: by halves.
inline float sum(vec16 x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)x);
#else
  float e[16];
  std::memcpy(e, &x, 64);
  for (int width = 8; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) e[i] += e[i + width];
  return e[0];
#endif
}

inline float largest(vec16 x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)x);
#else
  float e[16];
  std::memcpy(e, &x, 64);
  for (int width = 8; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) e[i] = e[i] > e[i + width] ? e[i] : e[i + width];
  return e[0];
#endif
}

// e^x, within 2 units in the last place; 0 below -87.3 (and for -infinity), +infinity above 88.7, NaN for NaN. By
// 2^n e^r with |r| <= ln 2 / 2, a polynomial of the sixth power in r, split ln 2 (Cody and Waite).
vec16 exp(vec16 x);

// The error function, within 2e-7 absolute.
vec16 erf(vec16 x);

}  // namespace gyrfalcon::GYRFALCON_ISA
