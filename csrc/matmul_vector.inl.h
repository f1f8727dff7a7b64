// Matrix products in registers of sixteen lanes: every storage, on AVX-512 or AVX2.
//
// A block is some rows times some panels. Each of its elements is one chain of additions in ascending inner position,
// whatever else the block holds; where the inner width is cut into chunks, the sums rest in memory in between.
#pragma once

#include <type_traits>

#include "matmul_finish.inl.h"
#include "matmul_lanes.inl.h"
#include "matrix.h"
#include "vec.h"

namespace gyrfalcon::GYRFALCON_ISA {

// ---- blocks ----

// The largest block: its sums and what they are made from fill the registers.
#if defined(__AVX512F__)
constexpr int kVectorRows = 6, kVectorPanels = 4;
#else
constexpr int kVectorRows = 3, kVectorPanels = 2;
#endif

// A block's operands over inner positions begin .. end.
struct VectorBlock {
  const uint8_t* panels[kVectorPanels];  // each at position `begin`
  const uint8_t* ahead[kVectorPanels];   // what to fetch while the panel is read, line by line
  const uint8_t* x;                      // the first row
  int64_t x_stride;
  int begin, end;
  uint8_t* sums;  // [row][panel][64 bytes]
  bool is_first;  // sums begin at zero
};

constexpr int kLaneBytes = 64;

// Bytes ahead that each stream of weights is fetched.
constexpr int kFetchAhead = 4096;

// What the storages differ in. A step is what one register of weights holds: kPositions inner positions in kStepBytes.

struct Float32Product {
  using Sum = Floats;
  static constexpr int kPositions = 1, kStepBytes = 64;
  struct Weights {
    Floats w;
  };
  static Weights weights(const uint8_t* p) { return {load_floats(p)}; }
  static Sum add(Sum sum, const uint8_t* x, int k, const Weights& w) {
    return multiply_add(reinterpret_cast<const float*>(x)[k], w.w, sum);
  }
};

struct Float16Product {
  using Sum = Floats;
  static constexpr int kPositions = 1, kStepBytes = 32;
  struct Weights {
    Floats w;
  };
  static Weights weights(const uint8_t* p) { return {load_halves(p)}; }
  static Sum add(Sum sum, const uint8_t* x, int k, const Weights& w) {
    return multiply_add(reinterpret_cast<const float*>(x)[k], w.w, sum);
  }
};

struct BFloat16Product {
  using Sum = Floats;
  static constexpr int kPositions = 2, kStepBytes = 64;
  struct Weights {
    Floats even, odd;
  };
  static Weights weights(const uint8_t* p) {
    const Ints pairs = load_ints(p);
    return {even_halves(pairs), odd_halves(pairs)};
  }
  static Sum add(Sum sum, const uint8_t* x, int k, const Weights& w) {
    const float* const floats = reinterpret_cast<const float*>(x) + k;
    return multiply_add(floats[1], w.odd, multiply_add(floats[0], w.even, sum));
  }
  // The last position of an odd width: the activations may end there.
  static Sum add_last(Sum sum, const uint8_t* x, int k, const Weights& w) {
    return multiply_add(reinterpret_cast<const float*>(x)[k], w.even, sum);
  }
};

#if defined(__AVX512F__)

struct Int8Product {
  using Sum = Ints;
  static constexpr int kPositions = 4, kStepBytes = 64;
  struct Weights {
    Ints w;
  };
  static Weights weights(const uint8_t* p) { return {load_ints(p)}; }
  static Sum add(Sum sum, const uint8_t* x, int k, const Weights& w) {
    return _mm512_dpbusd_epi32(sum, _mm512_set1_epi32(load_four_bytes(x + k)), w.w);
  }
};

// codes: unsigned bytes; x: four signed bytes.
inline Ints add_small_codes(Ints sum, Ints codes, const uint8_t* x) {
  return _mm512_dpbusd_epi32(sum, codes, _mm512_set1_epi32(load_four_bytes(x)));
}

#else

struct Int8Product {
  using Sum = Ints;
  static constexpr int kPositions = 4, kStepBytes = 64;
  struct Weights {
    Ints w, magnitudes;
  };
  static Weights weights(const uint8_t* p) {
    const Ints w = load_ints(p);
    return {w, {_mm256_abs_epi8(w.low), _mm256_abs_epi8(w.high)}};
  }
  // VPMADDUBSW saturates at 16 bits, so the signs go to the activations: two products of |w| <= 128 and |x| <= 127 are
  // 32512 at most. The sum is that of signed activations.
  static Sum add(Sum sum, const uint8_t* x, int k, const Weights& w) {
    const __m256i q = _mm256_set1_epi32(load_four_bytes(x + k) ^ static_cast<int32_t>(0x80808080));
    const __m256i ones = _mm256_set1_epi16(1);
    const __m256i low = _mm256_maddubs_epi16(w.magnitudes.low, _mm256_sign_epi8(q, w.w.low));
    const __m256i high = _mm256_maddubs_epi16(w.magnitudes.high, _mm256_sign_epi8(q, w.w.high));
    return {_mm256_add_epi32(sum.low, _mm256_madd_epi16(low, ones)),
            _mm256_add_epi32(sum.high, _mm256_madd_epi16(high, ones))};
  }
};

inline Ints add_small_codes(Ints sum, Ints codes, const uint8_t* x) {
  const __m256i q = _mm256_set1_epi32(load_four_bytes(x)), ones = _mm256_set1_epi16(1);
  const __m256i low = _mm256_maddubs_epi16(codes.low, q), high = _mm256_maddubs_epi16(codes.high, q);
  return {_mm256_add_epi32(sum.low, _mm256_madd_epi16(low, ones)),
          _mm256_add_epi32(sum.high, _mm256_madd_epi16(high, ones))};
}

#endif

template <class Product, int kRows, int kPanels>
void vector_block(const VectorBlock& b) {
  constexpr int kPositions = Product::kPositions, kStepBytes = Product::kStepBytes;
  constexpr int kStepsALine = 64 / kStepBytes;
  typename Product::Sum sums[kRows][kPanels];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int p = 0; p < kPanels; ++p) {
      if (b.is_first)
        std::memset(&sums[r][p], 0, kLaneBytes);
      else
        std::memcpy(&sums[r][p], b.sums + (r * kPanels + p) * kLaneBytes, kLaneBytes);
    }

