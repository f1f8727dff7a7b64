// What a matrix product reads and writes: packed weights, prepared activations, outputs.
//
// Letters: M rows of activations (tokens), K inner width, N output width.
#pragma once

#include <cstddef>
#include <cstdint>

namespace gyrfalcon {

constexpr int kPanelWidth = 16;  // outputs that lie side by side in a panel: one AVX-512 register of float32

// How weights are stored. The values are part of the packed file's format.
enum class Storage : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2, kInt8 = 3, kInt4 = 4 };

// W [N, K] in panels of 16 outputs. Panel p holds the outputs 16 p .. 16 p + 15; what is missing at the end of N or K is
// zero. A panel's bytes follow one another, panels too, so that a product streams through memory once:
//
//   kFloat32, kFloat16  [K][16]
//   kBFloat16           [Kp / 2][16][2]   Kp: K rounded up to 32
//   kInt8               [Kp / 4][16][4]   Kp: K rounded up to 64; signed codes
//   kInt4               [Kp / 8][16][4]   Kp: K rounded up to the group; a byte holds code k in its low four bits and
//                                         code k + 4 in its high four bits; unsigned codes 0 .. 15
//
// An element's value is code * scale for kInt8 and (code - zero) * scale of its group for kInt4.
struct Matrix {
  Storage storage;
  int32_t num_outputs;  // N
  int32_t width;        // K
  int32_t group;        // kInt4: inner positions that share a scale: 32, 64 or 128; otherwise 0
  const void* panels;
  const float* scales_f32;     // kInt8: [N rounded up to 16]
  const uint16_t* scales_f16;  // kInt4: [panel][group][16], IEEE half precision
  const uint8_t* zeros;        // kInt4: [panel][group][16]; null: 8 everywhere
  const int32_t* sums;         // kInt8: [N rounded up to 16], the sum of an output's codes
  const float* bias;           // [N] or null
  const int32_t* order;        // [K]: packed inner position i reads input order[i]; null: as it is
};

inline int num_panels(const Matrix& w) { return (w.num_outputs + kPanelWidth - 1) / kPanelWidth; }

// Inner width as packed.
inline int padded_width(Storage storage, int width, int group) {
  int unit = 1;
  if (storage == Storage::kBFloat16) unit = 32;
  if (storage == Storage::kInt8) unit = 64;
  if (storage == Storage::kInt4) unit = group;
  return (width + unit - 1) / unit * unit;
}

inline size_t panel_bytes(Storage storage, int width, int group) {
  const size_t padded = static_cast<size_t>(padded_width(storage, width, group));
  switch (storage) {
    case Storage::kFloat32: return padded * 64;
    case Storage::kFloat16: return padded * 32;
    case Storage::kBFloat16: return padded * 32;
    case Storage::kInt8: return padded * 16;
    case Storage::kInt4: return padded * 8;
  }
  return 0;
}

// What a product wants its left side to be.
enum class Form : int32_t {
  kFloat32,   // as it is
  kBFloat16,  // rounded to nearest even
  kOffsetInt8,   // unsigned bytes q + 128, q = round(x / scale), scale = max |x| of the row / 127
  kGroupedInt8,  // signed bytes q with a scale for each group of the weights
};

// X [M, K] as a product reads it. Rows are `stride` bytes apart, zero from K up to the packed width (for kOffsetInt8 any
// byte will do, as the weights there are zero; kFloat32 is not read there).
struct Activations {
  Form form;
  int32_t width;    // K
  int32_t group;    // kGroupedInt8
  uint8_t* data;
  int64_t stride;   // bytes; a multiple of 64, and not of 4096: rows must not share cache sets
  float* scales;    // kOffsetInt8: [M]; kGroupedInt8: [M][groups]
  int32_t* sums;    // kGroupedInt8: [M][groups], the sum of a group's codes
};

// What becomes of a product's element, once the bias is added to it.
enum class Finish : int32_t {
  kStore,     // out = value
  kAdd,       // out += value
  kGelu,      // out = gelu(value), the exact form
  kGatedSilu  // panels alternate gate, up: out[16 p + i] = silu(gate) * up; half as many outputs, ranges are even
};

struct Output {
  void* data;      // float32, or bfloat16 where `is_bf16` (not with kAdd)
  int64_t stride;  // elements between rows
  bool is_bf16;
  Finish finish;
};

}  // namespace gyrfalcon
