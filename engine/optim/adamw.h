// AdamW (Loshchilov & Hutter, 2019): Adam with decoupled weight decay, on every parameter it is given.
#pragma once
#include <vector>

#include "engine/tensor.h"

namespace weft {

struct AdamWOptions {
  double beta1 = 0.9, beta2 = 0.999, eps = 1e-8, weight_decay = 0.1;
};

class AdamW {
 public:
  explicit AdamW(std::vector<Tensor> parameters, AdamWOptions options = {});  // f32 leaves
  // One update from the leaves' gradients times `grad_scale` (the clipping factor). Every leaf must have a gradient.
  void step(double learning_rate, double grad_scale = 1);

  // What a checkpoint keeps: both averages, and how many steps they hold.
  const std::vector<Tensor>& averages() const { return m_; }
  const std::vector<Tensor>& square_averages() const { return v_; }
  int64_t steps() const { return steps_; }
  void set_steps(int64_t steps) { steps_ = steps; }

 private:
  std::vector<Tensor> parameters_, m_, v_;
  AdamWOptions options_;
  int64_t steps_ = 0;
};

}  // namespace weft
