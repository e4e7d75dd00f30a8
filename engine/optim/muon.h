// Muon (Jordan et al., 2024): momentum whose direction is made orthogonal by five Newton-Schulz steps. For weights that
// multiply activations; a rank-3 parameter [E, O, I] is E matrices, each by itself.
#pragma once
#include <vector>

#include "engine/tensor.h"

namespace weft {

struct MuonOptions {
  double momentum = 0.95;       // Nesterov's
  DType compute = DType::f32;   // of the Newton-Schulz steps
};

class Muon {
 public:
  explicit Muon(std::vector<Tensor> parameters, MuonOptions options = {});  // f32 leaves of rank 2 or 3
  // One update from the leaves' gradients times `grad_scale` (the clipping factor). Every leaf must have a gradient.
  void step(double learning_rate, double grad_scale = 1);

  const std::vector<Tensor>& momentum() const { return momentum_; }  // what a checkpoint keeps

 private:
  std::vector<Tensor> parameters_, momentum_;
  MuonOptions options_;
  std::vector<std::vector<size_t>> groups_;  // parameters of equal matrix shape, orthogonalized together
};

// The Newton-Schulz iteration: matrices [n, R, C] with a norm of at most 1 -> nearly orthogonal ones.
Tensor orthogonalized(Tensor x);

}  // namespace weft
