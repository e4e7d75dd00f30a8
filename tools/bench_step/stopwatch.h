// Times between points of the work that a device is given, without waiting for it: events on the GPU's stream, the clock
// on a CPU. Used by bench_step.
#pragma once
#include <memory>
#include <vector>

#include "engine/device.h"

namespace weft {

class Stopwatch {
 public:
  explicit Stopwatch(Device device);
  ~Stopwatch();
  void mark();
  // Between each mark and the next, in ms. Waits for the device.
  std::vector<double> intervals() const;

 private:
  struct Marks;
  std::unique_ptr<Marks> marks_;
};

// FLOP/s of large products, the fastest of several; bytes/s of a large copy, read and written.
double matrix_rate(Device device, DType dtype);
double copy_rate(Device device);

}  // namespace weft
