// From row-major weights to the panels of matrix.h, and how prepared rows of activations lie in memory.
//
// Every packing function fills the panels first_panel .. last_panel of a matrix, so that threads can share it out. Its
// outputs are counted in slots: slot s, the packed output s, is row rows[s] of the source, or nothing where that is -1.
// `rows` null: slot s is row s. Slots from num_slots on are nothing, too.
#pragma once

#include "matrix.h"

namespace gyrfalcon {

// Elements of two or four bytes, [rows][width], which keep their type: kFloat32, kFloat16 or kBFloat16.
void pack_floats(Storage storage, const void* source, int width, const int32_t* rows, int num_slots, int first_panel,
                 int last_panel, void* panels);

// Signed codes [rows][width]; also fills the sums of the panels' slots. A sum of products must fit in 32 bits:
// width <= kMaxInt8Width.
constexpr int kMaxInt8Width = 65536;
void pack_int8(const int8_t* codes, int width, const int32_t* rows, int num_slots, int first_panel, int last_panel,
               void* panels, int32_t* sums);

// Codes 0 .. 15, one a byte, [rows][width].
void pack_int4(const uint8_t* codes, int width, int group, const int32_t* rows, int num_slots, int first_panel,
               int last_panel, void* panels);

// Bytes between prepared rows of activations: room for the padded width, and an odd number of cache lines, so that the
// rows of a tile or a register block never meet in a cache set.
size_t activation_stride(Form form, int width, int group);

}  // namespace gyrfalcon
