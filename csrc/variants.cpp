#include "variants.h"

#include <cstring>

#if !defined(__x86_64__)
#error "the kernels are written for x86-64"
#endif

namespace gyrfalcon {
namespace {

struct Variant {
  const char* name;
  const Kernels* (*table)();
  bool (*processor_has_it)();
};

// Asked in this file, which any x86-64 processor can run. The compiler's library also asks what the system saves at a
// switch of threads.
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni");
}

bool has_amx() {
  return has_avx512() && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("amx-tile") &&
         __builtin_cpu_supports("amx-int8") && __builtin_cpu_supports("amx-bf16");
}

const Variant kVariants[] = {
    {"amx", kernels_amx, has_amx},
    {"avx512", kernels_avx512, has_avx512},
    {"avx2", kernels_avx2, has_avx2},
};

const Variant* find(const char* name) {
  for (const Variant& variant : kVariants)
    if (std::strcmp(variant.name, name) == 0) return &variant;
  return nullptr;
}

}  // namespace

Availability availability(const char* name) {
  const Variant* variant = find(name);
  if (variant == nullptr) return Availability::kUnknown;
  if (variant->table() == nullptr) return Availability::kNotBuilt;
  // The system may still refuse (AMX needs its permission), which the table's own check finds out.
  return variant->processor_has_it() && variant->table()->enter_thread() ? Availability::kRuns : Availability::kNotHere;
}

const Kernels* find_kernels(const char* name) {
  return availability(name) == Availability::kRuns ? find(name)->table() : nullptr;
}

}  // namespace gyrfalcon

int32_t gyrfalcon_kernels_availability(const char* name) {
  return static_cast<int32_t>(gyrfalcon::availability(name));
}

const gyrfalcon::Kernels* gyrfalcon_kernels(const char* name) { return gyrfalcon::find_kernels(name); }
