// The table of one kind of processor: everything is compiled into its namespace, GYRFALCON_ISA.
#pragma once

#include "kernels.h"
#include "vec.h"
// Defines what vec.h declares and the others use, so it comes first.
#include "rows.inl.h"
// The order of the other two does not matter.
#include "attention.inl.h"
#include "matmul.inl.h"

#define GYRFALCON_TEXT_OF(name) #name
#define GYRFALCON_TEXT(name) GYRFALCON_TEXT_OF(name)

namespace gyrfalcon::GYRFALCON_ISA {

// Constant-initialised: no code of this file may run before the processor was asked whether it can.
inline constexpr Kernels kTable = {
    GYRFALCON_TEXT(GYRFALCON_ISA),
    form,
    prepare,
    matmul,
    matmul_scratch_bytes,
    layer_norm,
    rms_norm,
    rotate_and_store,
    attend,
    attend_scratch_bytes,
    attend_products,
    choose_greedy,
    enter_thread,
};

}  // namespace gyrfalcon::GYRFALCON_ISA
