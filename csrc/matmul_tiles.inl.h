// Matrix products in the tile registers of AMX: bfloat16, int8 and, a group at a time, int4.
//
// A tile of activations is 16 rows (fewer where the product has fewer) of 64 bytes; a tile of weights is 1024 bytes of
// a panel as it lies in memory. Where the number of rows is not a multiple of 16, the last tile of rows overlaps the
// one before it: it computes the same bits again, and only new rows are finished.
#pragma once

#include "matmul_finish.inl.h"
#include "matmul_vector.inl.h"
#include "matrix.h"
#include "tiles.h"
#include "vec.h"

namespace gyrfalcon::GYRFALCON_ISA {

constexpr int kTileRows = 16;
constexpr int kTileRowBytes = 64;
constexpr int kTileBytes = kTileRows * kTileRowBytes;

template <int kTile>
inline void load_tile(const void* p, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
inline void store_tile(void* p, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
inline void clear_tile() {
  asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
}

// sum += x w; the operands' order in the assembly is that of Intel's manual read backwards.
struct BFloat16Tiles {
  template <int kSum, int kX, int kW>
  static void multiply() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSum), "i"(kX), "i"(kW));
  }
};
struct Int8Tiles {  // unsigned activations, signed weights
  template <int kSum, int kX, int kW>
  static void multiply() {
    asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSum), "i"(kX), "i"(kW));
  }
};
struct SignedTiles {
  template <int kSum, int kX, int kW>
  static void multiply() {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSum), "i"(kX), "i"(kW));
  }
};

// Shapes for products of tiles of `rows` rows whose inner width is `row_bytes`: tiles 0 .. 3 sums, 4 and 5 activations,
// 6 and 7 weights.
inline void configure_product_tiles(int rows, int row_bytes) {
  TileConfig config = full_tile_config();
  for (int i = 0; i < 6; ++i) config.rows[i] = static_cast<uint8_t>(rows);
  for (int i = 4; i < 6; ++i) config.row_bytes[i] = static_cast<uint16_t>(row_bytes);
  for (int i = 6; i < 8; ++i) config.rows[i] = static_cast<uint8_t>(row_bytes / 4);
  configure_tiles(config);
}

inline int num_row_tiles(int num_rows) { return (num_rows + kTileRows - 1) / kTileRows; }
inline int tile_rows(int num_rows) { return num_rows < kTileRows ? num_rows : kTileRows; }
inline int first_row_of_tile(int tile, int num_rows) {
  const int first = tile * kTileRows;
  return num_rows >= kTileRows && first + kTileRows > num_rows ? num_rows - kTileRows : first;
}

// A block's operands over bytes 0 .. num_bytes of each row of activations.
struct TileBlock {
  const uint8_t* x[2];
  int64_t x_stride;
  const uint8_t* panels[4];
  const uint8_t* ahead[4];  // what to fetch meanwhile: `lines_ahead` cache lines of each for every tile of the panel
  int lines_ahead;
  int64_t num_bytes;
  const uint8_t* before;  // sums so far, [row tile][panel][tile]; null: zero
  uint8_t* sums;          // the sums afterwards
};