  int k = b.begin;
  int64_t offset = 0;
  for (; k + kPositions * kStepsALine <= b.end; k += kPositions * kStepsALine, offset += 64) {
#pragma GCC unroll 8
    for (int p = 0; p < kPanels; ++p) prefetch(b.ahead[p] + offset);
#pragma GCC unroll 2
    for (int step = 0; step < kStepsALine; ++step) {
      typename Product::Weights w[kPanels];
#pragma GCC unroll 8
      for (int p = 0; p < kPanels; ++p) w[p] = Product::weights(b.panels[p] + offset + step * kStepBytes);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
        for (int p = 0; p < kPanels; ++p)
          sums[r][p] = Product::add(sums[r][p], b.x + r * b.x_stride, k + step * kPositions, w[p]);
    }
  }
  // What is left is one position of a float16 or bfloat16 row: integers are padded to whole lines.
  if constexpr (kStepBytes == 32 || kPositions == 2) {
    if (k < b.end)
      for (int r = 0; r < kRows; ++r)
        for (int p = 0; p < kPanels; ++p) {
          const auto w = Product::weights(b.panels[p] + offset);
          const uint8_t* const x = b.x + r * b.x_stride;
          if constexpr (kPositions == 2)
            sums[r][p] = Product::add_last(sums[r][p], x, k, w);
          else
            sums[r][p] = Product::add(sums[r][p], x, k, w);
        }
  }

#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int p = 0; p < kPanels; ++p) store_lanes(b.sums + (r * kPanels + p) * kLaneBytes, sums[r][p]);
}

