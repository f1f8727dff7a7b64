// Activations as products read them.
#pragma once

#include <limits>

#include "matrix.h"
#include "rows.inl.h"
#include "vec.h"

namespace gyrfalcon::GYRFALCON_ISA {

// Sixteen inputs of a row from packed position `i` on; zeros beyond the width.
struct RowReader {
  const float* values;
  const int32_t* order;
  int width;

  vec16 operator()(int i) const {
    const int count = width - i;
    if (count <= 0) return splat(0.0f);
    if (!order) return count >= 16 ? load(values + i) : load_part(values + i, count);
    float e[16] = {};
    for (int k = 0; k < 16 && k < count; ++k) e[k] = values[order[i + k]];
    return load(e);
  }
};

// The scale that maps the largest magnitude to 127. NaN where an input is not finite: it makes the row's outputs NaN.
inline float int8_scale(vec16 magnitudes, vec16 not_finite) {
  if (largest(not_finite) != 0.0f) return std::numeric_limits<float>::quiet_NaN();
  return largest(magnitudes) / 127.0f;
}

struct Magnitudes {
  vec16 largest_yet = splat(0.0f);
  vec16 not_finite = splat(0.0f);

  void add(vec16 x) {
    const vec16 magnitude = (vec16)((ivec16)x & 0x7fffffff);
    const ivec16 is_finite = magnitude < splat(std::numeric_limits<float>::infinity());
    not_finite = is_finite ? not_finite : splat(1.0f);
    largest_yet = is_finite ? max(largest_yet, magnitude) : largest_yet;
  }
  float scale() const { return int8_scale(largest_yet, not_finite); }
};

// round(x / scale), at most 127 in magnitude (a scale below the normal numbers is not exact).
inline ivec16 int8_codes(vec16 x, vec16 scale) {
  return to_int(max(min(round_even(x / scale), splat(127.0f)), splat(-127.0f)));
}

inline void store_bytes(uint8_t* p, ivec16 x) {
#if defined(__AVX512F__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8((__m512i)x));
#else
  int32_t e[16];
  std::memcpy(e, &x, 64);
  for (int i = 0; i < 16; ++i) p[i] = static_cast<uint8_t>(e[i]);
#endif
}

// Codes of positions begin .. end, `offset` added to each; returns the sum of the codes without it.
inline int32_t store_codes(const RowReader& read, int begin, int end, float scale, int offset, uint8_t* out) {
  const bool has_codes = scale > 0.0f;  // neither zero nor NaN
  const vec16 scales = splat(scale);
  ivec16 sums = {};
  for (int i = begin; i < end; i += 16) {
    const ivec16 codes = has_codes ? int8_codes(read(i), scales) : ivec16{};
    sums += codes;
    store_bytes(out + i, codes + offset);
  }
  int32_t total = 0;
  for (int i = 0; i < 16; ++i) total += sums[i];
  return total;
}

inline void prepare(const float* values, const int32_t* order, const Activations& x, int row) {
  const RowReader read{values, order, x.width};
  uint8_t* const out = x.data + row * x.stride;
  switch (x.form) {
    case Form::kFloat32: {
      float* const floats = reinterpret_cast<float*>(out);
      for (int i = 0; i < x.width; i += 16) {
        const int count = x.width - i;
        if (count >= 16)
          store(floats + i, read(i));
        else
          store_part(floats + i, read(i), count);
      }
      return;
    }
    case Form::kBFloat16: {
      const int padded = padded_width(Storage::kBFloat16, x.width, 0);
      for (int i = 0; i < padded; i += 16) store_bf16(reinterpret_cast<uint16_t*>(out) + i, read(i));
      return;
    }
    case Form::kOffsetInt8: {
      Magnitudes magnitudes;
      for (int i = 0; i < x.width; i += 16) magnitudes.add(read(i));
      x.scales[row] = magnitudes.scale();
      store_codes(read, 0, padded_width(Storage::kInt8, x.width, 0), x.scales[row], 128, out);
      return;
    }
    case Form::kGroupedInt8: {
      const int padded = padded_width(Storage::kInt4, x.width, x.group), num_groups = padded / x.group;
      for (int group = 0; group < num_groups; ++group) {
        const int begin = group * x.group, end = begin + x.group;
        Magnitudes magnitudes;
        for (int i = begin; i < end; i += 16) magnitudes.add(read(i));
        const int64_t index = static_cast<int64_t>(row) * num_groups + group;
        x.scales[index] = magnitudes.scale();
        x.sums[index] = store_codes(read, begin, end, x.scales[index], 0, out);
      }
      return;
    }
  }
}

}  // namespace gyrfalcon::GYRFALCON_ISA
