// A 64-bit checksum that runs at the speed of memory: it finds damage to a file, not an attacker's work.
//
// Words of eight bytes go to eight lanes in turn; every step is a bijection of its lane and of the word, so that a change
// of a single word always shows. The values are part of the packed file's format.
#pragma once

#include <cstddef>
#include <cstdint>

#include "export.h"
GYRFALCON_EXPORT uint64_t gyrfalcon_checksum(const void* data, size_t size);