template <class Product, int kRowTiles, int kPanels>
void tile_block(const TileBlock& b) {
  static_assert(kRowTiles * kPanels <= 4 && kRowTiles <= 2);
  if (!b.before) {
    clear_tile<0>();
    if constexpr (kRowTiles * kPanels > 1) clear_tile<1>();
    if constexpr (kRowTiles * kPanels > 2) clear_tile<2>();
    if constexpr (kRowTiles * kPanels > 2) clear_tile<3>();
  } else {
    load_tile<0>(b.before, kTileRowBytes);
    if constexpr (kRowTiles * kPanels > 1) load_tile<1>(b.before + kTileBytes, kTileRowBytes);
    if constexpr (kRowTiles * kPanels > 2) load_tile<2>(b.before + 2 * kTileBytes, kTileRowBytes);
    if constexpr (kRowTiles * kPanels > 2) load_tile<3>(b.before + 3 * kTileBytes, kTileRowBytes);
  }

  const uint8_t* ahead[4];
  for (int p = 0; p < kPanels; ++p) ahead[p] = b.ahead[p];
  const int64_t ahead_bytes = static_cast<int64_t>(b.lines_ahead) * 64;
  int64_t at = 0;
  for (int64_t offset = 0; offset < b.num_bytes; offset += kTileRowBytes, at += kTileBytes) {
    for (int p = 0; p < kPanels; ++p) {
      for (int64_t line = 0; line < ahead_bytes; line += 64) prefetch(ahead[p] + line);
      ahead[p] += ahead_bytes;
    }
    load_tile<4>(b.x[0] + offset, b.x_stride);
    load_tile<6>(b.panels[0] + at, kTileRowBytes);
    Product::template multiply<0, 4, 6>();
    if constexpr (kPanels > 1) {
      load_tile<7>(b.panels[1] + at, kTileRowBytes);
      Product::template multiply<1, 4, 7>();
    }
    if constexpr (kPanels > 2) {
      load_tile<6>(b.panels[2] + at, kTileRowBytes);
      Product::template multiply<2, 4, 6>();
      load_tile<7>(b.panels[3] + at, kTileRowBytes);
      Product::template multiply<3, 4, 7>();
    }
    if constexpr (kRowTiles > 1) {
      load_tile<5>(b.x[1] + offset, b.x_stride);
      Product::template multiply<kPanels, 5, 6>();
      if constexpr (kPanels > 1) Product::template multiply<3, 5, 7>();
    }
  }

  store_tile<0>(b.sums, kTileRowBytes);
  if constexpr (kRowTiles * kPanels > 1) store_tile<1>(b.sums + kTileBytes, kTileRowBytes);
  if constexpr (kRowTiles * kPanels > 2) store_tile<2>(b.sums + 2 * kTileBytes, kTileRowBytes);
  if constexpr (kRowTiles * kPanels > 2) store_tile<3>(b.sums + 3 * kTileBytes, kTileRowBytes);
}

template <class Product>
inline void run_tile_block(const TileBlock& b, int row_tiles, int panels) {
  if (row_tiles == 2) {
    if (panels == 2) return tile_block<Product, 2, 2>(b);
    return tile_block<Product, 2, 1>(b);
  }
  if (panels == 4) return tile_block<Product, 1, 4>(b);
  if (panels == 2) return tile_block<Product, 1, 2>(b);
  return tile_block<Product, 1, 1>(b);
}

// ---- bfloat16 and int8 ----

// Many rows are computed some row tiles, and of longer rows some bytes, at a time: at most 1 MiB of activations, which
// stay in the level-2 cache while panels pass by. Of two panels a part at a time stays in the level-1 cache while these
// activations pass by: both out of the level-2 cache are more than it can deliver to the tiles. Between chunks, and
// between parts, sums rest in memory.
constexpr int64_t kMostChunk = 4096;
constexpr int64_t kMostPart = 512;
constexpr int64_t kMostChunkBytes = 1 << 20;
constexpr int kMostRowTiles = 32;  // of rows that are one chunk
constexpr int kCutRowTiles = 16;   // of longer ones, whose sums rest for all panels of a group
constexpr int kPanelGroup = 32;
static_assert(2 * kMostRowTiles <= 4 * kPanelGroup, "the sums of two panels fit where a group's would");

// The bytes of each of the fewest parts of about equal size, none larger than `most`.
inline int64_t even_part(int64_t width, int64_t most) {
  const int64_t parts = (width + most - 1) / most, bytes = (width + parts - 1) / parts;
  return (bytes + kTileRowBytes - 1) / kTileRowBytes * kTileRowBytes;
}

