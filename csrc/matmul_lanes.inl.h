// vec16 and ivec16 in a form that compilers keep in registers on AVX2, too: two halves instead of one long vector.
#pragma once

#include <cstdint>
#include <cstring>

#include "vec.h"

namespace gyrfalcon::GYRFALCON_ISA {

#if defined(__AVX512F__)

using Floats = __m512;
using Ints = __m512i;

inline Floats zero_floats() { return _mm512_setzero_ps(); }
inline Ints zero_ints() { return _mm512_setzero_si512(); }
inline Floats load_floats(const void* p) { return _mm512_loadu_ps(p); }
inline Ints load_ints(const void* p) { return _mm512_loadu_si512(p); }
inline Floats load_halves(const void* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p))); }
inline Ints load_bytes(const void* p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))); }
inline void store_lanes(void* p, Floats x) { _mm512_storeu_ps(p, x); }
inline void store_lanes(void* p, Ints x) { _mm512_storeu_si512(p, x); }
inline Floats even_halves(Ints pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }
inline Floats odd_halves(Ints pairs) {
  return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int32_t>(0xffff0000))));
}
inline Floats multiply_add(float a, Floats b, Floats c) { return _mm512_fmadd_ps(_mm512_set1_ps(a), b, c); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats scaled(float a, Floats b) { return _mm512_mul_ps(_mm512_set1_ps(a), b); }
inline Floats to_floats(Ints x) { return _mm512_cvtepi32_ps(x); }
inline Ints minus(Ints a, Ints b) { return _mm512_sub_epi32(a, b); }
inline Ints times(Ints a, int32_t b) { return _mm512_mullo_epi32(a, _mm512_set1_epi32(b)); }
inline Ints splat_ints(int32_t x) { return _mm512_set1_epi32(x); }
inline Ints low_codes(Ints x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
inline Ints high_codes(Ints x) { return _mm512_and_si512(_mm512_srli_epi16(x, 4), _mm512_set1_epi8(15)); }

#else

struct Floats {
  __m256 low, high;
};
struct Ints {
  __m256i low, high;
};

inline Floats zero_floats() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Ints zero_ints() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline Floats load_floats(const void* p) {
  const float* q = static_cast<const float*>(p);
  return {_mm256_loadu_ps(q), _mm256_loadu_ps(q + 8)};
}
inline Ints load_ints(const void* p) {
  const __m256i* q = static_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
}
inline Floats load_halves(const void* p) {
  const __m128i* q = static_cast<const __m128i*>(p);
  return {_mm256_cvtph_ps(_mm_loadu_si128(q)), _mm256_cvtph_ps(_mm_loadu_si128(q + 1))};
}
inline Ints load_bytes(const void* p) {
  const __m128i bytes = _mm_loadu_si128(static_cast<const __m128i*>(p));
  return {_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8))};
}
inline void store_lanes(void* p, Floats x) {
  float* q = static_cast<float*>(p);
  _mm256_storeu_ps(q, x.low);
  _mm256_storeu_ps(q + 8, x.high);
}
inline void store_lanes(void* p, Ints x) {
  __m256i* q = static_cast<__m256i*>(p);
  _mm256_storeu_si256(q, x.low);
  _mm256_storeu_si256(q + 1, x.high);
}
inline Floats even_halves(Ints pairs) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(pairs.low, 16)),
          _mm256_castsi256_ps(_mm256_slli_epi32(pairs.high, 16))};
}
inline Floats odd_halves(Ints pairs) {
  const __m256i mask = _mm256_set1_epi32(static_cast<int32_t>(0xffff0000));
  return {_mm256_castsi256_ps(_mm256_and_si256(pairs.low, mask)),
          _mm256_castsi256_ps(_mm256_and_si256(pairs.high, mask))};
}
inline Floats multiply_add(Floats a, Floats b, Floats c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
inline Floats multiply_add(float a, Floats b, Floats c) {
  const __m256 wide = _mm256_set1_ps(a);
  return multiply_add(Floats{wide, wide}, b, c);
}
inline Floats scaled(float a, Floats b) {
  const __m256 wide = _mm256_set1_ps(a);
  return {_mm256_mul_ps(wide, b.low), _mm256_mul_ps(wide, b.high)};
}
inline Floats to_floats(Ints x) { return {_mm256_cvtepi32_ps(x.low), _mm256_cvtepi32_ps(x.high)}; }
inline Ints minus(Ints a, Ints b) { return {_mm256_sub_epi32(a.low, b.low), _mm256_sub_epi32(a.high, b.high)}; }
inline Ints times(Ints a, int32_t b) {
  const __m256i wide = _mm256_set1_epi32(b);
  return {_mm256_mullo_epi32(a.low, wide), _mm256_mullo_epi32(a.high, wide)};
}
inline Ints splat_ints(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline Ints low_codes(Ints x) {
  const __m256i mask = _mm256_set1_epi8(15);
  return {_mm256_and_si256(x.low, mask), _mm256_and_si256(x.high, mask)};
}
inline Ints high_codes(Ints x) {
  const __m256i mask = _mm256_set1_epi8(15);
  return {_mm256_and_si256(_mm256_srli_epi16(x.low, 4), mask), _mm256_and_si256(_mm256_srli_epi16(x.high, 4), mask)};
}

#endif

inline int32_t load_four_bytes(const uint8_t* p) {
  int32_t x;
  std::memcpy(&x, p, 4);
  return x;
}

inline void prefetch(const uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0); }

}  // namespace gyrfalcon::GYRFALCON_ISA
