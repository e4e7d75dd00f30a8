// Dropout that is there only in training.
#pragma once
#include "engine/nn/mode.h"
#include "engine/ops.h"

namespace weft {

struct Dropout {
  double p;
  Tensor operator()(const Tensor& x, const Mode& mode) const {
    return mode.training && p > 0 ? dropout(x, p, mode.key()) : x;
  }
};

}  // namespace weft