inline size_t tile_scratch_bytes(int num_rows) {
  const size_t row_tiles = num_row_tiles(num_rows);
  if (row_tiles <= 2) return 4 * kTileBytes;
  const size_t of_panel = row_tiles < kCutRowTiles ? (row_tiles + 1) / 2 * 2 : kCutRowTiles;
  return (4 + of_panel * kPanelGroup) * kTileBytes;
}

// Finishes the new rows of the tiles first_tile .. first_tile + row_tiles of a set, whose sums lie as
// [row tile][panel][tile].
template <class Value>
inline void finish_tiles(const Matrix& w, const Output& out, const PanelSet& set, int first_tile, int row_tiles,
                         int num_rows, const uint8_t* sums, const Value& value) {
  for (int tile = 0; tile < row_tiles; ++tile) {
    const int base = first_row_of_tile(first_tile + tile, num_rows), first = (first_tile + tile) * kTileRows;
    const int end = base + tile_rows(num_rows);
    const uint8_t* const tile_sums = sums + static_cast<int64_t>(tile) * set.count * kTileBytes;
    finish_rows(w, out, set, first, end - first, [&](int row, int i) {
      return value(row, set.panels[i], tile_sums + i * kTileBytes + (row - base) * kTileRowBytes);
    });
  }
}

template <class Product, class Value>
inline void tile_matmul(const Matrix& w, const Activations& x, int num_rows, int first_panel, int last_panel,
                        const Output& out, void* scratch, const Value& value) {
  const bool in_pairs = out.finish == Finish::kGatedSilu;
  const int row_tiles = num_row_tiles(num_rows);
  const int64_t panel = static_cast<int64_t>(panel_bytes(w.storage, w.width, w.group));
  const int64_t width = panel / kTileBytes * kTileRowBytes;
  const uint8_t* const weights = static_cast<const uint8_t*>(w.panels);
  uint8_t* const finished = static_cast<uint8_t*>(scratch);  // one block's, which stays in the level-1 cache
  uint8_t* const sums = finished + 4 * kTileBytes;
  configure_product_tiles(tile_rows(num_rows), kTileRowBytes);

  TileBlock b;
  b.x_stride = x.stride;
  const auto set_rows = [&](int tile, int64_t begin) {
    for (int i = 0; i < 2 && tile + i < row_tiles; ++i)
      b.x[i] = x.data + first_row_of_tile(tile + i, num_rows) * x.stride + begin;
  };

  if (row_tiles <= 2) {
    const PanelWalk walk(first_panel, last_panel, in_pairs, row_tiles == 1 ? 4 : 2);
    set_rows(0, 0);
    b.lines_ahead = kTileRows;
    b.num_bytes = width;
    b.before = nullptr;
    b.sums = finished;
    for (int index = 0, num_sets = walk.num_sets(); index < num_sets; ++index) {
      const PanelSet set = walk[index];
      for (int i = 0; i < set.count; ++i) {
        b.panels[i] = weights + set.panels[i] * panel;
        b.ahead[i] = b.panels[i] + kFetchAhead;
      }
      run_tile_block<Product>(b, row_tiles, set.count);
      finish_tiles(w, out, set, 0, row_tiles, num_rows, finished, value);
    }
    return;
  }

  const int64_t chunk = even_part(width, kMostChunk), part = even_part(chunk, kMostPart);
  const bool is_cut = chunk < width;
  const int fitting = static_cast<int>(kMostChunkBytes / (chunk * kTileRows)) / 2 * 2;
  const int tiles_together = is_cut ? kCutRowTiles : fitting < kMostRowTiles ? fitting : kMostRowTiles;

  struct Place {
    int panel;
    int64_t at;
  };
  // Some row tiles times bytes begin .. end of a set of panels, part by part; `after` is what comes then.
  const auto multiply_chunk = [&](int first_tile, int last_tile, const PanelSet& set, int64_t begin, int64_t end,
                                  const Place& after, uint8_t* set_sums) {
    const int blocks = (last_tile - first_tile + 1) / 2;
    for (int64_t at = begin; at < end; at += part) {
      b.num_bytes = end - at < part ? end - at : part;
      const bool is_last = at + b.num_bytes == width;
      const Place next = at + b.num_bytes < end ? Place{set.panels[0], at + part} : after;
      b.lines_ahead = next.panel < last_panel ? (kTileRows + blocks - 1) / blocks : 0;
      for (int i = 0; i < set.count; ++i) {
        b.panels[i] = weights + set.panels[i] * panel + at * kTileRows;
        const int next_panel = next.panel + i < last_panel ? next.panel + i : next.panel;
        b.ahead[i] = weights + next_panel * panel + next.at * kTileRows;
      }
      for (int tile = first_tile; tile < last_tile; tile += 2) {
        const int tiles = last_tile - tile < 2 ? 1 : 2;
        set_rows(tile, at);
        uint8_t* const resting = set_sums + static_cast<int64_t>(tile - first_tile) * 2 * kTileBytes;
        b.before = at == 0 ? nullptr : resting;
        b.sums = is_last ? finished : resting;
        run_tile_block<Product>(b, tiles, set.count);
        for (int i = 0; i < set.count; ++i) b.ahead[i] += b.lines_ahead * b.num_bytes;
        if (is_last) finish_tiles(w, out, set, tile, tiles, num_rows, finished, value);
      }
    }
  };

  for (int first_tile = 0; first_tile < row_tiles; first_tile += tiles_together) {
    const int last_tile = row_tiles - first_tile < tiles_together ? row_tiles : first_tile + tiles_together;
    // Of a panel; those of a whole row are finished before the next set begins.
    const int64_t sums_bytes = is_cut ? (last_tile - first_tile + 1) / 2 * 2 * kTileBytes : 0;
    for (int group = first_panel; group < last_panel; group += kPanelGroup) {
      const int group_end = last_panel - group < kPanelGroup ? last_panel : group + kPanelGroup;
      for (int64_t begin = 0; begin < width; begin += chunk) {
        const int64_t end = width - begin < chunk ? width : begin + chunk;
        for (int first = group; first < group_end; first += 2) {
          const PanelSet set = first + 1 < group_end ? PanelSet{2, {first, first + 1}} : PanelSet{1, {first}};
          // The same chunk of two others, the group's next chunk, or the next group.
          const Place after = first + 2 < group_end ? Place{first + 2, begin}
                              : end < width         ? Place{group, end}
                                                    : Place{group_end, 0};
          multiply_chunk(first_tile, last_tile, set, begin, end, after, sums + (first - group) * sums_bytes);
        }
      }
    }
  }
}

