// Muon (Jordan et al., 2024): momentum whose direction is made orthogonal by five Newton-Schulz steps. For weights that
// multiply activations; a rank-3 parameter [E, O, I] is E matrices, each by itself.
#pragma once
#include <vector>

#include "engine/optim/clip.h"
#include "engine/tensor.h"

namespace weft {

struct MuonOptions {
  double momentum = 0.95;       // Nesterov's
  DType compute = DType::f32;   // of the Newton-Schulz steps
};

class Muon {
 public:
  explicit Muon(std::vector<Tensor> parameters, MuonOptions options = {});  // leaves of rank 2 or 3, f32 or split
  // Queues one update from the leaves' gradients (f32 or bf16; every leaf must have one), with the state's factors; none
  // where the state says that not all is finite. Writes the leaves' bf16 copies too.
  void step(double learning_rate, const UpdateState* state);
  // The same with a state that the host knows: gradients times `grad_scale`.
  void step(double learning_rate, double grad_scale = 1);

  const std::vector<Tensor>& momentum() const { return momentum_; }

 private:
  std::vector<Tensor> parameters_, momentum_;
  MuonOptions options_;
  std::vector<std::vector<size_t>> groups_;  // parameters of equal matrix shape, orthogonalized together
};

// The Newton-Schulz iteration: matrices [n, R, C] -> nearly orthogonal ones. Each times its factor (f32 [n]; none: 1) must
// have a norm of at most 1, and by itself one below 1e9.
Tensor orthogonalized(Tensor x, const Tensor& factors = {});

}  // namespace weft
