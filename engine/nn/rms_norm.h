// Root-mean-square normalisation along the last axis with a learned scale.
#pragma once
#include "engine/nn/params.h"

namespace weft {

struct RmsNorm {
  Tensor weight;  // [D]
  double eps;

  RmsNorm(Scope s, int64_t dim, double eps = 1e-6)
      : weight(s.param("weight", {dim}, ones(), Kind::vector)), eps(eps) {}
  Tensor operator()(const Tensor& x) const { return rms_norm(x, weight, eps); }
};

}  // namespace weft
