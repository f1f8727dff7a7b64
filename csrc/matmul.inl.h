// Matrix products of one kind of processor: which way each storage and number of rows goes.
#pragma once

#include <cstring>
#include <type_traits>

#include "kernels.h"
#include "matmul_finish.inl.h"
#include "matmul_prepare.inl.h"
#include "matmul_vector.inl.h"
#include "matrix.h"
#include "vec.h"
#if defined(__AMX_TILE__)
#include "matmul_tiles.inl.h"
#endif

namespace gyrfalcon::GYRFALCON_ISA {

#if defined(__AMX_TILE__)

// From this many rows on tiles are faster than dot products in vectors; both give the same bits.
constexpr int kInt8TileRows = 7;
constexpr int kInt4TileRows = 13;

inline bool takes_tiles(const Matrix& w, int num_rows) {
  if (w.storage == Storage::kBFloat16) return true;  // always: vectors would add in another order
  if (w.storage == Storage::kInt8) return num_rows >= kInt8TileRows;
  return w.storage == Storage::kInt4 && num_rows >= kInt4TileRows;
}

#endif

inline Form form(Storage storage) {
  switch (storage) {
    case Storage::kInt8: return Form::kOffsetInt8;
    case Storage::kInt4: return Form::kGroupedInt8;
#if defined(__AMX_TILE__)
    case Storage::kBFloat16: return Form::kBFloat16;
#endif
    default: return Form::kFloat32;
  }
}

inline size_t matmul_scratch_bytes(const Matrix& w, int num_rows) {
#if defined(__AMX_TILE__)
  if (takes_tiles(w, num_rows))
    return w.storage == Storage::kInt4 ? group_tile_scratch_bytes(num_rows) : tile_scratch_bytes(num_rows);
#else
  (void)w;
#endif
  return vector_scratch_bytes(num_rows);
}

inline void matmul(const Matrix& w, const Activations& x, int num_rows, int first_panel, int last_panel,
                   const Output& out, void* scratch) {
#if defined(__AMX_TILE__)
  if (takes_tiles(w, num_rows)) {
    if (w.storage == Storage::kInt4)
      return group_tile_matmul(w, x, num_rows, first_panel, last_panel, out, scratch);
    if (w.storage == Storage::kInt8)
      return tile_matmul<Int8Tiles>(w, x, num_rows, first_panel, last_panel, out, scratch,
                                    [&](int row, int panel, const uint8_t* sum) {
                                      return int8_value(w, x, row, panel, sum, true);
                                    });
    return tile_matmul<BFloat16Tiles>(
        w, x, num_rows, first_panel, last_panel, out, scratch,
        [](int, int, const uint8_t* sum) { return load(reinterpret_cast<const float*>(sum)); });
  }
#endif
  vector_matmul(w, x, num_rows, first_panel, last_panel, out, scratch);
}

// Whether this processor and its system let the calling thread use the table.
inline bool enter_thread() {
#if defined(__AMX_TILE__)
  active_tile_config = TileConfig{};  // another library may have configured this thread's tiles since
  return request_amx();
#elif defined(__AVX512F__)
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni");
#else
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
}

}  // namespace gyrfalcon::GYRFALCON_ISA