// ---- int4 ----

// A panel's codes less their zeros as signed bytes, in the layout of kInt8, so that what comes out of the tiles is a
// group's dot product with the zero point included. Fetches from `ahead` on meanwhile, as much as it reads.
inline void unpack_panel(const Matrix& w, int panel, int begin, int end, const uint8_t* ahead, int8_t* unpacked) {
  const int num_groups = padded_width(w.storage, w.width, w.group) / w.group;
  const uint8_t* from = static_cast<const uint8_t*>(w.panels) +
                        panel * static_cast<int64_t>(panel_bytes(w.storage, w.width, w.group)) + begin * 8;
  const uint8_t* const zeros =
      w.zeros ? w.zeros + static_cast<int64_t>(panel) * num_groups * kPanelWidth : nullptr;
  for (int k = begin; k < end; k += w.group) {
    const Ints zero =
        zeros ? _mm512_mullo_epi32(load_bytes(zeros + k / w.group * kPanelWidth), _mm512_set1_epi32(0x01010101))
              : _mm512_set1_epi8(8);
    for (int i = 0; i < w.group; i += 8, from += 64, ahead += 64, unpacked += 128) {
      prefetch(ahead);
      const Ints codes = load_ints(from);
      store_lanes(unpacked, _mm512_sub_epi8(low_codes(codes), zero));
      store_lanes(unpacked + 64, _mm512_sub_epi8(high_codes(codes), zero));
    }
  }
}

