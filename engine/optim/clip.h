// Clipping by the global norm, on the device: the norm of all gradients, the factor that clips them and whether all is
// finite are found there and read there by the optimizers, so a step's update is queued, or captured in a CUDA graph,
// before the host knows any of it. Used by the training step, AdamW and Muon.
#pragma once
#include <vector>

#include "engine/tensor.h"

namespace weft {

// What optimizers read on the device, and the host of it a step later.
struct UpdateState {
  float rate_factor = 1;   // multiplies learning rates; written before the update
  float grad_scale = 1;    // multiplies gradients
  float norm = 0;          // of all gradients, before clipping
  int32_t finite = 1;      // 0 once a norm was not finite: from then on no update is applied, and nothing here changes
  int32_t parameter = -1;  // the first whose gradient was not finite, or too large to square in f32; -1: none
  int32_t step = 0;        // how many norms were finite: the number of the first that was not
};

class GradientClip {
 public:
  GradientClip(std::vector<Tensor> parameters, double clip_norm);
  // Measures the leaves' gradients: grad_scale = min(1, clip_norm / (norm + 1e-6)).
  void measure();
  void set_rate_factor(double factor);             // queued
  UpdateState* state() const;                      // on the parameters' device
  UpdateState read() const;                        // waits for the device
  Device device() const { return state_.device(); }

 private:
  std::vector<Tensor> parameters_;
  double clip_norm_;
  Tensor state_;        // bytes of an UpdateState
  Tensor first_range_;  // i32 [parameters + 1]: of each parameter's ranges (square_ranges)
};

// A state for one update that the host knows all of.
Tensor known_state(Device device, double grad_scale);
inline UpdateState* state_in(const Tensor& bytes) { return static_cast<UpdateState*>(bytes.raw()); }

}  // namespace weft
