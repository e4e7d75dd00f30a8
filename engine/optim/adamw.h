// AdamW (Loshchilov & Hutter, 2019): Adam with decoupled weight decay, on every parameter it is given.
#pragma once
#include <vector>

#include "engine/optim/clip.h"
#include "engine/tensor.h"

namespace weft {

struct AdamWOptions {
  double beta1 = 0.9, beta2 = 0.999, eps = 1e-8, weight_decay = 0.1;
};

class AdamW {
 public:
  explicit AdamW(std::vector<Tensor> parameters, AdamWOptions options = {});  // leaves, f32 or split
  // Queues one update from the leaves' gradients (f32 or bf16; every leaf must have one), with the state's factors; none
  // where the state says that not all is finite. Writes the leaves' bf16 copies too.
  void step(double learning_rate, const UpdateState* state);
  // The same with a state that the host knows: gradients times `grad_scale`.
  void step(double learning_rate, double grad_scale = 1);
  int64_t steps() const;  // that were applied; waits for the device

 private:
  std::vector<Tensor> parameters_, m_, v_;
  AdamWOptions options_;
  Tensor progress_;  // on the device: the steps so far, and the coefficients of the step at hand
};

}  // namespace weft