// Groups whose products are under way while those of as many others are added up: what a tile stores takes long to come
// back.
constexpr int kGroupsUnderWay = 4;

// Calls would carry the sums through memory.
#define GYRFALCON_INLINE __attribute__((always_inline))

// One tile of rows times one panel over groups of unpacked codes: sums [row][16] go on. dots: memory for
// 2 kGroupsUnderWay tiles.
template <int kTilesAGroup>
inline void group_tile_block(const uint8_t* x, int64_t x_stride, const int8_t* panel, int num_groups, int group,
                             const uint16_t* scales, const float* x_scales, int64_t x_scales_stride, int rows,
                             float* sums, bool is_first, uint8_t* dots) {
  const auto dots_of = [=](int g) GYRFALCON_INLINE { return dots + g % (2 * kGroupsUnderWay) * kTileBytes; };
  const auto multiply = [=](int g, auto slot) GYRFALCON_INLINE {
    if (g >= num_groups) return;
    constexpr int kSum = decltype(slot)::value, kX = 4 + kSum % 2, kW = 6 + kSum % 2;
    const uint8_t* const left = x + g * group;
    const int8_t* const right = panel + static_cast<int64_t>(g) * group * kPanelWidth;
    clear_tile<kSum>();
    load_tile<kX>(left, x_stride);
    load_tile<kW>(right, kTileRowBytes);
    SignedTiles::multiply<kSum, kX, kW>();
    if constexpr (kTilesAGroup > 1) {
      load_tile<9 - kX>(left + 64, x_stride);
      load_tile<13 - kW>(right + kTileBytes, kTileRowBytes);
      SignedTiles::multiply<kSum, 9 - kX, 13 - kW>();
    }
  };
  const auto store_dots = [=](int g, auto slot) GYRFALCON_INLINE {
    if (g < num_groups) store_tile<decltype(slot)::value>(dots_of(g), kTileRowBytes);
  };
  const auto multiply_four = [=](int g) GYRFALCON_INLINE {
    multiply(g, std::integral_constant<int, 0>());
    multiply(g + 1, std::integral_constant<int, 1>());
    multiply(g + 2, std::integral_constant<int, 2>());
    multiply(g + 3, std::integral_constant<int, 3>());
    // After all four: a store waits for its product, and what comes behind it waits with it.
    store_dots(g, std::integral_constant<int, 0>());
    store_dots(g + 1, std::integral_constant<int, 1>());
    store_dots(g + 2, std::integral_constant<int, 2>());
    store_dots(g + 3, std::integral_constant<int, 3>());
  };
  const auto add = [=](int g, int row, Floats scale, Floats sum) GYRFALCON_INLINE {
    const Ints dot = load_ints(dots_of(g) + row * kTileRowBytes);
    return multiply_add(to_floats(dot), scaled(x_scales[row * x_scales_stride + g], scale), sum);
  };
  const auto for_each_group = [=](const auto& add_group) GYRFALCON_INLINE {
    multiply_four(0);
    for (int g = 0; g < num_groups; ++g) {
      if (g % kGroupsUnderWay == 0) multiply_four(g + kGroupsUnderWay);
      add_group(g, load_halves(scales + g * kPanelWidth));
    }
  };
  if (rows == kTileRows) {
    Floats kept[kTileRows];
#pragma GCC unroll 16
    for (int row = 0; row < kTileRows; ++row)
      kept[row] = is_first ? zero_floats() : load_floats(sums + row * kPanelWidth);
    for_each_group([&](int g, Floats scale) GYRFALCON_INLINE {
#pragma GCC unroll 16
      for (int row = 0; row < kTileRows; ++row) kept[row] = add(g, row, scale, kept[row]);
    });
#pragma GCC unroll 16
    for (int row = 0; row < kTileRows; ++row) store_lanes(sums + row * kPanelWidth, kept[row]);
    return;
  }
  if (is_first) std::memset(sums, 0, static_cast<size_t>(rows) * kLaneBytes);
  for_each_group([&](int g, Floats scale) GYRFALCON_INLINE {
    for (int row = 0; row < rows; ++row)
      store_lanes(sums + row * kPanelWidth, add(g, row, scale, load_floats(sums + row * kPanelWidth)));
  });
}

