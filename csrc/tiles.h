// The tile registers of AMX: asking for them, and giving them their shapes.
#pragma once

#include <cstdint>
#include <cstring>

#include <sys/syscall.h>
#include <unistd.h>

#ifndef GYRFALCON_ISA
#error "define GYRFALCON_ISA: amx"
#endif

namespace gyrfalcon::GYRFALCON_ISA {

// What LDTILECFG reads.
struct alignas(64) TileConfig {
  uint8_t palette;  // 1: eight tiles of at most 16 rows of 64 bytes
  uint8_t start_row;
  uint8_t reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(TileConfig) == 64);

// Tiles 0 .. 7 empty: fill in the rows and bytes of those in use.
inline TileConfig empty_tile_config() {
  TileConfig config;
  std::memset(&config, 0, sizeof config);
  config.palette = 1;
  return config;
}

// Eight tiles of 16 rows of 64 bytes.
inline TileConfig full_tile_config() {
  TileConfig config = empty_tile_config();
  for (int i = 0; i < 8; ++i) {
    config.row_bytes[i] = 64;
    config.rows[i] = 16;
  }
  return config;
}

// The configuration the calling thread's tiles have. All zero: none yet.
inline thread_local TileConfig active_tile_config{};

// Gives the calling thread's tiles these shapes; their contents are zero afterwards, or as they were if the shapes are
// those they had. Whoever else may have
// configured tiles on this thread has to be followed by `enter_thread`, which forgets.
inline void configure_tiles(const TileConfig& config) {
  if (std::memcmp(&active_tile_config, &config, sizeof config) == 0) return;
  active_tile_config = config;
  // gcc 12's intrinsic tells the compiler of 8 bytes read, and the stores to the others may then be dropped.
  asm volatile("ldtilecfg %0" : : "m"(active_tile_config));
}

// Keeps the compiler from moving stores past this: gcc 12's tile loads do not tell it that they read memory.
inline void finish_stores() { asm volatile("" : : : "memory"); }

// Asks the kernel to let this process use tile data; needed once per process, before its first tile instruction, and
// harmless again. False where the kernel or the processor does not have it.
inline bool request_amx() {
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long kTileData = 18;               // XFEATURE_XTILEDATA
  static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
}

}  // namespace gyrfalcon::GYRFALCON_ISA
