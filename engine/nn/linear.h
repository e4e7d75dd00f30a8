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

// Layers of the same x [.., in], whose outputs [.., sum of out] lie side by side: one product, and one each of its
// gradients.
struct JoinedLinear {
  std::vector<Linear> layers;

  JoinedLinear(Scope s, std::vector<Linear> of) : layers(std::move(of)) {
    std::vector<Tensor> weights, biases;
    for (const Linear& l : layers) {
      weights.push_back(l.weight);
      if (l.bias) biases.push_back(l.bias);
    }
    s.join(weights);
    if (!biases.empty()) s.join(biases);
  }
  Tensor operator()(const Tensor& x) const {
    std::vector<Tensor> weights, biases;
    for (const Linear& l : layers) {
      weights.push_back(cast(l.weight, x.dtype()));
      biases.push_back(l.bias ? cast(l.bias, x.dtype()) : Tensor{});
    }
    return matmul_joined(x, weights, biases);
  }
};

}  // namespace weft
