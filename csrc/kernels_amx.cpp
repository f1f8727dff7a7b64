// The kernels for processors with AMX with its bfloat16 and int8 tiles, besides AVX-512.
#include "kernels.h"

// A compiler that does not know these instructions builds the library without them.
#ifdef GYRFALCON_LEFT_OUT
const gyrfalcon::Kernels* gyrfalcon::kernels_amx() { return nullptr; }
#else
#include "kernels_table.inl.h"

const gyrfalcon::Kernels* gyrfalcon::kernels_amx() { return &amx::kTable; }
#endif
