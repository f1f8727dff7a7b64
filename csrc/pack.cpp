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
