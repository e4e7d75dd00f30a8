// Where batches lie on a device: always in the same place, so that captured work finds them there, copied there without
// waiting for the device. Used by the training step and the evaluation.
#pragma once
#include <vector>

#include "data/loader.h"
#include "engine/queue.h"
#include "engine/tensor.h"

namespace weft {

class BatchInput {
 public:
  BatchInput(int64_t batch, int64_t seq, Device device);
  // Puts a batch, and the number of its step, in place for the work that is queued after this. The host waits only
  // when it is kSlots batches ahead of the device.
  void queue(const Batch& batch, uint64_t step);
  const Tensor& tokens() const { return tokens_; }    // i32 [B, T]
  const Tensor& targets() const { return targets_; }  // i32 [B, T]
  const uint64_t* step() const { return static_cast<const uint64_t*>(storage_.raw()); }  // on the device

 private:
  static constexpr int kSlots = 4;
  struct Slot {
    Staging memory;
    Mark copied;
  };
  Tensor storage_;  // i32: the step's number, then tokens, then targets
  Tensor tokens_, targets_;
  std::vector<Slot> slots_;
  size_t next_ = 0;
};

}  // namespace weft
