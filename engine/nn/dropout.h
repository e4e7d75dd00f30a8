// Dropout that is there only in training.
#pragma once
#include "engine/nn/mode.h"
#include "engine/ops.h"

namespace weft {

struct Dropout {
  double p;
  Tensor operator()(const Tensor& x, const Mode& mode) const {
    return active(mode) ? dropout(x, p, mode.key()) : x;
  }
  // The same of silu(x).
  Tensor of_silu(const Tensor& x, const Mode& mode) const {
    return active(mode) ? silu_dropout(x, p, mode.key()) : silu(x);
  }
  // residual + the same of x.
  Tensor onto(const Tensor& residual, const Tensor& x, const Mode& mode) const {
    return active(mode) ? add_dropout(residual, x, p, mode.key()) : add(residual, x);
  }

 private:
  bool active(const Mode& mode) const { return mode.training && p > 0; }
};

}  // namespace weft