// What kInt4 needs besides; all from group `begin` / group on, and [row][num_groups] for activations.
struct GroupBlock {
  const uint16_t* scales[kVectorPanels];
  const uint8_t* zeros[kVectorPanels];  // null: 8
  const float* x_scales;
  const int32_t* x_sums;
  int num_groups;
  int group;
};

template <int kRows, int kPanels>
void group_block(const VectorBlock& b, const GroupBlock& g) {
  Floats sums[kRows][kPanels];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int p = 0; p < kPanels; ++p)
      sums[r][p] = b.is_first ? zero_floats() : load_floats(b.sums + (r * kPanels + p) * kLaneBytes);

  int64_t offset = 0;
  for (int k = b.begin, group = 0; k < b.end; k += g.group, ++group) {
    Ints dots[kRows][kPanels];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
      for (int p = 0; p < kPanels; ++p) dots[r][p] = zero_ints();
    for (int i = 0; i < g.group; i += 8, offset += 64) {
#pragma GCC unroll 8
      for (int p = 0; p < kPanels; ++p) {
        prefetch(b.ahead[p] + offset);
        const Ints codes = load_ints(b.panels[p] + offset);
        const Ints low = low_codes(codes), high = high_codes(codes);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          const uint8_t* const x = b.x + r * b.x_stride + k + i;
          dots[r][p] = add_small_codes(add_small_codes(dots[r][p], low, x), high, x + 4);
        }
      }
    }
#pragma GCC unroll 8
    for (int p = 0; p < kPanels; ++p) {
      const Floats scales = load_halves(g.scales[p] + group * kPanelWidth);
      const Ints zeros = g.zeros[p] ? load_bytes(g.zeros[p] + group * kPanelWidth) : splat_ints(8);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const int64_t index = static_cast<int64_t>(r) * g.num_groups + group;
        const Ints dot = minus(dots[r][p], times(zeros, g.x_sums[index]));
        sums[r][p] = multiply_add(to_floats(dot), scaled(g.x_scales[index], scales), sums[r][p]);
      }
    }
  }

#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int p = 0; p < kPanels; ++p) store_lanes(b.sums + (r * kPanels + p) * kLaneBytes, sums[r][p]);
}

template <class Call>
inline void with_rows(int rows, const Call& call) {
  switch (rows) {
    case 1: return call(std::integral_constant<int, 1>());
    case 2: return call(std::integral_constant<int, 2>());
    case 3: return call(std::integral_constant<int, 3>());
#if defined(__AVX512F__)
    case 4: return call(std::integral_constant<int, 4>());
    case 5: return call(std::integral_constant<int, 5>());
    case 6: return call(std::integral_constant<int, 6>());
#endif
  }
}

template <class Call>
inline void with_panels(int panels, const Call& call) {
  switch (panels) {
    case 1: return call(std::integral_constant<int, 1>());
    case 2: return call(std::integral_constant<int, 2>());
#if defined(__AVX512F__)
    case 4: return call(std::integral_constant<int, 4>());
#endif
  }
}

inline void run_block(const Matrix& w, const VectorBlock& b, const GroupBlock& g, int rows, int panels) {
  with_panels(panels, [&](auto num_panels) {
    with_rows(rows, [&](auto num_rows) {
      constexpr int kRows = decltype(num_rows)::value, kPanels = decltype(num_panels)::value;
      switch (w.storage) {
        case Storage::kFloat32: return vector_block<Float32Product, kRows, kPanels>(b);
        case Storage::kFloat16: return vector_block<Float16Product, kRows, kPanels>(b);
        case Storage::kBFloat16: return vector_block<BFloat16Product, kRows, kPanels>(b);
        case Storage::kInt8: return vector_block<Int8Product, kRows, kPanels>(b);
        case Storage::kInt4: return group_block<kRows, kPanels>(b, g);
      }
    });
  });
}

// ---- whole products ----

// Inner positions of a chunk: its panels stay in the level-2 cache while all rows pass by. A multiple of every group.
inline int vector_chunk(Storage storage) {
  switch (storage) {
    case Storage::kFloat32: return 1024;
    case Storage::kFloat16:
    case Storage::kBFloat16: return 2048;
    case Storage::kInt8: return 4096;
    case Storage::kInt4: return 8192;
  }
  return 0;
}

