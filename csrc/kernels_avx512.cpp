// The kernels for processors with AVX-512 with VNNI.
#include "kernels.h"

// A compiler that does not know these instructions builds the library without them.
#ifdef GYRFALCON_LEFT_OUT
const gyrfalcon::Kernels* gyrfalcon::kernels_avx512() { return nullptr; }
#else
#include "kernels_table.inl.h"

const gyrfalcon::Kernels* gyrfalcon::kernels_avx512() { return &avx512::kTable; }
#endif
