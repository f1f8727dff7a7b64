#include "pack.h"

#include <cstring>

namespace gyrfalcon {
namespace {

constexpr int kNothing = -1;

int source_row(const int32_t* rows, int num_slots, int slot) {
  if (slot >= num_slots) return kNothing;
  return rows ? rows[slot] : slot;
}

// Panels of `Together` neighbouring inner positions for each output: [padded / Together][16][Together].
template <int Together, class Element>
void interleave(const Element* source, int width, int padded, const int32_t* rows, int num_slots, int panel,
                Element* packed) {
  for (int column = 0; column < kPanelWidth; ++column) {
    const int row = source_row(rows, num_slots, panel * kPanelWidth + column);
    const int present = row == kNothing ? 0 : width;
    const Element* from = source + static_cast<size_t>(row == kNothing ? 0 : row) * width;
    Element* to = packed + column * Together;
    int k = 0;
    for (; k + Together <= present; k += Together, to += kPanelWidth * Together)
      std::memcpy(to, from + k, Together * sizeof(Element));
    for (; k < padded; k += Together, to += kPanelWidth * Together)
      for (int i = 0; i < Together; ++i) to[i] = k + i < present ? from[k + i] : Element(0);
  }
}

// Calls fill(source row or kNothing, packed index) for every group of the panels' slots.
template <class Fill>
void for_each_group(int num_groups, const int32_t* rows, int num_slots, int first_panel, int last_panel,
                    const Fill& fill) {
  for (int panel = first_panel; panel < last_panel; ++panel)
    for (int group = 0; group < num_groups; ++group)
      for (int column = 0; column < kPanelWidth; ++column)
        fill(source_row(rows, num_slots, panel * kPanelWidth + column), group,
             (static_cast<size_t>(panel) * num_groups + group) * kPanelWidth + column);
}

uint16_t to_half(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
  if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // 65520 and above round to infinity
  uint32_t kept, rest, half_way;
  if (magnitude < 0x38800000) {  // below 2^-14: a multiple of 2^-24
    if (magnitude < 0x33000000) return static_cast<uint16_t>(sign);
    const uint32_t shift = 126 - (magnitude >> 23), significand = (magnitude & 0x7fffff) | 0x800000;
    kept = significand >> shift;
    rest = significand & ((1u << shift) - 1);
    half_way = 1u << (shift - 1);
  } else {
    kept = (magnitude - 0x38000000) >> 13;
    rest = magnitude & 0x1fff;
    half_way = 0x1000;
  }
  if (rest > half_way || (rest == half_way && (kept & 1))) ++kept;  // a carry into the exponent is what rounding means
  return static_cast<uint16_t>(sign | kept);
}

}  // namespace

void pack_floats(Storage storage, const void* source, int width, const int32_t* rows, int num_slots, int first_panel,
                 int last_panel, void* panels) {
  const int padded = padded_width(storage, width, 0);
  const size_t bytes = panel_bytes(storage, width, 0);
  for (int panel = first_panel; panel < last_panel; ++panel) {
    uint8_t* to = static_cast<uint8_t*>(panels) + panel * bytes;
    if (storage == Storage::kFloat32)
      interleave<1>(static_cast<const uint32_t*>(source), width, padded, rows, num_slots, panel,
                    reinterpret_cast<uint32_t*>(to));
    else if (storage == Storage::kFloat16)
      interleave<1>(static_cast<const uint16_t*>(source), width, padded, rows, num_slots, panel,
                    reinterpret_cast<uint16_t*>(to));
    else
      interleave<2>(static_cast<const uint16_t*>(source), width, padded, rows, num_slots, panel,
                    reinterpret_cast<uint16_t*>(to));
  }
}

void pack_int8(const int8_t* codes, int width, const int32_t* rows, int num_slots, int first_panel, int last_panel,
               void* panels, int32_t* sums) {
  const int padded = padded_width(Storage::kInt8, width, 0);
  const size_t bytes = panel_bytes(Storage::kInt8, width, 0);
  for (int panel = first_panel; panel < last_panel; ++panel) {
    interleave<4>(codes, width, padded, rows, num_slots, panel, static_cast<int8_t*>(panels) + panel * bytes);
    for (int slot = panel * kPanelWidth; slot < (panel + 1) * kPanelWidth; ++slot) {
      const int row = source_row(rows, num_slots, slot);
      int32_t sum = 0;
      if (row != kNothing)
        for (int k = 0; k < width; ++k) sum += codes[static_cast<size_t>(row) * width + k];
      sums[slot] = sum;
    }
  }
}

void pack_int4(const uint8_t* codes, int width, int group, const int32_t* rows, int num_slots, int first_panel,
               int last_panel, void* panels) {
  const int padded = padded_width(Storage::kInt4, width, group);
  const size_t bytes = panel_bytes(Storage::kInt4, width, group);
  for (int panel = first_panel; panel < last_panel; ++panel) {
    uint8_t* to = static_cast<uint8_t*>(panels) + panel * bytes;
    for (int column = 0; column < kPanelWidth; ++column) {
      const int row = source_row(rows, num_slots, panel * kPanelWidth + column);
      const int present = row == kNothing ? 0 : width;
      const uint8_t* from = codes + static_cast<size_t>(row == kNothing ? 0 : row) * width;
      for (int k = 0; k < padded; k += 8)
        for (int i = 0; i < 4; ++i) {
          const uint8_t low = k + i < present ? from[k + i] : 0;
          const uint8_t high = k + i + 4 < present ? from[k + i + 4] : 0;
          to[k * 8 + column * 4 + i] = static_cast<uint8_t>(low | high << 4);
        }
    }
  }
}

void pack_group_scales(const float* scales, int num_groups, const int32_t* rows, int num_slots, int first_panel,
                       int last_panel, uint16_t* packed) {
  for_each_group(num_groups, rows, num_slots, first_panel, last_panel, [&](int row, int group, size_t index) {
    packed[index] = row == kNothing ? 0 : to_half(scales[static_cast<size_t>(row) * num_groups + group]);
  });
}

void pack_group_zeros(const uint8_t* zeros, int num_groups, const int32_t* rows, int num_slots, int first_panel,
                      int last_panel, uint8_t* packed) {
  for_each_group(num_groups, rows, num_slots, first_panel, last_panel, [&](int row, int group, size_t index) {
    packed[index] = row == kNothing ? 8 : zeros[static_cast<size_t>(row) * num_groups + group];
  });
}

size_t activation_stride(Form form, int width, int group) {
  size_t bytes = static_cast<size_t>(width);
  switch (form) {
    case Form::kFloat32: bytes *= 4; break;
    case Form::kBFloat16: bytes = (bytes + 31) / 32 * 64; break;
    case Form::kOffsetInt8: break;
    case Form::kGroupedInt8: bytes = (bytes + group - 1) / group * group; break;
  }
  constexpr size_t kLine = 64;
  const size_t lines = (bytes + kLine - 1) / kLine;
  return (lines | 1) * kLine;
}

}  // namespace gyrfalcon