#undef GYRFALCON_INLINE

// Inner positions unpacked at a time: they stay in the level-1 cache, and all rows' in the level-2 cache.
constexpr int kUnpackedChunk = 1024;
constexpr int kUnpackedGroup = 8;  // panels whose sums rest in memory together

inline size_t group_tile_scratch_bytes(int num_rows) {
  return 2 * kGroupsUnderWay * kTileBytes + kUnpackedChunk * kPanelWidth +
         static_cast<size_t>(num_row_tiles(num_rows)) * kUnpackedGroup * kTileBytes;
}

inline void group_tile_matmul(const Matrix& w, const Activations& x, int num_rows, int first_panel, int last_panel,
                              const Output& out, void* scratch) {
  const int row_tiles = num_row_tiles(num_rows), rows = tile_rows(num_rows);
  const int width = padded_width(w.storage, w.width, w.group), num_groups = width / w.group;
  const int64_t panel_size = static_cast<int64_t>(panel_bytes(w.storage, w.width, w.group));
  uint8_t* const dots = static_cast<uint8_t*>(scratch);
  int8_t* const unpacked = reinterpret_cast<int8_t*>(dots + 2 * kGroupsUnderWay * kTileBytes);
  uint8_t* const sums = reinterpret_cast<uint8_t*>(unpacked) + kUnpackedChunk * kPanelWidth;
  const bool in_pairs = out.finish == Finish::kGatedSilu;
  configure_product_tiles(rows, w.group < 64 ? w.group : 64);

  for (int first = first_panel; first < last_panel; first += kUnpackedGroup) {
    const int last = last_panel - first < kUnpackedGroup ? last_panel : first + kUnpackedGroup;
    const auto sums_of = [&](int tile, int panel) {
      return sums + (static_cast<int64_t>(tile) * kUnpackedGroup + panel - first) * kTileBytes;
    };
    for (int begin = 0; begin < width; begin += kUnpackedChunk) {
      const int end = width - begin < kUnpackedChunk ? width : begin + kUnpackedChunk;
      for (int panel = first; panel < last; ++panel) {
        // Next comes the same chunk of the next panel, or the next chunk of the first.
        const uint8_t* const ahead = static_cast<const uint8_t*>(w.panels) +
                                     (panel + 1 < last ? (panel + 1) * panel_size + begin * 8
                                                       : first * panel_size + end * 8);
        unpack_panel(w, panel, begin, end, ahead, unpacked);
        const uint16_t* const scales =
            w.scales_f16 + (static_cast<int64_t>(panel) * num_groups + begin / w.group) * kPanelWidth;
        for (int tile = 0; tile < row_tiles; ++tile) {
          const int64_t row = first_row_of_tile(tile, num_rows);
          const auto block = w.group > 64 ? group_tile_block<2> : group_tile_block<1>;
          block(x.data + row * x.stride + begin, x.stride, unpacked, (end - begin) / w.group, w.group, scales,
                x.scales + row * num_groups + begin / w.group, num_groups, rows,
                reinterpret_cast<float*>(sums_of(tile, panel)), begin == 0, dots);
        }
      }
    }
    for (int panel = first; panel < last; panel += in_pairs ? 2 : 1) {
      const PanelSet set = in_pairs ? PanelSet{2, {panel, panel + 1}} : PanelSet{1, {panel}};
      for (int tile = 0; tile < row_tiles; ++tile)
        finish_tiles(w, out, set, tile, 1, num_rows, sums_of(tile, panel),
                     [](int, int, const uint8_t* sum) { return load(reinterpret_cast<const float*>(sum)); });
    }
  }
}

}  // namespace gyrfalcon::GYRFALCON_ISA
