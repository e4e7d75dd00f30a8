// y = x W^T + b, in x's dtype over f32 weights.
#pragma once
#include "engine/nn/params.h"

namespace weft {

enum class Bias : uint8_t { none, with };

struct Linear {
  Tensor weight;  // [out, in]
  Tensor bias;    // [out], or none

  Linear(Scope s, int64_t in, int64_t out, double std, Bias with_bias = Bias::none)
      : weight(s.param("weight", {out, in}, normal(std), Kind::matrix)) {
    if (with_bias == Bias::with) bias = s.param("bias", {out}, zeros(), Kind::vector);
  }
  Tensor operator()(const Tensor& x) const {
    return matmul(x, cast(weight, x.dtype()), Transpose::b, bias ? cast(bias, x.dtype()) : Tensor{});
  }
};

}  // namespace weft
