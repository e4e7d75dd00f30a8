// The readable pieces of a training step: which op's work counts to which, what each has to do, and the least time that
// could take. bench_step sums what the recorder saw by these.
#pragma once
#include <map>

#include "model/config.h"
#include "tools/bench_step/recorder.h"

namespace weft {

// What this run measured the device to be capable of.
struct Capability {
  double flops = 0;  // of a large matrix product in the step's precision, per second
  double bytes = 0;  // of a large copy, read and written, per second
};

struct StepSize {
  Device device;
  int64_t batch, seq;
  int64_t value_bytes;  // of an activation
};

// The work of a piece in one step. Its floor is the time that the device needs for it by what it was measured to be
// capable of: for every product the longer of its FLOPs and its bytes, for all else the bytes. It is 0 for a pass over
// memory that a fused kernel makes unnecessary.
struct PieceWork {
  double flops = 0, bytes = 0, floor_ms = 0;
};

// The name of the piece that an item counts to.
std::string piece_of(const Item& item, const Config& config);
// In the order of a step.
const std::vector<std::string>& piece_names();
std::map<std::string, PieceWork> piece_work(const Config& config, const StepSize& size, const Capability& device);

}  // namespace weft
