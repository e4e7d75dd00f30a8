// Random bits for the CPU loops of ops that draw dropout masks: many at once, with the processor's widest instructions.
#pragma once
#include "engine/random.h"

namespace weft {

// The 16 bits that a Mask of that key compares, of elements from + j for j < n; from is a multiple of 8.
void draw_halves(RngKey key, uint64_t from, int64_t n, uint16_t* halves);

}  // namespace weft
