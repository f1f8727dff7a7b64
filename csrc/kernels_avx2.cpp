// The kernels for processors with AVX2, FMA and F16C.
#include "kernels.h"

// A compiler that does not know these instructions builds the library without them.
#ifdef GYRFALCON_LEFT_OUT
const gyrfalcon::Kernels* gyrfalcon::kernels_avx2() { return nullptr; }
#else
#include "kernels_table.inl.h"

const gyrfalcon::Kernels* gyrfalcon::kernels_avx2() { return &avx2::kTable; }
#endif
