// Which tables of kernels this build has, and which of them this processor runs.
#pragma once

#include "export.h"
#include "kernels.h"

namespace gyrfalcon {

enum class Availability : int32_t { kUnknown = -1, kNotBuilt = 0, kNotHere = 1, kRuns = 2 };

// name: "avx2", "avx512" or "amx". kNotHere: the processor, or the system it runs under, does not have what it takes.
Availability availability(const char* name);

// The table of that name where it runs, otherwise null. Every thread calls its `enter_thread` before the first use.
const Kernels* find_kernels(const char* name);

}  // namespace gyrfalcon

GYRFALCON_EXPORT int32_t gyrfalcon_kernels_availability(const char* name);
GYRFALCON_EXPORT const gyrfalcon::Kernels* gyrfalcon_kernels(const char* name);
