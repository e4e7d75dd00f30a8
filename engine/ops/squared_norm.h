// The parts that squared_norm adds up, for those who add them up in their own way (engine/optim/clip.h).
#pragma once
#include <vector>

#include "engine/tensor.h"

namespace weft {

// The sums of squares of fixed ranges of each tensor (f32 or bf16 on a GPU), tensor after tensor: f32 [ranges]. Of a
// tensor that has Tensor::squares those are added up instead, in as many equal shares as it has ranges.
Tensor square_ranges(const std::vector<Tensor>& xs);
int64_t square_range_count(int64_t elements);  // ranges of a tensor of that many

}  // namespace weft