inline size_t vector_scratch_bytes(int num_rows) {
  return static_cast<size_t>(num_rows + kVectorRows) * kVectorPanels * kLaneBytes;
}

// The value of a sum of products. kInt8: sums are of offset activations on AVX-512 (and in tiles), of signed ones on
// AVX2; less the offset both are the same integer.
inline vec16 int8_value(const Matrix& w, const Activations& x, int row, int panel, const uint8_t* sum,
                        bool has_offset) {
  const int first = panel * kPanelWidth;
  ivec16 dot = load_int(sum);
  if (has_offset) dot -= load_int(w.sums + first) * 128;
  return from_int(dot) * (splat(x.scales[row]) * load(w.scales_f32 + first));
}

inline void vector_matmul(const Matrix& w, const Activations& x, int num_rows, int first_panel, int last_panel,
                          const Output& out, void* scratch) {
#if defined(__AVX512F__)
  constexpr bool kHasOffset = true;
#else
  constexpr bool kHasOffset = false;
#endif
  const bool is_integer = w.storage == Storage::kInt8 || w.storage == Storage::kInt4;
  // Floats must not be read beyond their width: what is there may be anything, and anything times zero may be NaN.
  const int width = is_integer ? padded_width(w.storage, w.width, w.group) : w.width;
  const int64_t bytes = static_cast<int64_t>(panel_bytes(w.storage, w.width, w.group));
  const int64_t bytes_of_128 = static_cast<int64_t>(panel_bytes(w.storage, 128, w.group));
  const int chunk = num_rows <= kVectorRows ? width : vector_chunk(w.storage);
  const int num_groups = w.group ? width / w.group : 0;
  const uint8_t* const weights = static_cast<const uint8_t*>(w.panels);
  uint8_t* const sums = static_cast<uint8_t*>(scratch);

  const PanelWalk walk(first_panel, last_panel, out.finish == Finish::kGatedSilu, kVectorPanels);
  for (int index = 0, num_sets = walk.num_sets(); index < num_sets; ++index) {
    const PanelSet set = walk[index];
    for (int begin = 0; begin < width; begin += chunk) {
      VectorBlock b;
      GroupBlock g{};
      b.x_stride = x.stride;
      b.begin = begin;
      b.end = width - begin < chunk ? width : begin + chunk;
      b.is_first = begin == 0;
      for (int i = 0; i < set.count; ++i) {
        b.panels[i] = weights + set.panels[i] * bytes + begin / 128 * bytes_of_128;
        b.ahead[i] = b.panels[i] + kFetchAhead;
        if (w.storage != Storage::kInt4) continue;
        const int64_t group = static_cast<int64_t>(set.panels[i]) * num_groups + begin / w.group;
        g.scales[i] = w.scales_f16 + group * kPanelWidth;
        g.zeros[i] = w.zeros ? w.zeros + group * kPanelWidth : nullptr;
      }
      g.num_groups = num_groups;
      g.group = w.group;
      for (int row = 0; row < num_rows; row += kVectorRows) {
        const int rows = num_rows - row < kVectorRows ? num_rows - row : kVectorRows;
        b.x = x.data + row * x.stride;
        b.sums = sums + static_cast<int64_t>(row) * set.count * kLaneBytes;
        if (w.storage == Storage::kInt4) {
          const int64_t group = static_cast<int64_t>(row) * num_groups + begin / w.group;
          g.x_scales = x.scales + group;
          g.x_sums = x.sums + group;
        }
        run_block(w, b, g, rows, set.count);
      }
    }
    finish_rows(w, out, set, 0, num_rows, [&](int row, int i) {
      const uint8_t* const sum = sums + (static_cast<int64_t>(row) * set.count + i) * kLaneBytes;
      if (w.storage == Storage::kInt8) return int8_value(w, x, row, set.panels[i], sum, kHasOffset);
      return load(reinterpret_cast<const float*>(sum));
    });
  }
}

}  // namespace gyrfalcon::GYRFALCON_ISA
